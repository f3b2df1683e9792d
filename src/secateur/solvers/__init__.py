"""The mathematics shared by methods. Nothing here knows of models or files."""

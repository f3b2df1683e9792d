"""Pages that a person reads: one file each, pictures inside, nothing fetched, light and dark."""

"""Methods, shares and seeds side by side under one protocol; :mod:`~secateur.comparison.run`.

Nothing is imported here: the process of a cell is to watch over its parent before it loads torch.
"""

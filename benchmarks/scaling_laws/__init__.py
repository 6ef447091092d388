"""How fast laws are fitted, against SciPy doing the same work."""

"""How fast laws are fitted, against SciPy doing the same work; and runs of our own to fit."""

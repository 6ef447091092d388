"""Measured claims: ``python -m benchmarks.NAME`` measures and appends to ``results/NAME.json``."""

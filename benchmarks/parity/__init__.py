"""Our methods against their official implementations, on the same gradients.

``python -m benchmarks.parity METHOD --reference PATH`` imports the official code from a clone at
PATH, runs it and ours side by side and appends a row to ``benchmarks/results/parity.json``. Nothing
of the official code is in this repository. A new method adds one file here that defines a
``Method``, and its name to ``__main__.METHODS``.
"""

"""Headline claims of the methods' papers, measured again at small scale.

``python -m benchmarks.claims [NAME ...] [--quick]`` appends a row for each claim to
``benchmarks/results/claims.json``, whatever comes out. A new claim is a ``Claim`` in one of the
files here and its name in ``__main__.CLAIMS``.
"""

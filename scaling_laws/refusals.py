"""Reasons for which a fit, or an answer from one, is refused."""


class FitRefused(ValueError):
    """The runs do not support what was asked. The message says what they lack."""


class TooFewRuns(FitRefused):
    """Fewer runs than parameters that are fitted, plus two."""


class NotSeparable(FitRefused):
    """The inputs lie on one line in logarithms: exponents cannot be told apart."""


class MixedRuns(FitRefused):
    """Runs counted or measured by different rules."""


class NoInteriorOptimum(FitRefused):
    """The best point lies at the edge of what was searched."""

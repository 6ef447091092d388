"""The one quantile that NumPy does not have."""

from jax.scipy import special

from jaxopt_suite.scaling_laws.double import in_double


@in_double
def student_quantile(level: float, degrees: float) -> float:
    """The ``t`` with a share ``level`` of Student's distribution between ``-t`` and ``t``.

    Found by bisection of the regularised incomplete beta function.

    Args:
      level: in (0, 1).
      degrees: of freedom, above 0.
    """
    outside = lambda t: float(special.betainc(degrees / 2, 0.5, degrees / (degrees + t * t)))
    low, high = 0.0, 1.0
    while outside(high) > 1 - level and high < 1e12:
        high *= 2
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if outside(middle) > 1 - level else (low, middle)
    return high

"""Published laws, ready to fit."""

from jaxopt_suite.scaling_laws.law import Law
from jaxopt_suite.scaling_laws.laws.chinchilla import Chinchilla

__all__ = ["Chinchilla", "registry"]


def registry() -> dict[str, Law]:
    """Every law here by its name."""
    return {law.name: law for law in (Chinchilla,)}

"""Published laws, ready to fit."""

from jaxopt_suite.scaling_laws.laws.chinchilla import Chinchilla

__all__ = ["Chinchilla"]

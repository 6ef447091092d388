"""Gradients in fewer bytes: compressors, error feedback, and the exchanges that use them."""

from jaxopt_suite.optimizers.compression import compressors, feedback
from jaxopt_suite.optimizers.compression.compressor import Compressor
from jaxopt_suite.optimizers.compression.feedback import Feedback
from jaxopt_suite.optimizers.compression.mean import CompressedMeanState, compressed_mean

__all__ = [
    "CompressedMeanState",
    "Compressor",
    "Feedback",
    "compressed_mean",
    "compressors",
    "feedback",
]

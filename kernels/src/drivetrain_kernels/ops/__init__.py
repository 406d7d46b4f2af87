"""The operators. Importing this package declares them in ``torch.ops.drivetrain``."""

from drivetrain_kernels.ops.adagrad import adagrad
from drivetrain_kernels.ops.adam import adam
from drivetrain_kernels.ops.copy import cast_copy, flatten, unflatten
from drivetrain_kernels.ops.lamb import lamb
from drivetrain_kernels.ops.momentum import lion, sgd
from drivetrain_kernels.ops.norm import norm_squared
from drivetrain_kernels.ops.quantize import dequantize, dequantize_reduce_quantize, quantize

__all__ = [
    "adagrad",
    "adam",
    "cast_copy",
    "dequantize",
    "dequantize_reduce_quantize",
    "flatten",
    "lamb",
    "lion",
    "norm_squared",
    "quantize",
    "sgd",
    "unflatten",
]

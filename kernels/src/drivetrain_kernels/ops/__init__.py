"""The operators. Importing this package declares them in ``torch.ops.drivetrain``."""

from drivetrain_kernels.ops.adagrad import adagrad
from drivetrain_kernels.ops.adam import adam
from drivetrain_kernels.ops.block_linear import block_linear
from drivetrain_kernels.ops.block_lists import BlockLists, block_lists
from drivetrain_kernels.ops.block_sparse_attention import (
    Visibility,
    block_sparse_attention,
    block_sparse_attention_backward,
)
from drivetrain_kernels.ops.codes import pack_codes, unpack_codes
from drivetrain_kernels.ops.copy import cast_copy, flatten, unflatten
from drivetrain_kernels.ops.decoder import add_rms_norm, gated_activation, rotary_to_cache
from drivetrain_kernels.ops.fake_quantize import fake_quantize
from drivetrain_kernels.ops.lamb import lamb
from drivetrain_kernels.ops.linear import pack_panels, packed_linear, quantized_linear
from drivetrain_kernels.ops.minifloat_linear import minifloat_linear
from drivetrain_kernels.ops.momentum import lion, sgd
from drivetrain_kernels.ops.norm import norm_squared
from drivetrain_kernels.ops.paged_attention import paged_attention
from drivetrain_kernels.ops.pair_linear import pair_linear
from drivetrain_kernels.ops.quantize import dequantize, dequantize_reduce_quantize, quantize
from drivetrain_kernels.ops.signs import mean_signs, pack_signs

__all__ = [
    "BlockLists",
    "Visibility",
    "adagrad",
    "adam",
    "add_rms_norm",
    "block_linear",
    "block_lists",
    "block_sparse_attention",
    "block_sparse_attention_backward",
    "cast_copy",
    "dequantize",
    "dequantize_reduce_quantize",
    "fake_quantize",
    "flatten",
    "gated_activation",
    "lamb",
    "lion",
    "mean_signs",
    "minifloat_linear",
    "norm_squared",
    "pack_codes",
    "pack_panels",
    "pack_signs",
    "packed_linear",
    "paged_attention",
    "pair_linear",
    "quantize",
    "quantized_linear",
    "rotary_to_cache",
    "sgd",
    "unflatten",
    "unpack_codes",
]

"""Drivetrain's operators: declared once with a PyTorch reference, native where a package offers it.

>>> from drivetrain_kernels import adam, implementations
>>> adam(weights, gradient, exp_avg, exp_avg_sq, step=1, lr=1e-3)
>>> implementations()  # what each op uses on each device, and why
"""

from drivetrain_kernels.checks import ArgumentError
from drivetrain_kernels.op import Example, Op, Refusal, Tolerance
from drivetrain_kernels.ops import (
    BlockLists,
    Visibility,
    adagrad,
    adam,
    add_rms_norm,
    block_linear,
    block_lists,
    block_sparse_attention,
    block_sparse_attention_backward,
    cast_copy,
    dequantize,
    dequantize_reduce_quantize,
    flatten,
    gated_activation,
    lamb,
    lion,
    mean_signs,
    minifloat_linear,
    norm_squared,
    pack_panels,
    pack_signs,
    packed_linear,
    paged_attention,
    quantize,
    quantized_linear,
    rotary_to_cache,
    sgd,
    unflatten,
)
from drivetrain_kernels.provider import Provider
from drivetrain_kernels.registry import Implementation, Registry, implementations, ops, registry

__all__ = [
    "ArgumentError",
    "BlockLists",
    "Example",
    "Implementation",
    "Op",
    "Provider",
    "Refusal",
    "Registry",
    "Tolerance",
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
    "flatten",
    "gated_activation",
    "implementations",
    "lamb",
    "lion",
    "mean_signs",
    "minifloat_linear",
    "norm_squared",
    "ops",
    "pack_panels",
    "pack_signs",
    "packed_linear",
    "paged_attention",
    "quantize",
    "quantized_linear",
    "registry",
    "rotary_to_cache",
    "sgd",
    "unflatten",
]

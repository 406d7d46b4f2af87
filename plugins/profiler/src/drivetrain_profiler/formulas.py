"""How many floating-point operations an operator of torch's dispatcher does, by its shapes.

Products of matrices, convolutions and attention count multiplications with additions, two
operations and one MAC each, by the formulas of torch's own counter where it has one. What works
element by element counts one per element of the result, a reduction one per element of its input,
a normalisation five per element. Moves, casts, views, look-ups and random numbers count nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils import flop_counter

_torchs: Any = flop_counter  # torch does not type it

Formula = Callable[..., int]
"""Takes an operator's arguments, and ``out_val``, its result; returns operations."""


class Cost(NamedTuple):
    """Floating-point operations, and multiply-accumulates among them (two operations each)."""

    flops: int = 0
    macs: int = 0

    def plus(self, other: Cost) -> Cost:
        """The sum of both."""
        return Cost(self.flops + other.flops, self.macs + other.macs)


NOTHING = Cost()

_PER_ELEMENT_OF_A_NORM = 5
"""Two for mean and variance, one to centre, one to scale, one for weight and bias."""


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores and values; a causal mask saves nothing here, as in torch's counter."""
    return int(_torchs.sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    shapes = (gradient.shape, query.shape, key.shape, value.shape)
    return int(_torchs.sdpa_backward_flop_count(*shapes))


def _grouped(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """Each row of ``a`` meets one matrix of ``b``; or columns and rows are dealt to groups."""
    if a.dim() == b.dim() == 2:
        return 2 * int(a.shape[0] * a.shape[1] * b.shape[1])
    batch = a.shape[0] if a.dim() == b.dim() == 3 else 1
    return 2 * int(batch * a.shape[-2] * a.shape[-1] * b.shape[-1])


_MORE_PRODUCTS: Mapping[str, Formula] = {
    "_grouped_mm": _grouped,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
    "_scaled_grouped_mm": _grouped,
    "addmv": lambda _bias, matrix, *_, **__: 2 * matrix.numel(),
    "dot": lambda a, *_, **__: 2 * a.numel(),
    "mv": lambda matrix, *_, **__: 2 * matrix.numel(),
    "vdot": lambda a, *_, **__: 2 * a.numel(),
}
"""Products that torch's counter does not know."""

_NORMS = frozenset(
    {
        *("native_layer_norm", "native_layer_norm_backward", "native_group_norm"),
        *("native_group_norm_backward", "native_batch_norm", "native_batch_norm_backward"),
        *("_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_fused_rms_norm"),
        *("_batch_norm_with_update", "batch_norm_backward", "_fused_rms_norm_backward"),
    }
)
_PER_INPUT = frozenset(
    {
        *("sum", "mean", "amax", "amin", "max", "min", "prod", "var", "std", "var_mean", "cumsum"),
        *("_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data"),
        *("logsumexp", "linalg_vector_norm", "nll_loss_forward", "avg_pool2d", "max_pool2d"),
        *("max_pool2d_with_indices", "_adaptive_avg_pool2d", "cumprod", "norm"),
    }
)
_FREE = frozenset(
    {
        *("_to_copy", "copy", "copy_", "clone", "fill", "fill_", "zero", "zero_", "ones_like"),
        *("zeros_like", "bernoulli", "bernoulli_", "native_dropout", "where", "masked_fill"),
        *("masked_fill_", "eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "logical_not"),
        *("logical_and", "logical_or", "bitwise_and", "bitwise_or", "bitwise_not", "normal_"),
        *("uniform_", "rand_like", "randn_like", "scalar_tensor"),
    }
)
_registered: dict[str, Formula] = {}


def register_formula(operator: str, formula: Formula) -> None:
    """Count an operator of your own.

    Args:
        operator: its qualified name, e.g. ``"my_library::fused_mlp"``.
        formula: called with its arguments and ``out_val``, its result; returns floating-point
            operations, two for a multiplication with addition.
    """
    _registered[operator] = formula


def product_of(func: Any) -> Formula | None:
    """The formula of an operator that multiplies matrices; ``None`` for others."""
    packet = func.overloadpacket
    own = _registered.get(func.name().split(".")[0])
    if own is not None:
        return own
    if packet in flop_counter.flop_registry:
        found: Formula = flop_counter.flop_registry[packet]
        return found
    return _MORE_PRODUCTS.get(packet.__name__) if func.namespace == "aten" else None


def cost_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Cost:
    """What one call of an operator costs."""
    product = product_of(func)
    if product is not None:
        flops = product(*args, **kwargs, out_val=result)
        return Cost(flops, flops // 2)
    name = func.overloadpacket.__name__
    if func.namespace != "aten" or name in _FREE:
        return NOTHING
    if name in _NORMS:
        return Cost(_PER_ELEMENT_OF_A_NORM * _numel(args[0]))
    if name in _PER_INPUT:
        return Cost(_numel(args[0]))
    if torch.Tag.pointwise in func.tags:
        return Cost(_numel(result))
    return NOTHING


def is_unknown(func: Any) -> bool:
    """Whether an operator of another library may compute something that nobody can count."""
    foreign = func.namespace not in (
        "aten",
        "prim",
        "prims",
        "c10d",
        "_c10d_functional",
        "profiler",
    )
    return foreign and product_of(func) is None


def _numel(found: Any) -> int:
    if isinstance(found, torch.Tensor):
        return found.numel() if found.is_floating_point() or found.is_complex() else 0
    if isinstance(found, (tuple, list)) and found:
        return _numel(found[0])
    return 0

"""Operators on tensors of which each rank has a part: those that need no other rank's part.

Each takes an operator, its arguments and keywords, and returns what it returns, or
``NotImplemented`` where it has to read all of a tensor. Beside lazy tensors there may be plain
ones, which are the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from drivetrain.contracts import Purpose, Tag
from drivetrain_tensor.lazy_tensor import LazyTensor

_aten = torch.ops.aten
_SUMS = Tag(Purpose.GRADIENT, site="tensor parallel sum over parts")

Handler = Callable[[Any, Any, Any], Any]


def on_parts(func: Any, args: Any, kwargs: Any) -> Any:
    """What ``func`` returns, computed from parts, or ``NotImplemented``."""
    handler = _HANDLERS.get(func.overloadpacket)
    if handler is not None:
        return handler(func, args, kwargs)
    return _elementwise(func, args, kwargs) if torch.Tag.pointwise in func.tags else NotImplemented


def _like(x: LazyTensor, part: torch.Tensor, cut: int | None = None) -> LazyTensor:
    return LazyTensor(part, x.cut if cut is None else cut, x.parts)


def _first(args: Any, kwargs: Any) -> LazyTensor:
    lazy: LazyTensor = next(
        leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, LazyTensor)
    )
    return lazy


def _own(leaf: Any, x: LazyTensor) -> Any:
    """This rank's part of an operand that is broadcast with ``x``, or ``NotImplemented``."""
    if not isinstance(leaf, torch.Tensor) or not leaf.dim():
        return leaf
    at = x.cut - x.dim()  # counted from the right, as dimensions are broadcast
    if isinstance(leaf, LazyTensor):
        same = leaf.cut - leaf.dim() == at and leaf.parts.extent == x.parts.extent
        same = same and leaf.parts.start == x.parts.start
        return leaf.part if same else NotImplemented
    if leaf.dim() < -at or leaf.shape[at] == 1:
        return leaf
    if leaf.shape[at] != x.parts.extent:
        return NotImplemented
    return leaf.narrow(at, x.parts.start, x.part.shape[x.cut])


def _elementwise(func: Any, args: Any, kwargs: Any) -> Any:
    """Operators on each number."""
    x = _first(args, kwargs)
    own = tree_map(lambda leaf: _own(leaf, x), (args, kwargs))
    if any(leaf is NotImplemented for leaf in tree_leaves(own)):
        return NotImplemented
    if func._schema.is_mutable:
        if not isinstance(args[0], LazyTensor):
            return NotImplemented
        func(*own[0], **own[1])
        return args[0]
    at = x.cut - x.dim()
    return tree_map(lambda part: _like(x, part, part.dim() + at), func(*own[0], **own[1]))


def _made_alike(func: Any, args: Any, kwargs: Any) -> Any:
    """``empty_like`` and others."""
    if not isinstance(args[0], LazyTensor):
        return NotImplemented
    return _like(args[0], func(args[0].part, *args[1:], **kwargs))


def _drawn(func: Any, args: Any, kwargs: Any) -> Any:
    """Random numbers of the whole, of which this rank has its part: the same however it is cut."""
    x = args[0]
    whole = x.part.new_empty(x.shape)
    func(whole, *args[1:], **kwargs)
    x.part.copy_(whole.narrow(x.cut, x.parts.start, x.part.shape[x.cut]))
    return x


def _dropout(func: Any, args: Any, kwargs: Any) -> Any:
    """``native_dropout``, with a mask that is drawn for the whole."""
    x, p, train = args
    if train is False:
        return _like(x, x.part.clone()), _like(x, torch.ones_like(x.part, dtype=torch.bool))
    whole = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p)
    mask = whole.narrow(x.cut, x.parts.start, x.part.shape[x.cut]).clone()
    scaled = x.part * mask * (1 / (1 - p) if p < 1 else 0.0)
    return _like(x, scaled), _like(x, mask)


# -- shapes ----------------------------------------------------------------------------------------


def _reshaped(func: Any, args: Any, kwargs: Any) -> Any:
    """Views that leave the dimension that is cut as it is."""
    if func is _aten.view.dtype:
        return NotImplemented
    x, size = args[0], list(args[1])
    if -1 in size:
        rest = -prod(size)
        size[size.index(-1)] = x.numel() // rest if rest else 0
    before = prod(x.shape[: x.cut])
    for at, extent in enumerate(size):
        if extent == x.parts.extent and prod(size[:at]) == before:
            size[at] = x.part.shape[x.cut]
            return _like(x, x.part.reshape(size), at)
    return NotImplemented


def _expanded(func: Any, args: Any, kwargs: Any) -> Any:
    x, size = args[0], list(args[1])
    at = x.cut - x.dim()
    if size[at] not in (-1, x.parts.extent):
        return NotImplemented
    size[at] = x.part.shape[x.cut]
    return _like(x, func(x.part, size, **kwargs), len(size) + at)


def _sliced(func: Any, args: Any, kwargs: Any) -> Any:
    """``slice`` along another dimension than that which is cut."""
    x, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0))
    if dim % x.dim() == x.cut:
        return NotImplemented
    return _like(x, func(x.part, *args[1:], **kwargs))


def _selected(func: Any, args: Any, kwargs: Any) -> Any:
    """``select`` along another dimension than that which is cut."""
    x, dim = args[0], args[1] % args[0].dim()
    if dim == x.cut:
        return NotImplemented
    return _like(x, func(x.part, *args[1:], **kwargs), x.cut - (dim < x.cut))


def _unsqueezed(func: Any, args: Any, kwargs: Any) -> Any:
    x, dim = args[0], args[1] % (args[0].dim() + 1)
    return _like(x, func(x.part, dim), x.cut + (dim <= x.cut))


def _squeezed(func: Any, args: Any, kwargs: Any) -> Any:
    if func is not _aten.squeeze.dim or args[1] % args[0].dim() == args[0].cut:
        return NotImplemented
    x, dim = args[0], args[1] % args[0].dim()
    part = func(x.part, dim)
    return _like(x, part, x.cut - (part.dim() < x.dim() and dim < x.cut))


def _gradient_of_slice(func: Any, args: Any, kwargs: Any) -> Any:
    """Gradients of ``slice`` and ``select``, with the shape of what was cut."""
    gradient, sizes, dim = args[0], list(args[1]), args[2] % len(args[1])
    is_slice = func.overloadpacket is _aten.slice_backward
    at = gradient.cut + (0 if is_slice else dim <= gradient.cut)
    if dim == at or sizes[at] != gradient.parts.extent:
        return NotImplemented
    sizes[at] = gradient.part.shape[gradient.cut]
    return _like(gradient, func(gradient.part, sizes, *args[2:], **kwargs), at)


def _transposed(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    first, second = (d % x.dim() for d in args[1:3])
    at = {first: second, second: first}.get(x.cut, x.cut)
    return _like(x, func(x.part, first, second), at)


def _permuted(func: Any, args: Any, kwargs: Any) -> Any:
    x, dims = args[0], [d % args[0].dim() for d in args[1]]
    return _like(x, func(x.part, dims), dims.index(x.cut))


def _indexed(func: Any, args: Any, kwargs: Any) -> Any:
    """``x[mask]`` and ``x[rows]``, where the last dimension is cut."""
    x, indices = args[0], args[1]
    if not _leave_last(x, indices):
        return NotImplemented
    part = func(x.part, indices)
    return _like(x, part, part.dim() - 1)


def _put(func: Any, args: Any, kwargs: Any) -> Any:
    """The gradient of :func:`_indexed`: rows of zeros, to which those that were taken are added."""
    x, indices, values = args[:3]
    both = isinstance(x, LazyTensor) and isinstance(values, LazyTensor)
    if not both or not _leave_last(x, indices) or values.cut != values.dim() - 1:
        return NotImplemented
    found = func(x.part, indices, values.part, *args[3:], **kwargs)
    return x if func._schema.is_mutable else _like(x, found)


def _zeros(func: Any, args: Any, kwargs: Any) -> Any:
    """``new_zeros``; parts of zeros are right for whatever has as long a dimension."""
    x, size = args[0], list(args[1])
    if not size or size[-1] != x.parts.extent or x.cut != x.dim() - 1:
        return NotImplemented
    size[-1] = x.part.shape[-1]
    return _like(x, func(x.part, size, **kwargs), len(size) - 1)


def _leave_last(x: LazyTensor, indices: Sequence[torch.Tensor | None]) -> bool:
    """Whether indices are of dimensions before the last one, and that is the one that is cut."""
    if any(index is None or isinstance(index, LazyTensor) for index in indices):
        return False
    masks = (torch.bool, torch.uint8)
    taken = sum(i.dim() if i.dtype in masks else 1 for i in indices if i is not None)
    return x.cut == x.dim() - 1 and taken < x.dim()


# -- norms and sums --------------------------------------------------------------------------------


def _reduced(func: Any, args: Any, kwargs: Any) -> Any:
    """``sum``, ``mean`` and others along dimensions; a sum along the one that is cut is shared."""
    x = args[0]
    given = args[1] if len(args) > 1 else kwargs.get("dim")
    if isinstance(given, int):
        given = [given]
    if func.overloadpacket is _aten.sum and (not given or x.cut in {d % x.dim() for d in given}):
        return _summed(x, func(x.part, *args[1:], **kwargs))
    if not given or x.cut in {d % x.dim() for d in given}:
        return NotImplemented
    dims = {d % x.dim() for d in given}
    at = x.cut - x.dim()
    found = func(x.part, *args[1:], **kwargs)
    gone = sum(d > x.cut for d in dims)
    return tree_map(
        lambda part: _like(x, part, part.dim() + at + (0 if part.dim() == x.dim() else gone)),
        found,
    )


def _summed(x: LazyTensor, terms: torch.Tensor) -> torch.Tensor:
    """The sum over ranks: of the terms of a weight's gradient, for example."""
    total = terms.contiguous()
    x.parts.tp.communicator.all_reduce(total, x.parts.tp.axis, _SUMS)
    return total


def _normalized(func: Any, args: Any, kwargs: Any) -> Any:
    """Norms over the last dimensions: (result, statistics ...)."""
    x, shape = args[0], args[1]
    if not isinstance(x, LazyTensor) or x.cut >= x.dim() - len(shape):
        return NotImplemented
    if any(isinstance(leaf, LazyTensor) for leaf in tree_leaves((args[1:], kwargs))):
        return NotImplemented
    return tree_map(lambda part: _like(x, part), func(x.part, *args[1:], **kwargs))


def _gradient_of_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """Gradients of the input, of which each rank has a part, and of weights, which are summed."""
    x, shape = args[1], args[2]
    if not isinstance(x, LazyTensor) or x.cut >= x.dim() - len(shape):
        return NotImplemented
    own = [
        _own(leaf, x) if isinstance(leaf, LazyTensor) or leaf is args[0] else leaf for leaf in args
    ]
    if any(leaf is NotImplemented for leaf in own):
        return NotImplemented
    of_input, *of_weights = func(*own, **kwargs)
    found: list[Any] = [None if of_input is None else _like(x, of_input)]
    return (*found, *(None if g is None else _summed(x, g) for g in of_weights))


_HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys((_aten.alias, _aten.clone, _aten.detach, _aten._to_copy), _elementwise),
    **dict.fromkeys(
        (_aten.empty_like, _aten.zeros_like, _aten.ones_like, _aten.full_like), _made_alike
    ),
    **dict.fromkeys((_aten.view, _aten._unsafe_view, _aten._reshape_alias), _reshaped),
    **dict.fromkeys((_aten.slice_backward, _aten.select_backward), _gradient_of_slice),
    **dict.fromkeys((_aten.index_put, _aten.index_put_, _aten._index_put_impl_), _put),
    **dict.fromkeys((_aten.sum, _aten.mean, _aten.var, _aten.amax, _aten.amin), _reduced),
    **dict.fromkeys((_aten.native_layer_norm, _aten._fused_rms_norm), _normalized),
    **dict.fromkeys(
        (_aten.native_layer_norm_backward, _aten._fused_rms_norm_backward), _gradient_of_norm
    ),
    _aten.bernoulli_: _drawn,
    _aten.native_dropout: _dropout,
    _aten.native_dropout_backward: _elementwise,
    _aten.slice: _sliced,
    _aten.select: _selected,
    _aten.expand: _expanded,
    _aten.unsqueeze: _unsqueezed,
    _aten.squeeze: _squeezed,
    _aten.transpose: _transposed,
    _aten.permute: _permuted,
    _aten.index: _indexed,
    _aten.new_zeros: _zeros,
}

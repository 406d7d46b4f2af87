"""Logits of which each rank has a part, gathered when something reads all of them.

A head that is cut by tokens could gather its logits at once, or tell the model to compute its loss
otherwise. The first sends and keeps what is mostly read by a cross-entropy alone; the second would
have to know every model. So a head returns a tensor that has the shape of all logits and the memory
of a part. Operators that leave tokens apart work on the part, ``cross_entropy`` is that of
Megatron-LM (https://arxiv.org/abs/1909.08053, section 3), and whatever else reads the tensor gets
all logits, so nothing that a model or a script does is wrong, only slower.

What follows a head is computed alike on all ranks, so the gradient of all logits is the same on all
of them, and that of a part is a slice of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from drivetrain.errors import TrainingError
from drivetrain_tensor.cross_entropy import vocab_parallel_cross_entropy

_aten = torch.ops.aten


class TokenParts(Protocol):
    """How logits are shared out over ranks."""

    start: int
    """This rank's first token."""
    extent: int
    """Tokens of the vocabulary."""
    tp: Any
    """Differentiable collectives over the ranks."""

    def assemble(self, part: torch.Tensor) -> torch.Tensor:
        """All logits of the parts [..., v] of all ranks. Collective."""


class LazyLogits(torch.Tensor):
    """Logits of all tokens, of which a part is here. Made by :func:`lazy`.

    Attributes:
        part: those of this rank's tokens, outside of autograd's graph.
        dim_of_tokens: dimension of all logits that the part is a slice along.
        parts: how they are shared out.
    """

    part: torch.Tensor
    dim_of_tokens: int
    parts: TokenParts
    _read: tuple[int, torch.Tensor] | None

    def __new__(cls: type[Self], part: torch.Tensor, dim: int, parts: TokenParts) -> Self:
        shape = list(part.shape)
        shape[dim] = parts.extent
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            tuple(shape),
            strides=_dense_strides(shape, part),
            dtype=part.dtype,
            device=part.device,
        )
        made.part, made.dim_of_tokens, made.parts = part.detach(), dim, parts
        made._read = None
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.cross_entropy:
            found = _cross_entropy(*args, **kwargs)
            if found is not None:
                return found
        if func is torch.Tensor.__setitem__ and isinstance(args[0], LazyLogits):
            return _set(*args)
        if func in _READ_MEMORY:
            args, kwargs = tree_map(whole_logits, (args, kwargs))
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it static
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func.overloadpacket)
        if handler is not None:
            found = handler(func, args, kwargs)
            if found is not NotImplemented:
                return found
        if func._schema.is_mutable:
            return _change(func, args, kwargs)
        args, kwargs = tree_map(_all, (args, kwargs))
        found = func(*args, **kwargs)
        return tree_map(ViewOfAll, found) if _is_view(func) else found


class ViewOfAll(torch.Tensor):
    """A view of logits that have been gathered, which cannot be changed: the parts would not be.

    Attributes:
        read: the plain view.
    """

    read: torch.Tensor

    def __new__(cls: type[Self], read: torch.Tensor) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls, read.shape, strides=read.stride(), dtype=read.dtype, device=read.device
        )
        made.read = read
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READ_MEMORY:
            args, kwargs = tree_map(_plain, (args, kwargs or {}))
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it static
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, ViewOfAll) for leaf in tree_leaves(_written(func, args, kwargs))):
            raise TrainingError(
                f"{func} changes some tokens of logits in place, through a view, while each rank "
                "has a part of them: write logits[...] = values, or set "
                "tensor_parallel.vocabulary_loss to false"
            )
        take = lambda leaf: leaf.read if isinstance(leaf, ViewOfAll) else leaf  # noqa: E731
        found = func(*tree_map(take, args), **tree_map(take, kwargs))
        return tree_map(ViewOfAll, found) if _is_view(func) else found


def lazy(part: torch.Tensor, parts: TokenParts) -> torch.Tensor:
    """All logits, given this rank's part [..., v]."""
    made: torch.Tensor = _Lazy.apply(part, parts)  # type: ignore[no-untyped-call]
    return made


def whole_logits(x: Any) -> Any:
    """A plain tensor in place of lazy logits; anything else as it is. Collective."""
    if not isinstance(x, LazyLogits):
        return x
    parts, dim = x.parts, x.dim_of_tokens
    part: torch.Tensor = _Part.apply(x)  # type: ignore[no-untyped-call]
    return parts.assemble(part.movedim(dim, -1)).movedim(-1, dim)


class _Lazy(torch.autograd.Function):
    """Part to lazy logits."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, parts: TokenParts, dim: int = -1) -> Any:
        ctx.extent, ctx.parts, ctx.dim = part.shape[dim], parts, dim % part.dim()
        return LazyLogits(part, ctx.dim, parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gradient = gradients[0]
        if isinstance(gradient, LazyLogits) and gradient.dim_of_tokens == ctx.dim:
            return _Part.apply(gradient), None, None  # type: ignore[no-untyped-call]
        return whole_logits(gradient).narrow(ctx.dim, ctx.parts.start, ctx.extent), None, None


class _Part(torch.autograd.Function):
    """Lazy logits to the part."""

    @staticmethod
    def forward(ctx: Any, x: LazyLogits) -> torch.Tensor:
        ctx.parts, ctx.dim = x.parts, x.dim_of_tokens
        return x.part.view_as(x.part)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return _Lazy.apply(gradients[0], ctx.parts, ctx.dim)  # type: ignore[no-untyped-call]


def _dense_strides(shape: Sequence[int], part: torch.Tensor) -> tuple[int, ...]:
    """Strides of a dense tensor whose dimensions lie in the order of those of ``part``."""
    strides, step = [0] * len(shape), 1
    for d in sorted(range(len(shape)), key=lambda d: (part.stride(d), -d)):
        strides[d], step = step, step * max(1, shape[d])
    return tuple(strides)


# -- what reads tokens -----------------------------------------------------------------------------

_READ_MEMORY = {
    torch.Tensor.numpy,
    torch.Tensor.tolist,
    torch.Tensor.item,
    torch.Tensor.data_ptr,
    torch.Tensor.__array__,
    torch.Tensor.__repr__,
    torch.Tensor.__format__,
    torch.Tensor.__deepcopy__,
    torch.Tensor.__reduce_ex__,
    torch.Tensor.untyped_storage,
}
"""Functions that look at memory past all operators."""


def _all(x: Any) -> Any:
    """A plain tensor in place of lazy logits, inside of an operator. Collective.

    It is kept until the part changes, as scripts that read logits read them several times.
    """
    if not isinstance(x, LazyLogits):
        return x
    version = x.part._version
    if x._read is None or x._read[0] != version:
        with torch.no_grad():
            found = x.parts.assemble(x.part.movedim(x.dim_of_tokens, -1))
        x._read = (version, found.movedim(-1, x.dim_of_tokens))
    return x._read[1]


def _is_view(func: Any) -> bool:
    """Whether what an operator returns lies in the memory of what it is given."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Arguments that an operator changes."""
    return [
        kwargs.get(a.name) if number >= len(args) else args[number]
        for number, a in enumerate(func._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]


def _set(x: LazyLogits, index: Any, values: Any) -> None:
    """``x[index] = values``, whichever tokens that is about."""
    changed = whole_logits(x).clone()
    changed[index] = values
    x.copy_(changed)


class _Plain(torch.autograd.Function):
    """A view of all logits to a plain tensor."""

    @staticmethod
    def forward(ctx: Any, x: ViewOfAll) -> torch.Tensor:
        return x.read.view_as(x.read)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0]


def _plain(x: Any) -> Any:
    """A plain tensor in place of one whose memory cannot be looked at."""
    return _Plain.apply(x) if isinstance(x, ViewOfAll) else whole_logits(x)  # type: ignore[no-untyped-call]


def _change(func: Any, args: Any, kwargs: Any) -> Any:
    """An operator that changes lazy logits, or something else from what it reads in them."""
    read: dict[int, torch.Tensor] = {}

    def plain(x: Any) -> Any:
        if not isinstance(x, LazyLogits):
            return x
        if id(x) not in read:
            read[id(x)] = _all(x).clone()  # as what was gathered may be in use
        return read[id(x)]

    written = tree_leaves(_written(func, args, kwargs))
    leaves = [leaf for leaf in written if isinstance(leaf, LazyLogits)]
    result = func(*tree_map(plain, args), **tree_map(plain, kwargs))
    for x in leaves:
        own = read[id(x)].narrow(x.dim_of_tokens, x.parts.start, x.part.shape[x.dim_of_tokens])
        x.part.copy_(own)
    returned = {id(plain): x for x in leaves for plain in (read[id(x)],)}
    return tree_map(lambda leaf: returned.get(id(leaf), leaf), result)


def _cross_entropy(
    x: Any,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor | None:
    """``torch.nn.functional.cross_entropy``, or ``None`` where that has to read all logits."""
    classes = 1 if isinstance(x, LazyLogits) and x.dim() > 1 else 0
    indices = not target.is_floating_point()  # else they are probabilities
    plain = weight is None and size_average is None and reduce is None and not label_smoothing
    if not isinstance(x, LazyLogits) or x.dim_of_tokens != classes or not (plain and indices):
        return None
    if reduction not in ("none", "mean", "sum"):
        return None
    if target.shape != x.shape[:classes] + x.shape[classes + 1 :]:
        return None  # torch says what is wrong
    parts = x.parts
    part: torch.Tensor = _Part.apply(x)  # type: ignore[no-untyped-call]
    losses = vocab_parallel_cross_entropy(
        part.movedim(classes, -1),
        target,
        parts.start,
        parts.tp,
        ignore_index,
        vocabulary=parts.extent,
    )
    if reduction != "none":
        losses = losses.sum()
    if reduction == "mean":
        losses = losses / (target != ignore_index).sum()
    return losses.to(x.dtype)


# -- what leaves tokens apart ----------------------------------------------------------------------

Handler = Callable[[Any, Any, Any], Any]


def _like(x: LazyLogits, part: torch.Tensor, dim: int | None = None) -> LazyLogits:
    return LazyLogits(part, x.dim_of_tokens if dim is None else dim, x.parts)


def _elementwise(func: Any, args: Any, kwargs: Any) -> Any:
    """Operators on each number, with others on single numbers or on logits that lie alike."""
    leaves = tree_leaves((args, kwargs))
    logits = [leaf for leaf in leaves if isinstance(leaf, LazyLogits)]
    first = logits[0]
    for leaf in leaves:
        if isinstance(leaf, LazyLogits):
            if leaf.shape != first.shape or leaf.dim_of_tokens != first.dim_of_tokens:
                return NotImplemented
        elif isinstance(leaf, torch.Tensor) and leaf.dim():
            return NotImplemented
    changed = func._schema.is_mutable
    if changed and not isinstance(args[0], LazyLogits):
        return NotImplemented
    take = lambda leaf: leaf.part if isinstance(leaf, LazyLogits) else leaf  # noqa: E731
    found = func(*tree_map(take, args), **tree_map(take, kwargs))
    return args[0] if changed else _like(first, found)


def _reshaped(func: Any, args: Any, kwargs: Any) -> Any:
    """Views that keep tokens along the last dimension."""
    if func is _aten.view.dtype:
        return NotImplemented
    x, size = args[0], list(args[1])
    if -1 in size:
        rest = -1 * torch.Size(size).numel()
        size[size.index(-1)] = x.numel() // rest if rest else 0
    if x.dim_of_tokens != x.dim() - 1 or not size or size[-1] != x.parts.extent:
        return NotImplemented
    part = x.part.reshape(*size[:-1], x.part.shape[-1])
    return _like(x, part, len(size) - 1)


def _sliced(func: Any, args: Any, kwargs: Any) -> Any:
    """``slice`` along another dimension than that of tokens."""
    x, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0))
    if dim % x.dim() == x.dim_of_tokens:
        return NotImplemented
    return _like(x, func(x.part, *args[1:], **kwargs))


def _selected(func: Any, args: Any, kwargs: Any) -> Any:
    """``select`` along another dimension than that of tokens."""
    x, dim = args[0], args[1] % args[0].dim()
    if dim == x.dim_of_tokens:
        return NotImplemented
    return _like(x, func(x.part, *args[1:], **kwargs), x.dim_of_tokens - (dim < x.dim_of_tokens))


def _slice_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """Gradients of ``slice`` and ``select``, with the shape of what was cut."""
    gradient, sizes, dim = args[0], list(args[1]), args[2] % len(args[1])
    if not isinstance(gradient, LazyLogits):
        return NotImplemented
    is_slice = func.overloadpacket is _aten.slice_backward
    at = gradient.dim_of_tokens + (0 if is_slice else dim <= gradient.dim_of_tokens)
    if dim == at or sizes[at] != gradient.parts.extent:
        return NotImplemented
    sizes[at] = gradient.part.shape[gradient.dim_of_tokens]
    return _like(gradient, func(gradient.part, sizes, *args[2:], **kwargs), at)


def _transposed(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    first, second = (d % x.dim() for d in args[1:3])
    at = {first: second, second: first}.get(x.dim_of_tokens, x.dim_of_tokens)
    return _like(x, func(x.part, first, second), at)


def _permuted(func: Any, args: Any, kwargs: Any) -> Any:
    x, dims = args[0], [d % args[0].dim() for d in args[1]]
    return _like(x, func(x.part, dims), dims.index(x.dim_of_tokens))


def _indexed(func: Any, args: Any, kwargs: Any) -> Any:
    """``logits[mask]`` and ``logits[rows]``, where tokens are the last dimension."""
    x, indices = args[0], args[1]
    if not _leave_tokens(x, indices):
        return NotImplemented
    part = func(x.part, indices)
    return _like(x, part, part.dim() - 1)


def _put(func: Any, args: Any, kwargs: Any) -> Any:
    """The gradient of :func:`_indexed`: rows of zeros, to which those that were taken are added."""
    x, indices, values = args[:3]
    both = isinstance(x, LazyLogits) and isinstance(values, LazyLogits)
    if not both or not _leave_tokens(x, indices) or values.dim_of_tokens != values.dim() - 1:
        return NotImplemented
    found = func(x.part, indices, values.part, *args[3:], **kwargs)
    return x if func._schema.is_mutable else _like(x, found)


def _zeros(func: Any, args: Any, kwargs: Any) -> Any:
    """``new_zeros`` of logits; parts of zeros are right for whatever has as many tokens."""
    x, size = args[0], list(args[1])
    if not size or size[-1] != x.parts.extent or x.dim_of_tokens != x.dim() - 1:
        return NotImplemented
    size[-1] = x.part.shape[-1]
    return _like(x, func(x.part, size, **kwargs), len(size) - 1)


def _leave_tokens(x: LazyLogits, indices: Sequence[torch.Tensor | None]) -> bool:
    """Whether indices are of dimensions before the last one, and that is the one of tokens."""
    if any(index is None or isinstance(index, LazyLogits) for index in indices):
        return False
    masks = (torch.bool, torch.uint8)
    taken = sum(i.dim() if i.dtype in masks else 1 for i in indices if i is not None)
    return x.dim_of_tokens == x.dim() - 1 and taken < x.dim()


_HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys(
        (
            _aten.add,
            _aten.add_,
            _aten.alias,
            _aten.clone,
            _aten.detach,
            _aten.div,
            _aten.div_,
            _aten.mul,
            _aten.mul_,
            _aten.neg,
            _aten.sub,
            _aten.sub_,
            _aten.tanh,
            _aten.tanh_backward,
            _aten.zeros_like,
            _aten.ones_like,
            _aten._to_copy,
        ),
        _elementwise,
    ),
    **dict.fromkeys((_aten.view, _aten._unsafe_view, _aten._reshape_alias), _reshaped),
    _aten.slice: _sliced,
    _aten.select: _selected,
    _aten.slice_backward: _slice_backward,
    _aten.select_backward: _slice_backward,
    _aten.transpose: _transposed,
    _aten.permute: _permuted,
    _aten.index: _indexed,
    _aten.index_put: _put,
    _aten.index_put_: _put,
    _aten._index_put_impl_: _put,
    _aten.new_zeros: _zeros,
}

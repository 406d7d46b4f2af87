"""Tensors of which each rank has a part, gathered when something reads all of one.

A head that is cut by tokens of the vocabulary could gather its logits at once, or the model be told
to compute its loss otherwise; norms and residuals could be rewritten to have a part of a sequence.
The first sends and keeps what is mostly not read, the others would have to know every model. So
layers return a tensor that has the shape of the whole and the memory of a part. Operators that do
not mix what ranks have work on parts (``lazy_operators``); whatever else reads the tensor gets all
of it. Nothing that a model or a script does with one is wrong, only slower.

The whole is the same on all ranks, and so is its gradient; that of a part is a slice of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch.utils._pytree import tree_leaves, tree_map

from drivetrain.communication.functional import Functional
from drivetrain.contracts import SentInParts
from drivetrain.errors import CommunicationError, TrainingError

if TYPE_CHECKING:
    from drivetrain.contracts import Communicator


class Parts(Protocol):
    """How a dimension is shared out over ranks."""

    start: int
    """Where this rank's part begins."""
    extent: int
    """Length of the whole dimension."""
    tp: Functional
    """The ranks."""
    what: str
    """What such tensors are, and the key that leaves them whole."""
    travels: bool
    """Whether the ranks of another stage of a pipeline can have parts in the same places."""

    def assemble(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        """The whole of the parts of all ranks, whose gradient is the same on all. Collective."""


class LazyTensor(torch.Tensor, SentInParts):
    """A whole tensor of which a part is here; made by :func:`lazy`.

    Attributes:
        part: outside of autograd's graph.
        cut: dimension of the whole that the part is a slice along.
        parts: how that is shared out.
    """

    part: torch.Tensor
    cut: int
    parts: Parts
    _read: tuple[int, torch.Tensor] | None

    def __new__(cls: type[Self], part: torch.Tensor, cut: int, parts: Parts) -> Self:
        shape = list(part.shape)
        shape[cut] = parts.extent
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            tuple(shape),
            strides=_dense_strides(shape, part),
            dtype=part.dtype,
            device=part.device,
        )
        made.part, made.cut, made.parts = part.detach(), cut, parts
        made._read = None
        return made

    def sent(self) -> tuple[torch.Tensor, Mapping[str, int]]:
        """See :class:`~drivetrain.contracts.SentInParts`; logits go whole."""
        if not self.parts.travels:
            whole: torch.Tensor = plain(self)
            return whole, {}
        return part_of(self), {"cut": self.cut, "extent": self.parts.extent}

    @classmethod
    def received(
        cls, part: torch.Tensor, facts: Mapping[str, int], communicator: Communicator
    ) -> torch.Tensor:
        """See :class:`~drivetrain.contracts.SentInParts`."""
        from drivetrain_tensor.sequence import sequence_of  # which names this class

        if not facts:
            return part
        return sequence_of(part, facts["extent"], facts["cut"], communicator)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from drivetrain_tensor.cross_entropy import of_lazy_logits  # which names this class

        kwargs = kwargs or {}
        if func is torch.nn.functional.cross_entropy:
            found = of_lazy_logits(*args, **kwargs)
            if found is not None:
                return found
        if func in _DESCRIBES and isinstance(args[0], LazyTensor):
            return format(_described(args[0]), *args[1:] if func is _FORMAT else ())
        if func is torch.Tensor.__setitem__ and isinstance(args[0], LazyTensor):
            return _set(*args)
        if func in _READ_MEMORY or _changes_another(func, args, kwargs):
            args, kwargs = tree_map(plain, (args, kwargs))
            return func(*args, **kwargs)
        if len(args) > 1 or kwargs:
            args, kwargs = tree_map(_with_plain_gradient, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it static
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        from drivetrain_tensor.lazy_operators import on_parts  # which names this class

        kwargs = kwargs or {}
        found = on_parts(func, args, kwargs)
        if found is not NotImplemented:
            return found
        if func._schema.is_mutable:
            return _change(func, args, kwargs)
        args, kwargs = tree_map(_all, (args, kwargs))
        found = func(*args, **kwargs)
        return tree_map(ViewOfAll, found) if _is_view(func) else found


class ViewOfAll(torch.Tensor):
    """A view of what has been gathered, which cannot be changed: the parts would not be.

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
            args, kwargs = tree_map(plain, (args, kwargs or {}))
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
                f"{func} changes in place, through a view, what each tensor-parallel rank has a "
                "part of: write x[...] = values, or set tensor_parallel.vocabulary_loss (of "
                "logits) or tensor_parallel.sequence_parallel (of hidden states) to false"
            )
        take = lambda leaf: leaf.read if isinstance(leaf, ViewOfAll) else leaf  # noqa: E731
        found = func(*tree_map(take, args), **tree_map(take, kwargs))
        return tree_map(ViewOfAll, found) if _is_view(func) else found


# -- between parts, wholes and autograd ------------------------------------------------------------


def lazy(part: torch.Tensor, parts: Parts, dim: int = -1) -> torch.Tensor:
    """A whole tensor, given this rank's part of it along ``dim``."""
    made: torch.Tensor = _Lazy.apply(part, parts, dim % part.dim())  # type: ignore[no-untyped-call]
    return made


def part_of(x: LazyTensor) -> torch.Tensor:
    """This rank's part, in autograd's graph."""
    part: torch.Tensor = _Part.apply(x)  # type: ignore[no-untyped-call]
    return part


def plain(x: Any) -> Any:
    """A plain tensor in place of one of which there is a part; others as they are. Collective."""
    if isinstance(x, ViewOfAll):
        return _Plain.apply(x)  # type: ignore[no-untyped-call]
    return _assembled(x, part_of(x)) if isinstance(x, LazyTensor) else x


def whole_logits(logits: torch.Tensor) -> torch.Tensor:
    """A plain tensor of all logits that a head returned, whichever ranks have them. Collective."""
    found: torch.Tensor = plain(logits)
    return found


class _Lazy(torch.autograd.Function):
    """Part to whole."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, parts: Parts, dim: int) -> Any:
        ctx.length, ctx.parts, ctx.dim = part.shape[dim], parts, dim
        return LazyTensor(part, dim, parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gradient = gradients[0]
        if isinstance(gradient, LazyTensor) and gradient.cut == ctx.dim:
            return part_of(gradient), None, None
        return plain(gradient).narrow(ctx.dim, ctx.parts.start, ctx.length), None, None


class _Part(torch.autograd.Function):
    """Whole to part."""

    @staticmethod
    def forward(ctx: Any, x: LazyTensor) -> torch.Tensor:
        ctx.parts, ctx.dim = x.parts, x.cut
        return x.part.view_as(x.part)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return lazy(gradients[0], ctx.parts, ctx.dim)


class _Plain(torch.autograd.Function):
    """A view of the whole to a plain tensor."""

    @staticmethod
    def forward(ctx: Any, x: ViewOfAll) -> torch.Tensor:
        return x.read.view_as(x.read)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0]


class _PlainGradient(torch.autograd.Function):
    """The identity, whose gradient is gathered if each rank has a part of it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return plain(gradients[0])


def _with_plain_gradient(x: Any) -> Any:
    """Shield what is no lazy tensor, a parameter above all, from gradients that are."""
    if type(x) in _PLAIN_TYPES and x.requires_grad and x.dim() and torch.is_grad_enabled():
        return _PlainGradient.apply(x)  # type: ignore[no-untyped-call]
    return x


_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def _dense_strides(shape: Sequence[int], part: torch.Tensor) -> tuple[int, ...]:
    """Strides of a dense tensor whose dimensions lie in the order of those of ``part``."""
    strides, step = [0] * len(shape), 1
    for d in sorted(range(len(shape)), key=lambda d: (part.stride(d), -d)):
        strides[d], step = step, step * max(1, shape[d])
    return tuple(strides)


# -- what reads or changes the whole ---------------------------------------------------------------

_READ_MEMORY = {
    torch.Tensor.numpy,
    torch.Tensor.tolist,
    torch.Tensor.item,
    torch.Tensor.__array__,
    torch.Tensor.__deepcopy__,
    torch.Tensor.__reduce_ex__,
}
"""Functions that look at memory past all operators."""

_FORMAT = torch.Tensor.__format__
_DESCRIBES = {torch.Tensor.__repr__, torch.Tensor.__str__, _FORMAT}
"""Functions that print, which scripts do on one rank alone; so they do not communicate."""


def _described(x: LazyTensor) -> str:
    """What is printed of a tensor of which a part is here."""
    stop = x.parts.start + x.part.shape[x.cut]
    return (
        f"tensor(..., size={tuple(x.shape)}, dtype={x.dtype}; {x.parts.what.split(' (')[0]}, of "
        f"which this rank has [{x.parts.start}, {stop}) along dimension {x.cut}, and "
        "drivetrain_tensor.whole_logits, called on all tensor-parallel ranks, all)"
    )


def _assembled(x: LazyTensor, part: torch.Tensor) -> torch.Tensor:
    """All of ``x``. Collective.

    Raises:
        CommunicationError: other ranks do something else; says what to do.
    """
    try:
        return x.parts.assemble(part, x.cut)
    except CommunicationError as error:
        raise CommunicationError(
            f"this rank reads all of {x.parts.what}, of which each tensor-parallel rank has a "
            "part, and the others do not: read it on every rank of axis 'tp', or call "
            "drivetrain_tensor.whole_logits on every rank before one rank alone goes on with it, "
            f"or set that key to false ({error})"
        ) from error


def _changes_another(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a function changes a plain tensor in place, whose own graph has to know."""
    if kwargs.get("out") is not None:
        return True
    name = getattr(func, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
    return in_place and bool(args) and type(args[0]) in _PLAIN_TYPES


def _all(x: Any) -> Any:
    """A plain tensor in place of one of which there is a part, inside of an operator. Collective.

    It is kept until the part changes, as who reads it often reads it several times.
    """
    if not isinstance(x, LazyTensor):
        return x
    version = x.part._version
    if x._read is None or x._read[0] != version:
        with torch.no_grad():
            found = _assembled(x, x.part)
        if found.stride() != x.stride():  # which operators have been told
            found = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(
                found
            )
        x._read = (version, found)
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


def _set(x: LazyTensor, index: Any, values: Any) -> None:
    """``x[index] = values``, whatever that is about."""
    changed = plain(x).clone()
    changed[index] = values
    x.copy_(changed)


def _change(func: Any, args: Any, kwargs: Any) -> Any:
    """An operator that changes a lazy tensor, or something else from what it reads in one."""
    read: dict[int, torch.Tensor] = {}

    def copied(x: Any) -> Any:
        if not isinstance(x, LazyTensor):
            return x
        if id(x) not in read:
            read[id(x)] = _all(x).clone()  # as what was gathered may be in use
        return read[id(x)]

    written = tree_leaves(_written(func, args, kwargs))
    leaves = [leaf for leaf in written if isinstance(leaf, LazyTensor)]
    result = func(*tree_map(copied, args), **tree_map(copied, kwargs))
    for x in leaves:
        x.part.copy_(read[id(x)].narrow(x.cut, x.parts.start, x.part.shape[x.cut]))
    returned = {id(read[id(x)]): x for x in leaves}
    return tree_map(lambda leaf: returned.get(id(leaf), leaf), result)

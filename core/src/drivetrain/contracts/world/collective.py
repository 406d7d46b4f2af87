"""One collective as an object: what travels, along which axis, and whether it fits together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import TYPE_CHECKING

from drivetrain.contracts.world.axis import Axis, SubAxis

if TYPE_CHECKING:
    import torch


class Purpose(Enum):
    """What a collective carries; decorators act on it."""

    WEIGHT = "weight"
    GRADIENT = "gradient"
    ACTIVATION = "activation"
    STATE = "state"
    CONTROL = "control"


@dataclass(frozen=True)
class Tag:
    """Names one collective.

    Args:
        purpose: what travels.
        key: stable identity across steps, e.g. a bucket key; error feedback is kept per key.
        site: where in the program, for logs and error messages.
    """

    purpose: Purpose
    key: str = ""
    site: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.purpose.value, self.key, self.site) if part)


class Op(Enum):
    """Reduction operators."""

    SUM = "sum"
    MAX = "max"
    MIN = "min"


class Kind(StrEnum):
    """The collectives, named like the methods of
    :class:`~drivetrain.contracts.world.communicator.Communicator`.
    """

    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_GATHER = "all_gather"
    BROADCAST = "broadcast"
    ALL_TO_ALL = "all_to_all"
    SEND_RECEIVE = "send_receive"
    BARRIER = "barrier"


@dataclass(slots=True, eq=False)
class Collective:
    """What one rank asks for; it is not changed once made (``dataclasses.replace`` makes another).

    Args:
        kind: which collective.
        tensors: (output, input) where they differ, one tensor where it works in place or goes one
            way, none for a barrier; of a send-receive all that are sent, then all that come.
        axis: over which ranks.
        tag: its name.
        op: how values are combined, where they are.
        asynchronous: whether the tensors are left alone until the handle is waited for.
        peer: position along the axis that a broadcast comes from.
        output_splits: rows of the output that come from each rank; ``None`` for equal shares.
        input_splits: rows of the input that go to each rank; ``None`` for equal shares.
        settled: of an all-gather: every rank's input stays as it is from one other collective of
            the axis to the next, so that whoever can read it where it lies may do so alone.
        peers: of a send-receive: for each tensor the position that it goes to or comes from.
        sends: of a send-receive: how many of the tensors are sent.
    """

    kind: Kind
    tensors: tuple[torch.Tensor, ...]
    axis: Axis
    tag: Tag
    op: Op = Op.SUM
    asynchronous: bool = False
    peer: int = 0
    output_splits: Sequence[int] | None = None
    input_splits: Sequence[int] | None = None
    settled: bool = False
    peers: Sequence[int] = ()
    sends: int = 0

    @property
    def output(self) -> torch.Tensor:
        """The tensor that is written."""
        return self.tensors[0]

    @property
    def input(self) -> torch.Tensor:
        """The tensor that is read; the output itself for collectives in place."""
        return self.tensors[-1]

    def __str__(self) -> str:
        return f"{self.kind} of {self.tag} over {axis_name(self.axis)!r}"

    def flaw(self, size: int, rank: int) -> str | None:
        """What does not fit together on position ``rank`` of ``size`` ranks, if anything.

        Says the same on all ranks that issue the same collective.
        """
        if self.kind is Kind.BARRIER:
            return None
        if self.kind is Kind.SEND_RECEIVE:
            pairs = zip(self.tensors, self.peers, strict=True)
            flaws = (_not_alike((t,)) or _no_peer(peer, size, rank) for t, peer in pairs)
            return next(filter(None, flaws), None)
        return _not_alike(self.tensors) or self._misfit(size)

    def _misfit(self, size: int) -> str | None:
        match self.kind:
            case Kind.ALL_REDUCE:
                return _not_reducible(self.input)
            case Kind.REDUCE_SCATTER:
                misfit = _no_parts(whole=self.input, part=self.output, size=size)
                return _not_reducible(self.input) or misfit
            case Kind.ALL_GATHER:
                return _no_parts(whole=self.output, part=self.input, size=size)
            case Kind.ALL_TO_ALL:
                misfit = _no_rows("input", self.input, self.input_splits, size)
                return misfit or _no_rows("output", self.output, self.output_splits, size)
        return _no_peer(self.peer, size)


def axis_name(axis: Axis) -> str:
    """How messages call an axis."""
    if isinstance(axis, SubAxis):
        return f"{axis_name(axis.axis)}[{','.join(map(str, axis.positions))}]"
    return axis if isinstance(axis, str) else "+".join(axis)


def is_float8(dtype: torch.dtype) -> bool:
    """Whether ``dtype`` is one that no backend reduces; gloo does not even move them."""
    return dtype.itemsize == 1 and dtype.is_floating_point


# -- each says what is wrong, or nothing -----------------------------------------------------------


def _not_alike(tensors: Sequence[torch.Tensor]) -> str | None:
    """Contiguous tensors of one dtype on one device."""
    last = tensors[-1]
    for tensor in tensors:
        if not tensor.is_contiguous():
            shape, stride = tuple(tensor.shape), tensor.stride()
            return f"tensor of shape {shape}, stride {stride} is not contiguous"
        if tensor is last:
            break
        if tensor.dtype != last.dtype or tensor.device != last.device:
            mine, theirs = f"{last.dtype} on {last.device}", f"{tensor.dtype} on {tensor.device}"
            return f"input is {mine}, output is {theirs}"
    return None


def _not_reducible(tensor: torch.Tensor) -> str | None:
    if is_float8(tensor.dtype):
        return f"{tensor.dtype} cannot be reduced; cast it to bfloat16 first"
    return None


def _no_peer(peer: int, size: int, rank: int | None = None) -> str | None:
    if not 0 <= peer < size:
        return f"there is no position {peer} among {size} ranks"
    return f"position {peer} is this rank itself" if peer == rank else None


def _no_parts(*, whole: torch.Tensor, part: torch.Tensor, size: int) -> str | None:
    numel = part.numel()
    if whole.numel() == numel * size:
        return None
    return (
        f"shapes {tuple(whole.shape)} and {tuple(part.shape)} do not fit: expected {size} "
        f"ranks x {numel} = {size * numel} elements, got {whole.numel()}"
    )


def _no_rows(
    which: str, tensor: torch.Tensor, splits: Sequence[int] | None, size: int
) -> str | None:
    shape = tuple(tensor.shape)
    if splits is None:
        if not shape or shape[0] % size:
            return f"{which} of shape {shape} has no {size} equal slices"
    elif len(splits) != size or sum(splits) != shape[0]:
        return (
            f"{which} of shape {shape} cannot be cut into {list(splits)}: expected {size} "
            f"splits that add up to {shape[0]}"
        )
    return None

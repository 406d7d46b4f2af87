"""Collectives over ``torch.distributed``: the innermost communicator.

On the meta device a collective checks its arguments and does nothing else, so that a job of any
size can be walked through on one machine. Over axes of one rank no process group is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist

from drivetrain.communicator import Communicator, Handle, Op, Tag
from drivetrain.errors import CommunicationError
from drivetrain.failure import broken
from drivetrain.mesh_layout import Axis, SubAxis

if TYPE_CHECKING:
    from drivetrain.failure import FailureBoard
    from drivetrain.mesh import Mesh

_REDUCE_OPS = {
    Op.SUM: dist.ReduceOp.SUM,
    Op.MAX: dist.ReduceOp.MAX,
    Op.MIN: dist.ReduceOp.MIN,
}

# torch 2.13 renamed these two and warns of the old names; 2.11 has only those.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

# No backend reduces these, and gloo does not even move them; they travel as bytes.
_FLOAT8 = frozenset(
    {
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    }
)


class _Done:
    """The handle of a collective that is finished."""

    def wait(self) -> None:
        pass


_DONE = _Done()


@dataclass(frozen=True)
class _Line:
    """What a collective needs to know of its axis.

    Args:
        name: of the axis, for messages.
        size: number of ranks along it.
        rank: this rank's position.
        group: process group; ``None`` for one rank and on the meta device.
        exchanges: whether reduce-scatter is an exchange and a local sum; see
            :meth:`TorchCommunicator.reduce_scatter`.
    """

    name: str
    size: int
    rank: int
    group: dist.ProcessGroup | None
    exchanges: bool


class _Pending:
    """A collective under way in torch.

    Args:
        work: torch's handle.
        call: what it belongs to.
        finish: what remains to be done when the data has arrived.
    """

    def __init__(self, work: Any, call: _Call, finish: Callable[[], object] | None) -> None:
        self._work = work
        self._call = call
        self._finish = finish

    def wait(self) -> None:
        if self._work is None:
            return
        try:
            self._work.wait()
        except RuntimeError as error:
            raise self._call.explain(error) from error
        if self._finish is not None:
            self._finish()
        # Repeated waits are allowed and must not finish twice; tensors need not be held longer.
        self._work = self._finish = None


class _Call:
    """One collective: what it demands of its arguments, how it runs, how it breaks."""

    def __init__(self, what: str, line: _Line, tag: Tag, failures: FailureBoard | None) -> None:
        self.line = line
        self._what = what
        self._tag = tag
        self._failures = failures

    def run(
        self,
        asynchronous: bool,
        collective: Callable[..., Any],
        *tensors: Any,
        finish: Callable[[], object] | None = None,
        **options: Any,
    ) -> Handle:
        """Call a function of ``torch.distributed``, then ``finish`` when it is waited for."""
        if self.line.group is None:
            return _DONE
        if collective not in (dist.isend, dist.irecv):
            options["async_op"] = True
        try:
            work = collective(*tensors, group=self.line.group, **options)
        except RuntimeError as error:
            raise self.explain(error) from error
        pending = _Pending(work, self, finish)
        if asynchronous:
            return pending
        pending.wait()
        return _DONE

    def copy(self, output: torch.Tensor, input: torch.Tensor) -> Handle:
        """What there is to do without a group: one rank copies; on the meta device, nothing."""
        if self.line.size == 1 and output.data_ptr() != input.data_ptr():
            output.view(-1).copy_(input.view(-1))
        return _DONE

    def explain(self, error: RuntimeError) -> CommunicationError:
        """Our exception for torch's."""
        return (broken if self._failures is None else self._failures.explain)(self._title, error)

    def refuse(self, reason: str) -> NoReturn:
        """Raise for arguments that do not fit."""
        raise CommunicationError(f"{self._title}: {reason}")

    def need_alike(self, first: torch.Tensor, *others: torch.Tensor) -> None:
        """Contiguous tensors of one dtype on one device."""
        for tensor in (first, *others):
            if not tensor.is_contiguous():
                shape, stride = tuple(tensor.shape), tensor.stride()
                self.refuse(f"tensor of shape {shape}, stride {stride} is not contiguous")
            if tensor.dtype != first.dtype or tensor.device != first.device:
                mine, theirs = (
                    f"{first.dtype} on {first.device}",
                    f"{tensor.dtype} on {tensor.device}",
                )
                self.refuse(f"input is {mine}, output is {theirs}")

    def need_reducible(self, tensor: torch.Tensor) -> None:
        """A dtype that can be added up."""
        if tensor.dtype in _FLOAT8:
            self.refuse(f"{tensor.dtype} cannot be reduced; cast it to bfloat16 first")

    def need_parts(self, *, whole: torch.Tensor, part: torch.Tensor) -> None:
        """A whole of as many parts as there are ranks."""
        size, numel = self.line.size, part.numel()
        if whole.numel() != numel * size:
            self.refuse(
                f"shapes {tuple(whole.shape)} and {tuple(part.shape)} do not fit: expected {size} "
                f"ranks x {numel} = {size * numel} elements, got {whole.numel()}"
            )

    def need_rows(self, which: str, tensor: torch.Tensor, splits: Sequence[int] | None) -> None:
        """A first dimension that can be cut evenly, or as ``splits`` say."""
        shape, size = tuple(tensor.shape), self.line.size
        if splits is None:
            if not shape or shape[0] % size:
                self.refuse(f"{which} of shape {shape} has no {size} equal slices")
        elif len(splits) != size or sum(splits) != shape[0]:
            self.refuse(
                f"{which} of shape {shape} cannot be cut into {list(splits)}: expected {size} "
                f"splits that add up to {shape[0]}"
            )

    def need_position(self, position: int) -> None:
        """A position of the axis."""
        if not 0 <= position < self.line.size:
            self.refuse(f"there is no position {position} among {self.line.size} ranks")

    @property
    def _title(self) -> str:
        return f"{self._what} of {self._tag} over {self.line.name!r} ({self.line.size} ranks)"


class TorchCommunicator(Communicator):
    """Collectives over the process groups of a mesh.

    Every method raises :class:`CommunicationError`, naming collective, tag and axis, when tensors
    do not fit together or when the collective breaks; in the second case also the rank that failed
    and its error, where they are known.

    Args:
        mesh: the job's axes.
        device: where :meth:`buffer` allocates.
        failures: tells why a collective broke; ``None`` for a job of one rank.
    """

    def __init__(
        self, mesh: Mesh, device: torch.device, failures: FailureBoard | None = None
    ) -> None:
        self._mesh = mesh
        self._device = device
        self._failures = failures
        self._lines: dict[tuple[Axis, bool], _Line] = {}

    def size(self, axis: Axis) -> int:
        return self._mesh.size(axis)

    def rank(self, axis: Axis) -> int:
        return self._mesh.coordinate(axis)

    def all_reduce(
        self,
        tensor: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        op: Op = Op.SUM,
        asynchronous: bool = False,
    ) -> Handle:
        call = self._call("all_reduce", axis, tag, tensor)
        call.need_reducible(tensor)
        return call.run(asynchronous, dist.all_reduce, tensor, _REDUCE_OPS[op])

    def reduce_scatter(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        op: Op = Op.SUM,
        asynchronous: bool = False,
    ) -> Handle:
        call = self._call("reduce_scatter", axis, tag, input, output)
        call.need_reducible(input)
        call.need_parts(whole=input, part=output)
        if call.line.group is None:
            return call.copy(output, input.view(-1)[: output.numel()])
        if not call.line.exchanges:
            return call.run(asynchronous, _reduce_scatter, output, input, _REDUCE_OPS[op])
        # gloo reduces the whole input on every rank and keeps a slice. Exchanging slices and
        # adding them up here moves half as much, and adds bf16 and fp16 in fp32.
        received = torch.empty_like(input)
        rows = received.view(call.line.size, -1)
        finish = partial(_reduce_rows, output.view(-1), rows, op)
        return call.run(asynchronous, dist.all_to_all_single, received, input, finish=finish)

    def all_gather(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        asynchronous: bool = False,
    ) -> Handle:
        call = self._call("all_gather", axis, tag, input, output)
        call.need_parts(whole=output, part=input)
        if call.line.group is None:
            return call.copy(output, input)
        return call.run(asynchronous, _all_gather, _movable(output), _movable(input))

    def broadcast(
        self,
        tensor: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        source: int = 0,
        asynchronous: bool = False,
    ) -> Handle:
        call = self._call("broadcast", axis, tag, tensor)
        call.need_position(source)
        return call.run(asynchronous, dist.broadcast, _movable(tensor), group_src=source)

    def all_to_all(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        asynchronous: bool = False,
    ) -> Handle:
        call = self._call("all_to_all", axis, tag, input, output)
        call.need_rows("input", input, input_splits)
        call.need_rows("output", output, output_splits)
        if call.line.group is None:
            return call.copy(output, input)
        splits = [None if rows is None else list(rows) for rows in (output_splits, input_splits)]
        return call.run(
            asynchronous, dist.all_to_all_single, _movable(output), _movable(input), *splits
        )

    def send(
        self, tensor: torch.Tensor, axis: Axis, tag: Tag, *, to: int, asynchronous: bool = False
    ) -> Handle:
        call = self._peer_call("send", tensor, axis, tag, to)
        return call.run(asynchronous, dist.isend, _movable(tensor), group_dst=to)

    def receive(
        self, tensor: torch.Tensor, axis: Axis, tag: Tag, *, source: int, asynchronous: bool = False
    ) -> Handle:
        call = self._peer_call("receive", tensor, axis, tag, source)
        return call.run(asynchronous, dist.irecv, _movable(tensor), group_src=source)

    def barrier(self, axis: Axis, tag: Tag) -> None:
        # An all-reduce works on every backend without being told a device.
        self.all_reduce(torch.zeros(1, device=self._device), axis, tag)
        if self._device.type not in ("cpu", "meta"):
            torch.get_device_module(self._device.type).synchronize()

    def buffer(self, numel: int, dtype: torch.dtype, axis: Axis) -> torch.Tensor:
        return torch.zeros(numel, dtype=dtype, device=self._device)

    def close(self) -> None:
        """Let go of all process groups: while one is held, its connections stay open."""
        self._lines.clear()

    def _line(self, axis: Axis, tensor: torch.Tensor) -> _Line:
        key = (axis, tensor.is_meta)
        line = self._lines.get(key)
        if line is None:
            group = None if tensor.is_meta else self._mesh.group(axis)
            line = self._lines[key] = _Line(
                name=_name(axis),
                size=self._mesh.size(axis),
                rank=self._mesh.coordinate(axis),
                group=group,
                exchanges=group is not None and dist.get_backend(group) == dist.Backend.GLOO,
            )
        return line

    def _call(self, what: str, axis: Axis, tag: Tag, *tensors: torch.Tensor) -> _Call:
        call = _Call(what, self._line(axis, tensors[0]), tag, self._failures)
        call.need_alike(*tensors)
        return call

    def _peer_call(self, what: str, tensor: torch.Tensor, axis: Axis, tag: Tag, peer: int) -> _Call:
        call = self._call(what, axis, tag, tensor)
        call.need_position(peer)
        if peer == call.line.rank:
            call.refuse(f"position {peer} is this rank itself")
        return call


def _name(axis: Axis) -> str:
    if isinstance(axis, SubAxis):
        return f"{_name(axis.axis)}[{','.join(map(str, axis.positions))}]"
    return axis if isinstance(axis, str) else "+".join(axis)


def _movable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype in _FLOAT8 else tensor


def _reduce_rows(output: torch.Tensor, rows: torch.Tensor, op: Op) -> None:
    """Reduce ``rows`` [ranks, n] into ``output`` [n]."""
    if op is Op.SUM:
        torch.sum(rows, dim=0, dtype=rows.dtype, out=output)
    else:
        (torch.amax if op is Op.MAX else torch.amin)(rows, dim=0, out=output)

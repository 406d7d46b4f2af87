"""Collectives over ``torch.distributed``: the innermost communicator.

On the meta device a collective checks its arguments and does nothing else, so that a job of any
size can be walked through on one machine. Over axes of one rank no process group is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
        explain: turns torch's error into ours.
        finish: what remains to be done when the data has arrived.
    """

    def __init__(
        self,
        work: Any,
        explain: Callable[[RuntimeError], CommunicationError],
        finish: Callable[[], object] | None,
    ) -> None:
        self._work = work
        self._explain = explain
        self._finish = finish

    def wait(self) -> None:
        if self._work is None:
            return
        try:
            self._work.wait()
        except RuntimeError as error:
            raise self._explain(error) from error
        if self._finish is not None:
            self._finish()
        # Repeated waits are allowed and must not finish twice; tensors need not be held longer.
        self._work = self._finish = None


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
        line = self._line(axis, tensor)
        self._check("all_reduce", line, tag, tensor, reduces=True)
        if line.group is None:
            return _DONE
        return self._run("all_reduce", line, tag, asynchronous)(
            dist.all_reduce, tensor, _REDUCE_OPS[op]
        )

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
        line = self._line(axis, input)
        self._check("reduce_scatter", line, tag, input, output, reduces=True)
        self._check_sizes("reduce_scatter", line, tag, whole=input, part=output)
        if line.group is None:
            return _local(line, output, input.view(-1)[: output.numel()])
        run = self._run("reduce_scatter", line, tag, asynchronous)
        if not line.exchanges:
            return run(_reduce_scatter, output, input, _REDUCE_OPS[op])
        # gloo reduces the whole input on every rank and keeps a slice. Exchanging slices and
        # adding them up here moves half as much, and adds bf16 and fp16 in fp32.
        received = torch.empty_like(input)
        return run(
            dist.all_to_all_single,
            received,
            input,
            finish=lambda: _reduce_rows(output, received.view(line.size, -1), op),
        )

    def all_gather(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        asynchronous: bool = False,
    ) -> Handle:
        line = self._line(axis, input)
        self._check("all_gather", line, tag, input, output)
        self._check_sizes("all_gather", line, tag, whole=output, part=input)
        if line.group is None:
            return _local(line, output, input)
        run = self._run("all_gather", line, tag, asynchronous)
        return run(_all_gather, _movable(output), _movable(input))

    def broadcast(
        self,
        tensor: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        source: int = 0,
        asynchronous: bool = False,
    ) -> Handle:
        line = self._line(axis, tensor)
        self._check("broadcast", line, tag, tensor)
        self._check_position("broadcast", line, tag, source)
        if line.group is None:
            return _DONE
        run = self._run("broadcast", line, tag, asynchronous)
        return run(dist.broadcast, _movable(tensor), group_src=source)

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
        line = self._line(axis, input)
        self._check("all_to_all", line, tag, input, output)
        self._check_rows("all_to_all", line, tag, "input", input, input_splits)
        self._check_rows("all_to_all", line, tag, "output", output, output_splits)
        if line.group is None:
            return _local(line, output, input)
        return self._run("all_to_all", line, tag, asynchronous)(
            dist.all_to_all_single,
            _movable(output),
            _movable(input),
            None if output_splits is None else list(output_splits),
            None if input_splits is None else list(input_splits),
        )

    def send(
        self, tensor: torch.Tensor, axis: Axis, tag: Tag, *, to: int, asynchronous: bool = False
    ) -> Handle:
        line = self._peer("send", tensor, axis, tag, to)
        if line.group is None:
            return _DONE
        run = self._run("send", line, tag, asynchronous)
        return run(dist.isend, _movable(tensor), group_dst=to)

    def receive(
        self, tensor: torch.Tensor, axis: Axis, tag: Tag, *, source: int, asynchronous: bool = False
    ) -> Handle:
        line = self._peer("receive", tensor, axis, tag, source)
        if line.group is None:
            return _DONE
        run = self._run("receive", line, tag, asynchronous)
        return run(dist.irecv, _movable(tensor), group_src=source)

    def barrier(self, axis: Axis, tag: Tag) -> None:
        # An all-reduce works on every backend without being told a device.
        self.all_reduce(torch.zeros(1, device=self._device), axis, tag)
        if self._device.type not in ("cpu", "meta"):
            torch.get_device_module(self._device.type).synchronize()

    def buffer(self, numel: int, dtype: torch.dtype, axis: Axis) -> torch.Tensor:
        return torch.zeros(numel, dtype=dtype, device=self._device)

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

    def _run(self, what: str, line: _Line, tag: Tag, asynchronous: bool) -> Callable[..., Handle]:
        """Calls a function of ``torch.distributed`` such that its errors become ours."""

        def explain(error: RuntimeError) -> CommunicationError:
            explained = broken if self._failures is None else self._failures.explain
            return explained(_title(what, line, tag), error)

        def run(
            collective: Callable[..., Any],
            *tensors: Any,
            finish: Callable[[], object] | None = None,
            **peers: int,
        ) -> Handle:
            if collective not in (dist.isend, dist.irecv):
                peers["async_op"] = True
            try:
                work = collective(*tensors, group=line.group, **peers)
            except RuntimeError as error:
                raise explain(error) from error
            pending = _Pending(work, explain, finish)
            if not asynchronous:
                pending.wait()
                return _DONE
            return pending

        return run

    def _peer(self, what: str, tensor: torch.Tensor, axis: Axis, tag: Tag, peer: int) -> _Line:
        line = self._line(axis, tensor)
        self._check(what, line, tag, tensor)
        self._check_position(what, line, tag, peer)
        if peer == line.rank:
            _refuse(what, line, tag, f"position {peer} is this rank itself")
        return line

    @staticmethod
    def _check(
        what: str, line: _Line, tag: Tag, *tensors: torch.Tensor, reduces: bool = False
    ) -> None:
        first = tensors[0]
        for tensor in tensors:
            if not tensor.is_contiguous():
                shape, stride = tuple(tensor.shape), tensor.stride()
                _refuse(
                    what, line, tag, f"tensor of shape {shape}, stride {stride} is not contiguous"
                )
            if tensor.dtype != first.dtype or tensor.device != first.device:
                _refuse(
                    what,
                    line,
                    tag,
                    f"input is {first.dtype} on {first.device}, "
                    f"output is {tensor.dtype} on {tensor.device}",
                )
        if reduces and first.dtype in _FLOAT8:
            _refuse(what, line, tag, f"{first.dtype} cannot be reduced; cast it to bfloat16 first")

    @staticmethod
    def _check_sizes(
        what: str, line: _Line, tag: Tag, *, whole: torch.Tensor, part: torch.Tensor
    ) -> None:
        if whole.numel() != part.numel() * line.size:
            _refuse(
                what,
                line,
                tag,
                f"shapes {tuple(whole.shape)} and {tuple(part.shape)} do not fit: expected "
                f"{line.size} ranks x {part.numel()} = {line.size * part.numel()} elements, got "
                f"{whole.numel()}",
            )

    @staticmethod
    def _check_rows(
        what: str,
        line: _Line,
        tag: Tag,
        which: str,
        tensor: torch.Tensor,
        splits: Sequence[int] | None,
    ) -> None:
        shape = tuple(tensor.shape)
        if splits is None:
            if not shape or shape[0] % line.size:
                _refuse(
                    what, line, tag, f"{which} of shape {shape} has no {line.size} equal slices"
                )
        elif len(splits) != line.size or sum(splits) != shape[0]:
            _refuse(
                what,
                line,
                tag,
                f"{which} of shape {shape} cannot be cut into {list(splits)}: expected {line.size} "
                f"splits that add up to {shape[0]}",
            )

    @staticmethod
    def _check_position(what: str, line: _Line, tag: Tag, position: int) -> None:
        if not 0 <= position < line.size:
            _refuse(what, line, tag, f"there is no position {position} among {line.size} ranks")


def _name(axis: Axis) -> str:
    if isinstance(axis, SubAxis):
        return f"{_name(axis.axis)}[{','.join(map(str, axis.positions))}]"
    return axis if isinstance(axis, str) else "+".join(axis)


def _title(what: str, line: _Line, tag: Tag) -> str:
    return f"{what} of {tag} over {line.name!r} ({line.size} ranks)"


def _refuse(what: str, line: _Line, tag: Tag, reason: str) -> NoReturn:
    raise CommunicationError(f"{_title(what, line, tag)}: {reason}")


def _local(line: _Line, output: torch.Tensor, input: torch.Tensor) -> Handle:
    """Without a group there is one rank and a collective is a copy, or nothing has a value."""
    if line.size == 1 and output.data_ptr() != input.data_ptr():
        output.view(-1).copy_(input.view(-1))
    return _DONE


def _movable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype in _FLOAT8 else tensor


def _reduce_rows(output: torch.Tensor, rows: torch.Tensor, op: Op) -> None:
    """Reduce ``rows`` [ranks, n] into ``output`` [n]."""
    flat = output.view(-1)
    if op is Op.SUM:
        torch.sum(rows, dim=0, dtype=rows.dtype, out=flat)
    elif op is Op.MAX:
        torch.amax(rows, dim=0, out=flat)
    else:
        torch.amin(rows, dim=0, out=flat)

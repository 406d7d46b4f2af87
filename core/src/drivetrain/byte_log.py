"""Counts what a rank communicates, by purpose, axis, collective and key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from drivetrain.communicator import Communicator, Handle, Purpose, Tag
from drivetrain.communicator_wrapper import CommunicatorWrapper

if TYPE_CHECKING:
    import torch

    from drivetrain.mesh_layout import Axis


class Call(NamedTuple):
    """What is counted together: collectives of one kind."""

    purpose: Purpose
    axis: Axis
    op: str
    key: str


@dataclass
class Traffic:
    """What was communicated.

    Args:
        calls: number of collectives.
        payload_bytes: size of the whole tensor that a collective is about: the reduced, broadcast
            or sent tensor, the gathered output, the scattered or exchanged input.
        sent_bytes: what this rank sends with the usual ring algorithms, for n payload bytes and s
            ranks: all-reduce 2n(s-1)/s; all-gather, reduce-scatter and broadcast n(s-1)/s (for
            broadcast the mean over ranks); all-to-all what is not kept; send n; receive 0.
    """

    calls: int = 0
    payload_bytes: int = 0
    sent_bytes: float = 0.0


class ByteLog(CommunicatorWrapper):
    """The innermost decorator: it sees what really travels, after compression and routing.

    Sizes come from tensors, so the log works on the meta device as well. It costs less than two
    microseconds a call.
    """

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self._traffic: dict[Call, Traffic] = {}
        self._sizes: dict[Axis, int] = {}

    def items(self) -> Iterator[tuple[Call, Traffic]]:
        """All counts, in order of first use."""
        yield from self._traffic.items()

    def total(
        self,
        purpose: Purpose | None = None,
        axis: Axis | None = None,
        op: str | None = None,
        key: str | None = None,
    ) -> Traffic:
        """The sum of all counts that agree with every argument given."""
        wanted = (purpose, axis, op, key)
        total = Traffic()
        for call, traffic in self._traffic.items():
            if all(want in (None, have) for want, have in zip(wanted, call, strict=True)):
                total.calls += traffic.calls
                total.payload_bytes += traffic.payload_bytes
                total.sent_bytes += traffic.sent_bytes
        return total

    def reset(self) -> None:
        """Start counting anew."""
        self._traffic.clear()

    def all_reduce(self, tensor: torch.Tensor, axis: Axis, tag: Tag, **options: Any) -> Handle:
        self._count("all_reduce", axis, tag, tensor.nbytes, 2 * self._passed_on(tensor, axis))
        return self.inner.all_reduce(tensor, axis, tag, **options)

    def reduce_scatter(
        self, output: torch.Tensor, input: torch.Tensor, axis: Axis, tag: Tag, **options: Any
    ) -> Handle:
        self._count("reduce_scatter", axis, tag, input.nbytes, self._passed_on(input, axis))
        return self.inner.reduce_scatter(output, input, axis, tag, **options)

    def all_gather(
        self, output: torch.Tensor, input: torch.Tensor, axis: Axis, tag: Tag, **options: Any
    ) -> Handle:
        self._count("all_gather", axis, tag, output.nbytes, self._passed_on(output, axis))
        return self.inner.all_gather(output, input, axis, tag, **options)

    def broadcast(self, tensor: torch.Tensor, axis: Axis, tag: Tag, **options: Any) -> Handle:
        self._count("broadcast", axis, tag, tensor.nbytes, self._passed_on(tensor, axis))
        return self.inner.broadcast(tensor, axis, tag, **options)

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, axis: Axis, tag: Tag, **options: Any
    ) -> Handle:
        splits, sent = options.get("input_splits"), self._passed_on(input, axis)
        if splits is not None and input.shape[0]:
            row = input.nbytes / input.shape[0]
            sent = input.nbytes - row * splits[self.inner.rank(axis)]
        self._count("all_to_all", axis, tag, input.nbytes, sent)
        return self.inner.all_to_all(output, input, axis, tag, **options)

    def send(self, tensor: torch.Tensor, axis: Axis, tag: Tag, **options: Any) -> Handle:
        self._count("send", axis, tag, tensor.nbytes, tensor.nbytes)
        return self.inner.send(tensor, axis, tag, **options)

    def receive(self, tensor: torch.Tensor, axis: Axis, tag: Tag, **options: Any) -> Handle:
        self._count("receive", axis, tag, tensor.nbytes, 0)
        return self.inner.receive(tensor, axis, tag, **options)

    def barrier(self, axis: Axis, tag: Tag) -> None:
        self._count("barrier", axis, tag, 0, 0)
        self.inner.barrier(axis, tag)

    def _passed_on(self, whole: torch.Tensor, axis: Axis) -> float:
        """Bytes that one turn around the ring takes from each rank."""
        size = self._sizes.get(axis)
        if size is None:
            size = self._sizes[axis] = self.inner.size(axis)
        return whole.nbytes * (size - 1) / size

    def _count(self, op: str, axis: Axis, tag: Tag, payload: int, sent: float) -> None:
        call = Call(tag.purpose, axis, op, tag.key)
        traffic = self._traffic.get(call)
        if traffic is None:
            traffic = self._traffic.setdefault(call, Traffic())
        traffic.calls += 1
        traffic.payload_bytes += payload
        traffic.sent_bytes += sent

"""Counts what a rank communicates, by purpose, axis, collective and key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from drivetrain.contracts.world.collective import Collective, Kind, Purpose
from drivetrain.contracts.world.communicator import Communicator, CommunicatorWrapper, Handle

if TYPE_CHECKING:
    from drivetrain.contracts.world.axis import Axis


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
        payload_bytes: size of the whole tensor that a collective is about: the reduced or broadcast
            tensor, the gathered output, the scattered or exchanged input, all tensors that a
            send-receive sends and receives.
        sent_bytes: what this rank sends with the usual ring algorithms, for n payload bytes and s
            ranks: all-reduce 2n(s-1)/s; all-gather, reduce-scatter and broadcast n(s-1)/s (for
            broadcast the mean over ranks); all-to-all what is not kept; send-receive
            what it sends.
    """

    calls: int = 0
    payload_bytes: int = 0
    sent_bytes: float = 0.0


class ByteLog(CommunicatorWrapper):
    """Core's decorator, around routes alone: it sees what really travels, after compression.

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

    def run(self, collective: Collective) -> Handle:
        tag = collective.tag
        call = Call(tag.purpose, collective.axis, collective.kind, tag.key)
        traffic = self._traffic.get(call)
        if traffic is None:
            traffic = self._traffic.setdefault(call, Traffic())
        payload = _payload_bytes(collective)
        traffic.calls += 1
        traffic.payload_bytes += payload
        traffic.sent_bytes += self._sent_bytes(collective, payload)
        return self.inner.run(collective)

    def _sent_bytes(self, collective: Collective, payload: int) -> float:
        """See :class:`Traffic`."""
        kind, splits = collective.kind, collective.input_splits
        if kind is Kind.SEND_RECEIVE:
            return sum(tensor.nbytes for tensor in collective.tensors[: collective.sends])
        if splits is not None and collective.input.shape[0]:
            row = payload / collective.input.shape[0]
            return payload - row * splits[self.inner.rank(collective.axis)]
        size = self._sizes.get(collective.axis)
        if size is None:
            size = self._sizes[collective.axis] = self.inner.size(collective.axis)
        turns = 2 if kind is Kind.ALL_REDUCE else 1
        return turns * payload * (size - 1) / size


def _payload_bytes(collective: Collective) -> int:
    if collective.kind is Kind.BARRIER:
        return 0
    if collective.kind is Kind.SEND_RECEIVE:
        return sum(tensor.nbytes for tensor in collective.tensors)
    gathers = collective.kind is Kind.ALL_GATHER
    return (collective.output if gathers else collective.input).nbytes

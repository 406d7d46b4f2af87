"""qgZ: gradients are reduced as blocks of int4 (ZeRO++, arXiv:2306.10209, section 3.3).

A reduce-scatter becomes an exchange of quantised slices, which are summed in float32 where they
arrive. Where an axis spans several nodes there are two hops: ranks of a node exchange and add up
what is meant for each place in any node, and only those sums cross the network, quantised again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import (
    DONE,
    Collective,
    Communicator,
    CommunicatorWrapper,
    Handle,
    Kind,
    Op,
    Purpose,
    Tag,
)
from drivetrain_zero.compressed.block_codec import BlockCodec
from drivetrain_zero.compressed.continued import Continued
from drivetrain_zero.compressed.nodes import Hops, find_hops

if TYPE_CHECKING:
    from drivetrain.communication.mesh import Mesh
    from drivetrain.contracts import Axis, Fragment
    from drivetrain_zero.compressed.error_feedback import ErrorFeedback, KeptErrors

logger = logging.getLogger("drivetrain.zero")

_CODEC = BlockCodec("int4")


class QuantizedReduce(CommunicatorWrapper):
    """Quantises reduce-scatters of gradients; what would not become smaller travels as it is.

    Infinities and NaNs arrive as NaN, so that overflow is still seen. The first of two hops is
    waited for at once, because all ranks have to begin the second in the same order.

    Args:
        inner: carries the messages.
        mesh: ranks of an axis.
        nodes: the node of every rank of the world.
        feedback: makes up for errors; ``None`` for no such thing.
    """

    def __init__(
        self,
        inner: Communicator,
        mesh: Mesh,
        nodes: Sequence[int],
        feedback: ErrorFeedback | None,
    ) -> None:
        super().__init__(inner)
        self.feedback = feedback
        self._mesh = mesh
        self._nodes = nodes
        self._hops: dict[Axis, Hops | None] = {}

    def reserve(self, key: str, axis: Axis, numel: int, device: torch.device) -> Fragment | None:
        """Make room for the errors of ``key``, whose gradients have ``numel`` elements a rank."""
        if self.feedback is None or self.size(axis) == 1:
            return None
        return self.feedback.reserve(key, self._rows(axis), numel, device)

    def run(self, collective: Collective) -> Handle:
        if not self._quantises(collective):
            return self.inner.run(collective)
        axis, tag, numel = collective.axis, collective.tag, collective.output.numel()
        size, hops = self.size(axis), self._hops_of(axis)
        kept = None
        if self.feedback is not None:
            device = collective.input.device
            kept = self.feedback.of(tag.key, self._rows(axis), numel, device)
        messages = self._encode(collective.input.view(size, numel), kept, 0)
        last = axis
        if hops is not None:
            messages = self._sum_inside(messages, hops, tag, numel, kept)
            last = hops.across
        received = torch.empty_like(messages)
        handle = self.inner.all_to_all(
            received, messages, last, tag, asynchronous=collective.asynchronous
        )
        finish = partial(_sum, received, collective.output.view(-1))
        if collective.asynchronous:
            return Continued(handle, finish)
        finish()
        return DONE

    def _sum_inside(
        self, messages: torch.Tensor, hops: Hops, tag: Tag, numel: int, kept: KeptErrors | None
    ) -> torch.Tensor:
        """The first hop: this node's sums for its own place in every node, as messages."""
        places = self.size(hops.inside)
        messages = messages[list(hops.order)]
        received = torch.empty_like(messages)
        self.inner.all_to_all(received, messages, hops.inside, tag)
        by_node = received.view(places, len(received) // places, -1).unbind(1)
        sums = [_CODEC.sum(parts, numel) for parts in by_node]
        return self._encode(sums, kept, len(messages))

    def _encode(
        self, rows: torch.Tensor | Sequence[torch.Tensor], kept: KeptErrors | None, first: int
    ) -> torch.Tensor:
        """Messages [rows, bytes]; their errors begin at row ``first`` of ``kept``."""
        numel, device = rows[0].numel(), rows[0].device
        shape = (len(rows), _CODEC.message_bytes(numel))
        messages = torch.zeros(shape, dtype=torch.uint8, device=device)
        if self.feedback is not None and kept is not None:
            errors = kept.messages.narrow(0, first, len(rows))
            self.feedback.encode(rows, _CODEC, messages, errors)
        else:
            for row, message in zip(rows, messages, strict=True):
                _CODEC.encode(row, message)
        return messages

    def _quantises(self, collective: Collective) -> bool:
        if collective.kind is not Kind.REDUCE_SCATTER or collective.op is not Op.SUM:
            return False
        if collective.tag.purpose is not Purpose.GRADIENT:
            return False
        axis, size = collective.axis, self.size(collective.axis)
        fits = collective.flaw(size, self.rank(axis)) is None  # else inner says what is wrong
        return size > 1 and fits and _CODEC.shrinks(collective.output)

    def _hops_of(self, axis: Axis) -> Hops | None:
        if axis not in self._hops:
            nodes = [self._nodes[rank] for rank in self._mesh.ranks(axis)]
            hops = self._hops[axis] = find_hops(axis, nodes, self.rank(axis))
            logger.info(
                "gradients over %s are reduced as int4 in %s",
                axis,
                "one hop" if hops is None else f"two hops, {self.size(hops.inside)} ranks a node",
            )
        return self._hops[axis]

    def _rows(self, axis: Axis) -> int:
        """Number of slices that are quantised in one reduction, over all hops."""
        hops = self._hops_of(axis)
        return self.size(axis) + (0 if hops is None else self.size(hops.across))


def _sum(messages: torch.Tensor, output: torch.Tensor) -> None:
    output.copy_(_CODEC.sum(messages, output.numel()))

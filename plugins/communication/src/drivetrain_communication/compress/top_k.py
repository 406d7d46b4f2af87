"""Sums of the largest elements alone (Aji and Heafield 2017, https://arxiv.org/abs/1704.05021)."""

from __future__ import annotations

import torch

from drivetrain.contracts import Collective, Communicator, Handle, Kind
from drivetrain_communication.compress.errors import Errors, finite
from drivetrain_communication.compress.handles import then

_ENTRY_BYTES = 8
"""An fp32 value and an int32 index."""


class TopK:
    """All-reduce of each rank's largest elements; the rest is added to its next tensor.

    All ranks gather the same (index, value) pairs and add them up in order of rank, so they have
    the same bits.

    Args:
        density: share of the elements that are sent, at least one element.
        errors: keeps what is not sent.
    """

    kinds = frozenset({Kind.ALL_REDUCE})

    def __init__(self, density: float, errors: Errors) -> None:
        self._density = density
        self._errors = errors

    def _count(self, numel: int) -> int:
        return min(numel, max(1, round(self._density * numel)))

    def sent_bytes(self, collective: Collective, size: int) -> int:
        """Bytes of all ranks' pairs, as they arrive at each; infinite for 2^31 elements."""
        numel = collective.output.numel()
        # An all-reduce moves its tensor twice, a gather of all pairs once.
        pairs = size * self._count(numel) * _ENTRY_BYTES // 2
        return pairs if numel < 1 << 31 else 1 << 62

    def run(self, collective: Collective, inner: Communicator, name: str) -> Handle:
        """Carry out ``collective`` over ``inner``; ``name`` is its tensor's."""
        c, flat, size = collective, collective.output.view(-1), inner.size(collective.axis)
        error = self._errors.of(f"{name}, worker", tuple(flat.shape), flat.device)
        wanted = flat.float() + error
        count = self._count(len(flat))
        # NaN counts as largest, so that an overflow is seen by all.
        places = torch.topk(wanted.abs().nan_to_num_(nan=torch.inf), count, sorted=False).indices
        values = wanted[places]
        halves = values.view(torch.uint8), places.int().view(torch.uint8)
        sent = torch.cat(halves)
        received = sent.new_empty(size * sent.numel())
        handle = inner.all_gather(received, sent, c.axis, c.tag, asynchronous=c.asynchronous)
        error.copy_(finite(wanted.index_fill_(0, places, 0.0)))

        def finish() -> None:
            total = torch.zeros_like(error)
            for message in received.view(size, -1):
                there, at = message.view(2, -1).unbind(0)
                total.index_add_(0, at.view(torch.int32).long(), there.view(torch.float32))
            flat.copy_(total)

        return then(handle, finish, asynchronous=c.asynchronous)

"""qwZ: parameters are gathered as blocks of int8 (ZeRO++, arXiv:2306.10209, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
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
    Purpose,
)
from drivetrain_zero.compressed.block_codec import BlockCodec
from drivetrain_zero.compressed.continued import Continued

if TYPE_CHECKING:
    from drivetrain.contracts import Axis

_CODEC = BlockCodec("int8")


class QuantizedGather(CommunicatorWrapper):
    """Quantises all-gathers of weights.

    Every rank decodes the same messages, its own included, so all ranks compute with equal
    numbers. A shard that is a slice of the gathered tensor loses its exact values. What would not
    become smaller travels as it is. :class:`BlockCodec` packs and unpacks the messages.

    Args:
        inner: carries the messages.
        wants: which keys' weights are quantised.
        exact: an axis over which weights travel as they are: what a secondary shard holds has
            been rounded once, and backward must see the same numbers as forward.
    """

    def __init__(
        self, inner: Communicator, wants: Callable[[str], bool], exact: Axis | None = None
    ) -> None:
        super().__init__(inner)
        self._wants = wants
        self._exact = exact

    def reads_settled(self, input: torch.Tensor, axis: Axis) -> bool:
        # Messages are made when they are asked for, so every rank has to take part.
        return False

    def run(self, collective: Collective) -> Handle:
        if not self._quantises(collective):
            return self.inner.run(collective)
        shard, whole, axis = collective.input, collective.output, collective.axis
        mine = shard.new_empty(_CODEC.message_bytes(shard.numel()), dtype=torch.uint8)
        _CODEC.encode(shard, mine)
        messages = mine.new_empty(self.size(axis) * mine.numel())
        handle = self.inner.all_gather(
            messages, mine, axis, collective.tag, asynchronous=collective.asynchronous
        )
        finish = partial(
            _decode_all, messages.view(-1, mine.numel()), whole.view(-1, shard.numel())
        )
        if collective.asynchronous:
            return Continued(handle, finish)
        finish()
        return DONE

    def _quantises(self, collective: Collective) -> bool:
        if collective.kind is not Kind.ALL_GATHER or collective.tag.purpose is not Purpose.WEIGHT:
            return False
        axis, size = collective.axis, self.size(collective.axis)
        if size == 1 or axis == self._exact or not self._wants(collective.tag.key):
            return False
        fits = collective.flaw(size, self.rank(axis)) is None  # else inner says what is wrong
        return fits and _CODEC.shrinks(collective.input)


def _decode_all(messages: torch.Tensor, rows: torch.Tensor) -> None:
    for message, row in zip(messages, rows, strict=True):
        row.copy_(_CODEC.decode(message, row.numel(), row.dtype))


def as_gathered(shard: torch.Tensor) -> torch.Tensor:
    """What all ranks see of a shard."""
    return _CODEC.rounded(shard) if _CODEC.shrinks(shard) else shard.clone()

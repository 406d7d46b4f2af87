"""The tokens of a forward, shared out over the ranks of the axis ``sp``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from drivetrain.communication.functional import Functional, functional
from drivetrain.contracts import Attention, AttentionLayer, AttentionPhase, Purpose, Tag
from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from drivetrain.job.job import Job

_TAG = Tag(Purpose.ACTIVATION, key="logits", site="inference")
_CHANGES = (AttentionPhase.KERNEL, AttentionPhase.MASK)
"""Layers that decide what attention computes; the others say where its tokens and heads are."""


class SharedTokens:
    """Cuts a row of tokens into equal parts, one for each rank, in order.

    A rank computes projections, MLPs and logits of its part. Around attention the layers of another
    package exchange heads, so that a rank sees all tokens of some heads. It keeps keys and values
    of these heads alone, and decodes with them as it has computed the prompt.

    Args:
        line: the ranks.
        layers: put around an attention that sees all tokens of some heads.
    """

    def __init__(self, line: Functional, layers: Sequence[AttentionLayer]) -> None:
        self._line = line
        self._layers = layers

    @classmethod
    def of(cls, job: Job) -> SharedTokens | None:
        """How the ranks of ``job`` share tokens; ``None`` if they do not.

        Raises:
            ConfigError: nothing exchanges heads between them; or a package changes what attention
                computes, which attention over a paged cache would leave out.
        """
        offered = job.hub.wrap_attention(job)
        if others := sorted({_origin(each) for each in offered if each.phase in _CHANGES}):
            raise ConfigError(
                f"inference: {', '.join(others)} changes what attention computes, and the engine "
                "that generates computes attention over its cache by itself, so results would not "
                "be the model's: leave that package's section out of the config"
            )
        if job.mesh.size("sp") == 1:
            return None
        layers = [layer for layer in offered if layer.phase is AttentionPhase.SEQUENCE]
        if not layers:
            raise ConfigError(
                "inference: several ranks share a sequence (axis sp), and no package exchanges "
                "heads between them: set sequence_parallel_size to 1"
            )
        return cls(functional(job.communicator, "sp", _TAG), layers)

    def around(self, attention: Attention) -> Attention:
        """``attention`` with the layers around it."""
        for layer in self._layers:
            attention = layer.wrap(attention)
        return attention

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part of ``x`` [tokens], filled up with zeros to equal parts."""
        each = self._each(len(x))
        filled = nn.functional.pad(x, (0, each * self._line.size - len(x)))
        return filled.narrow(0, self._line.rank * each, each)

    def rows(self, rows: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of ``rows`` are in this rank's part, [rows]; and the places of these in it."""
        each = self._each(tokens)
        mine = rows // each == self._line.rank
        return mine, rows[mine] - self._line.rank * each

    def joined(self, logits: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
        """Logits of all rows from those of each rank's own; the same bits on every rank."""
        found = logits.new_zeros(len(mine), logits.shape[-1])
        found[mine] = logits
        return self._line.all_reduce(found)

    def _each(self, tokens: int) -> int:
        return -(-tokens // self._line.size)


def _origin(layer: AttentionLayer) -> str:
    """Name of the module of Python that a layer comes from."""
    wrap = layer.wrap
    return str(getattr(wrap, "__module__", None) or type(wrap).__module__)

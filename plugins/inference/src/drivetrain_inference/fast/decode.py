"""Forwards in which few sequences have one new token each, as one call of the accelerator's.

All that such a forward reads and writes, but for the tokens' own numbers, lies where it lay before.
So where an accelerator can repeat work without Python (graphs of a GPU, a list of calls on a CPU),
it is captured once for each number of sequences, over memory that is filled anew each time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from drivetrain_inference.cache.paged import PagedCache, RaggedBatch

if TYPE_CHECKING:
    from drivetrain_inference.fast.model import FastModel

logger = logging.getLogger("drivetrain.inference")

Capture = Callable[[Callable[[], None]], "Callable[[], None] | None"]
"""An accelerator's: runs a function and returns what repeats it, or ``None``."""

MOST_ROWS = 8
"""Sequences up to which Python costs enough to be left out."""


class Decodes:
    """The captured forwards of one model, by number of sequences.

    Args:
        model: computes.
        capture: repeats what it computes.
    """

    def __init__(self, model: FastModel, capture: Capture) -> None:
        self._model, self._capture = model, capture
        self._of: dict[int, _Decode | None] = {}
        self._place: tuple[PagedCache, int] | None = None

    def __call__(self, cache: PagedCache, batch: RaggedBatch) -> torch.Tensor | None:
        """Logits [sequences, vocabulary]; ``None`` for other forwards, and what is not captured.

        They lie in memory that the next call writes, so a caller that keeps them copies them.
        """
        rows = len(batch.lengths)
        single = rows == len(batch.tokens) == len(batch.last)
        if not single or rows > MOST_ROWS or batch.adapters:
            return None
        place = (cache, torch.get_num_threads())
        if self._place is None or self._place[0] is not cache or self._place[1] != place[1]:
            self._of, self._place = {}, place
        if rows not in self._of:
            self._of[rows] = _Decode.of(self._model, self._capture, cache, batch)
        decode = self._of[rows]
        return None if decode is None else decode(batch)


class _Decode:
    """One captured forward, and the memory that it reads and writes."""

    def __init__(self, model: FastModel, cache: PagedCache, batch: RaggedBatch) -> None:
        rows, width = len(batch.lengths), -(-model.context // cache.size)
        self._model = model
        self._hidden = model.embedded(batch)
        self._turns = model.turns(batch)
        self._batch = replace(
            batch, tables=batch.tables.new_zeros(rows, max(width, batch.tables.shape[1]))
        )
        self._logits = torch.empty(0)
        self._replay: Callable[[], None] = lambda: None

    @classmethod
    def of(
        cls, model: FastModel, capture: Capture, cache: PagedCache, batch: RaggedBatch
    ) -> _Decode | None:
        """The forward of ``batch``, captured; ``None`` if it cannot be."""
        # Tensors that outlive a block of inference mode may be written outside of it, too.
        with torch.inference_mode(False), torch.no_grad():
            parts: dict[str, Any] = vars(batch)
            tensors = (name for name, part in parts.items() if isinstance(part, torch.Tensor))
            copies: dict[str, Any] = {name: parts[name].clone() for name in tensors}
            batch = replace(batch, **copies)
            self = cls(model, cache, batch)
            self._fill(batch)

            def run() -> None:
                self._logits = model.logits(*model.layers_of(
                    self._hidden, self._turns, cache, self._batch
                ))  # fmt: skip

            replay = capture(run)
        if replay is None:
            logger.info("forwards of %d sequences are not captured", len(batch.lengths))
            return None
        self._replay = replay
        return self

    def __call__(self, batch: RaggedBatch) -> torch.Tensor:
        self._fill(batch)
        self._replay()
        return self._logits

    def _fill(self, batch: RaggedBatch) -> None:
        own = self._batch
        self._model.embedded(batch, self._hidden)
        self._model.turns(batch, self._turns)
        own.slots.copy_(batch.slots)
        own.lengths.copy_(batch.lengths)
        own.tables[:, : batch.tables.shape[1]] = batch.tables

"""Losses that stand out: back to the latest copy, and on with the data after those."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from drivetrain.errors import TrainingError
from drivetrain_elasticity.section import SpikeSection
from drivetrain_elasticity.survival import PLACE

if TYPE_CHECKING:
    import torch

    from drivetrain.engine.engine import Engine

logger = logging.getLogger("drivetrain.survival")


_watched: WeakKeyDictionary[Engine, Spikes] = WeakKeyDictionary()


def watch_losses(engine: Engine, section: SpikeSection) -> Spikes:
    """The losses of an engine, which from now on goes back after one that is not finite.

    Core would end the job with an error instead, on the rank whose loss it is.
    """
    if engine not in _watched:
        _watched[engine] = Spikes(section)
        engine.precision = replace(engine.precision, check_finite=True, lenient=True)
    return _watched[engine]


class Spikes:
    """The losses of one engine, the same on all ranks, so that all go back together.

    Args:
        section: what is a spike.
    """

    def __init__(self, section: SpikeSection) -> None:
        self._section = section
        self._losses: deque[float] = deque(maxlen=section.window)
        self._in_a_row = 0

    def go_back_after(self, engine: Engine, loss: float | torch.Tensor | None) -> bool:
        """Load the latest copy if ``loss`` stands out; true if that was done. Collective then.

        The loader stays where it is: what was trained on since the copy is not seen again in this
        epoch. Nothing stands out before the window is full, unless it is not finite.

        Raises:
            TrainingError: on every rank, when it has happened too often in a row.
            CheckpointError: there is no copy, or it cannot be loaded.
        """
        if loss is None:
            return False
        value, full = float(loss), len(self._losses) == self._section.window
        usual = statistics.median(self._losses) if full else math.inf
        if math.isfinite(value) and value <= self._section.factor * usual:
            self._losses.append(value)
            self._in_a_row = 0
            return False
        step = engine.global_steps
        self._in_a_row += 1
        if self._in_a_row > self._section.at_most:
            raise TrainingError(
                f"the loss of step {step} is {value:.4g}, against a median of {usual:.4g}, for the "
                f"{self._in_a_row}th time in a row after going back to a copy: look at the data "
                "and the learning rate"
            )
        self._load(engine)
        if engine.job.rank == 0:
            logger.warning(
                "the loss of step %d is %.4g, against a median of %.4g: back to step %d, without "
                "the data since then",
                *(step, value, usual, engine.global_steps),
            )
        return True

    def _load(self, engine: Engine) -> None:
        loader: Any = engine.training_dataloader  # or one of the script's own
        position = loader.state_dict() if hasattr(loader, "state_dict") else None
        if engine.load_checkpoint(PLACE)[0] is None:
            raise TrainingError(
                f"the loss of step {engine.global_steps} stands out before the first copy is made; "
                "make survival.every smaller"
            )
        if position is not None:
            loader.load_state_dict(position)

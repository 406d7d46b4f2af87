"""How far a job has come. Core alone writes it; schedules and plugins are functions of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

_SAVED = ("steps", "micro_steps", "samples", "tokens", "skipped_steps")


@dataclass
class Progress:
    """Counters of one engine, saved with its checkpoints.

    Args:
        steps: accumulation boundaries passed, whether the update was applied or skipped.
        micro_steps: micro-batches ended on this rank.
        samples: samples of all steps, over all ranks.
        tokens: tokens of all steps, over all ranks.
        skipped_steps: boundaries whose update was not applied, e.g. after an fp16 overflow.
        in_window: micro-batches ended since the last boundary; their gradients are not saved.
        mode: whether the engine trains or evaluates now; not saved.
    """

    steps: int = 0
    micro_steps: int = 0
    samples: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    in_window: int = field(default=0, compare=False)
    mode: Literal["train", "eval"] = field(default="train", compare=False)

    def end_micro_batches(self, count: int) -> None:
        """Count micro-batches."""
        self.micro_steps += count
        self.in_window += count

    def end_step(self, *, samples: int, tokens: int, applied: bool) -> None:
        """Count one accumulation boundary.

        Args:
            samples: samples of this step, over all ranks.
            tokens: tokens of this step, over all ranks.
            applied: whether the update was applied.
        """
        self.in_window = 0
        self.steps += 1
        self.samples += samples
        self.tokens += tokens
        self.skipped_steps += not applied

    def drop_window(self) -> None:
        """Forget the micro-batches since the last boundary, whose gradients are gone."""
        self.micro_steps -= self.in_window
        self.in_window = 0

    def state_dict(self) -> dict[str, int]:
        """The counters as plain data; micro-batches of a window that has not ended do not count."""
        state = {counter: getattr(self, counter) for counter in _SAVED}
        return {**state, "micro_steps": self.micro_steps - self.in_window}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take over what :meth:`state_dict` returned."""
        for counter in _SAVED:
            setattr(self, counter, int(state[counter]))
        self.in_window = 0

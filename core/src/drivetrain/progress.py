"""How far a job has come. Core alone writes it; schedules and plugins are functions of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Literal


@dataclass
class Progress:
    """Counters of one engine, saved with its checkpoints.

    Args:
        steps: accumulation boundaries passed, whether the update was applied or skipped.
        micro_steps: micro-batches ended on this rank.
        samples: samples of all steps, over all ranks.
        tokens: tokens of all steps, over all ranks.
        skipped_steps: boundaries whose update was not applied, e.g. after an fp16 overflow.
        mode: whether the engine trains or evaluates now; not saved.
    """

    steps: int = 0
    micro_steps: int = 0
    samples: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    mode: Literal["train", "eval"] = field(default="train", compare=False)

    def end_micro_batch(self) -> None:
        """Count one micro-batch."""
        self.micro_steps += 1

    def end_step(self, *, samples: int, tokens: int, applied: bool) -> None:
        """Count one accumulation boundary.

        Args:
            samples: samples of this step, over all ranks.
            tokens: tokens of this step, over all ranks.
            applied: whether the update was applied.
        """
        self.steps += 1
        self.samples += samples
        self.tokens += tokens
        self.skipped_steps += not applied

    def state_dict(self) -> dict[str, int]:
        """The counters as plain data."""
        state = asdict(self)
        del state["mode"]
        return state

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take over what :meth:`state_dict` returned."""
        for counter in fields(self):
            if counter.name != "mode":
                setattr(self, counter.name, int(state[counter.name]))

"""The micro-batch loop behind ``engine.train_batch`` and ``engine.eval_batch``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch


class Runner(Protocol):
    """Runs the forward (and backward) passes of one global batch."""

    def run(self, batches: Iterator[Any], train: bool) -> torch.Tensor:
        """Pull the micro-batches of one step and run them.

        Args:
            batches: yields micro-batches of this data shard.
            train: run backward and ``engine.step``: one for each micro-batch, or one for all of
                them, told how many they are; otherwise run one micro-batch forward only.

        Returns:
            What this rank has seen of losses, [2], at least in float32: the sum of weight * loss,
            and the sum of weights, each 1 where losses have none. Zeros on a stage of a pipeline
            that has no loss. The engine makes the mean of all ranks of it.
        """

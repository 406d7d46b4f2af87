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
            train: run backward and call ``engine.step`` after each micro-batch; otherwise run
                one micro-batch forward only.

        Returns:
            Mean loss over micro-batches and the axis ``data``, by weights if there are any; on
            every rank, 0-d, at least in float32.
        """

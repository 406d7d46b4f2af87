"""When attention sees parts of sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Turn:
    """Whether tokens are in parts now: inside of the engine's forward, and in backward.

    Outside of it, such as in ``generate`` of the model itself, every rank has whole sequences.
    """

    in_forward: bool = False

    @property
    def in_parts(self) -> bool:
        """Whether attention sees parts of sequences."""
        return self.in_forward or torch._C._current_graph_task_id() != -1

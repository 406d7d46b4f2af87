"""When attention sees parts of sequences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from drivetrain_sequence.layout import Cut

if TYPE_CHECKING:
    from drivetrain_sequence.chunks.work import Work
    from drivetrain_sequence.towers import Stack


@dataclass
class Turn:
    """Whether tokens are in parts now: inside of the engine's forward, and in backward.

    Outside of it, such as in ``generate`` of the model itself, every rank has whole sequences.

    Args:
        cut: how sequences are shared out.
        in_forward: whether the engine's forward is under way.
        work: of the block that is computed by chunks now.
        asked: modules that have called attention, while they are noted.
        whole: modules that see whole sequences at any time, such as towers of other modalities.
        stacks: modules of towers whose patches ranks share, and the blocks that they are in.
    """

    cut: Cut
    in_forward: bool = False
    work: Work | None = None
    asked: set[nn.Module] | None = None
    whole: set[nn.Module] = field(default_factory=set)
    stacks: dict[nn.Module, Stack] = field(default_factory=dict)

    def in_parts(self, module: nn.Module) -> bool:
        """Whether ``module`` sees parts of sequences."""
        inside = self.in_forward or torch._C._current_graph_task_id() != -1
        return inside and module not in self.whole

"""A small language model in which experts compute what attention answers."""

from __future__ import annotations

import torch
from drivetrain_moe import GroupedMLP, MoE
from torch import nn

from drivetrain.testing.models import tied_gpt

WIDTH, EXPERTS = 32, 4


class Experts(nn.Module):
    """Dropless experts without noise, so that nothing depends on how many ranks share them out."""

    def __init__(self, expert: nn.Module, k: int) -> None:
        super().__init__()
        self.moe = MoE(
            WIDTH, expert, EXPERTS, k=k, drop_tokens=False, top2_2nd_expert_sampling=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.moe(x)[0]
        return output


def gpt_with_experts() -> nn.Module:
    """One block has experts that are modules, the other has fused ones."""
    model = tied_gpt()
    torch.manual_seed(6)
    modules = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))
    first, second = model.blocks
    first.out = Experts(modules, k=2)
    second.out = Experts(GroupedMLP(EXPERTS, WIDTH, 16), k=1)
    return model

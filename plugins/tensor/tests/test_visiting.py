"""A model visits the device unit by unit, and comes back as it was."""

from __future__ import annotations

import torch
from drivetrain_tensor.visiting import visiting
from torch import nn


class Model(nn.Module):
    """Reads a weight that it does not call, and shares one between units."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(4, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.blocks[2][0].weight = self.blocks[0][0].weight
        self.ran: list[str] = []
        self.seen: list[list[str]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.positions.weight
        for block in self.blocks:
            x = block(x)
            self.ran.append(x.device.type)
            self.seen.append([each[0].weight.device.type for each in self.blocks])
        return x


def test_units_visit_one_by_one_and_come_back() -> None:
    model = Model()
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad(), visiting(model, torch.device("meta")):
        assert model.positions.weight.is_meta
        assert model(torch.zeros(4, 8, device="meta")).is_meta
    assert model.ran == ["meta"] * 3
    assert model.seen == [["cpu"] * 3] * 3
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name])

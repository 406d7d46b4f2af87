"""Models, configs and a plain reference for tests of compression in training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from drivetrain_compression.quantisers import integer
from torch import nn


class Block(nn.Module):
    """A residual block with attention of separate projections, and an MLP."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.each = width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, length, width] -> the same."""
        q, k, v = (
            f(x).unflatten(-1, (-1, self.each)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    """Embedding, blocks, head; ``forward(tokens, targets)`` is the loss."""

    def __init__(self, layers: int = 2, width: int = 8, vocabulary: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, length] -> [batch, length, vocabulary]."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        out: torch.Tensor = self.head(x)
        return out

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy."""
        return F.cross_entropy(self.logits(tokens).flatten(0, 1), targets.flatten())


class ConvNet(nn.Module):
    """Two convolutions with a batch norm between, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 16, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[batch, 3, 4, 4] -> [batch, 5]."""
        x = F.relu(self.bn1(self.conv1(images)))
        out: torch.Tensor = self.fc(self.conv2(x).flatten(1))
        return out


def net(**kwargs: Any) -> Net:
    """The same model every time, float64."""
    torch.manual_seed(5)
    return Net(**kwargs).double()


def batches(steps: int, size: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same data every time."""
    generator = torch.Generator().manual_seed(9)
    return [
        (
            torch.randint(12, (size, 5), generator=generator),
            torch.randint(12, (size, 5), generator=generator),
        )
        for _ in range(steps)
    ]


def method(shared: dict[str, Any], groups: dict[str, Any]) -> dict[str, Any]:
    """A method of the section."""
    return {"shared_parameters": {"enabled": True, **shared}, "different_groups": groups}


def group(modules: list[str], related: Any = None, **params: Any) -> dict[str, Any]:
    """A group of a method."""
    found: dict[str, Any] = {"params": params, "modules": modules}
    return found if related is None else {**found, "related_modules": related}


def straight(values: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """``changed`` with the gradient of ``values``, in plain torch."""
    return values + (changed - values).detach()


def quantised(weight: torch.Tensor, bits: int, groups: int = 1, kind: str = "symmetric") -> Any:
    """A weight in few bits, by formulas that are tested by themselves."""
    rows = weight.detach().reshape(groups, -1)
    if bits < 3:
        changed = integer.binary(rows) if bits == 1 else integer.ternary(rows)
    else:
        changed = getattr(integer, kind)(rows, bits)
    return straight(weight, changed.view(weight.shape))

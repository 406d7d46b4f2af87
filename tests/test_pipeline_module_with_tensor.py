"""A model given as a list of layers is divided into stages whose layers are shared out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drivetrain_pipeline import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn

import drivetrain
from drivetrain.testing import run_distributed

VOCABULARY, WIDTH, ROWS, LENGTH, MICRO_BATCHES, STEPS, RATE = 20, 8, 2, 5, 2, 3, 0.5


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return result


def scores(table: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, table.weight)  # type: ignore[arg-type]


def specs(*, tied: bool) -> list[LayerSpec]:
    blocks = [LayerSpec(Residual) for _ in range(4)]
    if tied:
        both = [
            TiedLayerSpec("table", nn.Embedding, VOCABULARY, WIDTH, forward_fn=function)
            for function in (None, scores)
        ]
        return [both[0], *blocks, both[1]]
    head = LayerSpec(nn.Linear, WIDTH, VOCABULARY, bias=False)
    return [LayerSpec(nn.Embedding, VOCABULARY, WIDTH), *blocks, head]


def loss_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (MICRO_BATCHES, ROWS, LENGTH), generator=generator)
    return [(x, x.roll(-1, 1)) for x in tokens]


def built(*, tied: bool) -> list[nn.Module]:
    layers = []
    for number, spec in enumerate(specs(tied=tied)):
        torch.manual_seed(7 + number)
        layers.append(spec.build())
    return layers


def alone(*, tied: bool) -> tuple[list[float], int]:
    """Losses by plain torch, and the number of parameters."""
    layers = built(tied=tied)
    model = nn.Sequential(*layers[:-1] if tied else layers)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=RATE), []
    for _ in range(STEPS):
        found = [(model(x), y) for x, y in batches()]
        scored = [(scores(layers[0], x) if tied else x, y) for x, y in found]
        loss = torch.stack([loss_of(x, y) for x, y in scored]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, sum(p.numel() for p in model.parameters())


def train(stages: int | None, kind: str) -> tuple[list[float], int, bool]:
    layers: list[Any] = list(specs(tied=kind == "tied"))
    if kind == "modules":
        layers = list(built(tied=False))
    torch.manual_seed(7)
    module = PipelineModule(layers, stages, loss_fn=loss_of)
    engine, *_ = drivetrain.initialize(
        model=module,
        config={
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
            "pipeline": {"stages": 2},
            "tensor_parallel": {"autotp_size": 2},
        },
    )
    losses = [float(engine.train_batch(iter(batches()))) for _ in range(STEPS)]
    kept = sum(p.numel() for p in engine.module.parameters())
    meta = any(p.is_meta for p in engine.module.parameters())
    engine.destroy()
    return losses, kept, meta


@pytest.mark.parametrize(("stages", "kind"), [(2, "described"), (None, "modules"), (None, "tied")])
def test_layers_in_stages_are_shared_out_and_train_like_one_process(
    stages: int | None, kind: str
) -> None:
    expected, every = alone(tied=kind == "tied")
    for losses, kept, meta in run_distributed(train, 4, stages, kind):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert kept < 0.6 * (every + VOCABULARY * WIDTH) / 2
        assert not meta

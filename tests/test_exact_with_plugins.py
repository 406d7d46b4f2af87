"""Layouts of one training end with one hash: stages, homes, files, and a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_pipeline import PipelineModule
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError
from drivetrain.testing import RanksFailedError, run_distributed

WIDTH, CLASSES = 16, 11
STEPS = 5


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(torch.relu(self.up(self.norm(x)))))


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits, targets)


class Whole(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return loss_of(x, targets)


def layers(dropout: float) -> list[nn.Module]:
    torch.manual_seed(2)
    blocks = [Block(dropout) for _ in range(4)]
    return [nn.Linear(7, WIDTH), *blocks, nn.Linear(WIDTH, CLASSES)]


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(48, 7, generator=generator)
    return [(row, row.sum().abs().long() % CLASSES) for row in x]


def trained(keys: dict[str, Any], dropout: float, load: str | None, save: str | None) -> str:
    config = {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "gradient_clipping": 0.2,
        "exact": {},
        **keys,
    }
    parts = layers(dropout)
    piped = "pipeline" in keys
    model = PipelineModule(parts, loss_fn=loss_of) if piped else Whole(parts)
    engine = drivetrain.initialize(model=model, training_data=data(), config=config)[0]
    if load is not None:
        engine.load_checkpoint(load)
    while engine.global_steps < (3 if save else STEPS):
        engine.train_batch()
    if save is not None:
        engine.save_checkpoint(save)
    found: str = engine.state_hash()
    engine.destroy()
    return found


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}}


HOST = {"device": "cpu"}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "3 ranks": (3, {}),
    "stage 1, 2 ranks": (2, zero(1)),
    "stage 2, 3 ranks": (3, zero(2, reduce_bucket_size=500)),
    "stage 3, 4 ranks": (4, zero(3, stage3_param_persistence_threshold=0)),
    "stage 2, states on the host": (2, zero(2, offload_optimizer=HOST)),
    "stage 3, all on the host": (
        2,
        zero(
            3,
            offload_optimizer=HOST,
            offload_param=HOST,
            stage3_param_persistence_threshold=0,
        ),
    ),
    "stage 1 alone": (1, zero(1)),
}


@pytest.fixture(scope="module")
def plain() -> str:
    return run_distributed(trained, 2, {}, 0.1, None, None)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_ends_with_the_bits_of_the_plain_one(layout: str, plain: str) -> None:
    world, keys = LAYOUTS[layout]
    assert run_distributed(trained, world, keys, 0.1, None, None)[0] == plain


def test_states_in_files_end_with_the_same_bits(tmp_path: Path, plain: str) -> None:
    nvme = {"device": "nvme", "nvme_path": str(tmp_path)}
    keys = zero(2, offload_optimizer=nvme)
    assert run_distributed(trained, 2, keys, 0.1, None, None)[0] == plain


@pytest.mark.parametrize("stage", [0, 1])
def test_stages_of_a_pipeline_end_with_the_bits_of_one_process(stage: int) -> None:
    whole = run_distributed(trained, 1, {}, 0.0, None, None)[0]
    keys = {"pipeline": {"stages": 2}, **zero(stage)}
    assert run_distributed(trained, 4, keys, 0.0, None, None)[0] == whole


def test_dropout_inside_of_stages_is_refused_by_name() -> None:
    with pytest.raises(RanksFailedError, match="draw random numbers"):
        run_distributed(trained, 2, {"pipeline": {"stages": 2}}, 0.1, None, None)


def test_a_run_goes_on_at_another_stage_on_other_ranks(tmp_path: Path, plain: str) -> None:
    run_distributed(trained, 3, zero(3), 0.1, None, str(tmp_path))
    keys = zero(1, offload_optimizer=HOST)
    assert run_distributed(trained, 2, keys, 0.1, str(tmp_path), None)[0] == plain


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"optimizer": {"type": "Lamb", "params": {"lr": 0.1}}}, "whole tensors"),
        ({"optimizer": {"type": "Muon", "params": {"lr": 0.1}}}, "whole tensors"),
        ({"optimizer": {"type": "OneBitAdam", "params": {"lr": 0.1}}}, "communicates"),
        (zero(3, zero_quantized_weights=True), "zero_quantized_weights"),
        (zero(3, zero_quantized_gradients=True), "zero_quantized_gradients"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        trained(keys, 0.0, None, None)

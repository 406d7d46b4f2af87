"""Times of layers, measured in a run, cut the model of the next one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from drivetrain_pipeline import PipelineModule, measure
from tiny_models import data, gpt2
from torch import nn

import drivetrain
from drivetrain.testing import run_distributed

SECONDS = 0.02


def trained(section: dict[str, Any], path: str) -> tuple[dict[str, Any], list[str], float]:
    engine, *_ = drivetrain.initialize(
        model=gpt2(),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
            "pipeline": {"stages": 2, **section},
        },
    )
    batches = [micro[0] for step in data(2, 2, 1) for micro in step]
    found = {}
    if "measured" not in section:
        found = measure(engine, iter(batches), path, steps=2)
    loss = engine.train_batch(iter(batches)).item()
    own = [name for name, _ in engine.module.named_parameters()]
    engine.destroy()
    engine.job.close()
    return found, own, loss


def test_a_model_is_cut_by_the_times_that_were_measured(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    first, other = run_distributed(trained, 2, {}, str(path))
    assert first[0] == other[0]
    names = [f"transformer.h.{number}" for number in range(4)]
    assert list(first[0]) == names
    assert all(x.forward > 0 and x.backward > 0 and x.activations > 0 for x in first[0].values())
    # A first layer that takes longer than the three others is alone on its stage.
    costs = json.loads(path.read_text())
    for name, times in costs.items():
        times["forward"] = times["backward"] = 4.0 if name == names[0] else 1.0
    path.write_text(json.dumps(costs))
    section = {"partition": "measured", "measured": str(path)}
    (_, own, loss), (_, rest, _) = run_distributed(trained, 2, section, str(path))
    assert {name.split(".")[2] for name in own if ".h." in name} == {"0"}
    assert {name.split(".")[2] for name in rest if ".h." in name} == {"1", "2", "3"}
    assert abs(loss - first[2]) < 1e-9


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        time.sleep(SECONDS)
        return gradient


class Sleeper(nn.Module):
    """Takes its time in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        slept: torch.Tensor = _Sleep.apply(self.linear(x))  # type: ignore[no-untyped-call]
        return slept


def test_a_layer_whose_inputs_need_no_gradient_has_a_backward(tmp_path: Path) -> None:
    layers = [Sleeper(), Sleeper()]
    model = PipelineModule(layers, num_stages=1, loss_fn=nn.functional.mse_loss)
    engine, *_ = drivetrain.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        },
    )
    batches = [(torch.ones(2, 4), torch.ones(2, 4)) for _ in range(3)]
    found = measure(engine, iter(batches), tmp_path / "costs.json", steps=3)
    engine.destroy()
    assert all(layer.backward >= SECONDS for layer in found.values()), found

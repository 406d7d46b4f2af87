"""Times of layers, measured in a run, cut the model of the next one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_pipeline import PipelineModule, TiedLayerSpec, measure
from drivetrain_pipeline.measuring import _with_sides
from tiny_models import data, gpt2
from torch import nn

import drivetrain
from drivetrain.errors import TrainingError
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


def _slept(x: torch.Tensor) -> torch.Tensor:
    slept: torch.Tensor = _Sleep.apply(x)  # type: ignore[no-untyped-call]
    return slept


class Sleeper(nn.Module):
    """Takes its time in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _slept(self.linear(x))


class LongEnd(nn.Module):
    """Four layers alike, and an end that takes as long as two."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Sleeper() for _ in range(4))
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return _slept(_slept(self.head(x).square().mean()))


def measured_and_cut(path: str) -> tuple[list[float], list[int], str]:
    """Backwards of layers, where a model is cut by them, and why zb_h1 is not measured."""

    def engine_of(**section: Any) -> Any:
        engine, *_ = drivetrain.initialize(
            model=LongEnd(),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "gradient_accumulation_steps": 2,
                "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
                "pipeline": {"stages": 2, **section},
            },
        )
        return engine

    engine = engine_of(partition="uniform")
    found = measure(engine, iter([torch.ones(2, 4)] * 4), path, steps=2)
    engine.destroy()
    engine = engine_of(partition="measured", measured=path)
    bounds = engine.module.drivetrain_chunks.partitions()
    engine.destroy()
    engine = engine_of(schedule="zb_h1")
    with pytest.raises(TrainingError) as refused:
        measure(engine, iter([torch.ones(2, 4)] * 4), path, steps=2)
    engine.destroy()
    return [layer.backward for layer in found.values()], bounds, str(refused.value)


def test_what_comes_behind_the_layers_counts_as_the_last_ones(tmp_path: Path) -> None:
    for backward, bounds, refused in run_distributed(measured_and_cut, 2, str(tmp_path / "costs")):
        assert backward[3] >= 3 * SECONDS > max(backward[:3])
        assert bounds == [0, 3, 4]  # not 0, 2, 4
        assert "measure with pipeline.schedule 1f1b" in refused


def test_times_of_layers_add_up_to_those_of_passes() -> None:
    # Each layer takes 2 beyond its time, and what comes behind the last one takes 3.
    found = _with_sides([3.0, 3.0, 4.0, 4.0], [True] * 4, [0, 2, 4], [10.0, 15.0])
    assert found == [5.0, 5.0, 6.0, 9.0]
    # Of a layer without times, an embedding that is tied say, it is what its chunk has left.
    found = _with_sides([0.0, 3.0, 4.0], [False, True, True], [0, 2, 3], [5.0, 5.0])
    assert found == [1.0, 4.0, 5.0]


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


def slow_in_place(x: torch.Tensor) -> torch.Tensor:
    time.sleep(2 * SECONDS)
    return x.add_(1.0)


def slow_loss(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    time.sleep(SECONDS)
    return _slept(x.square().mean())


def as_head(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _slept(x @ module.weight.t())


def test_functions_ties_and_the_loss_count_where_they_are_called(tmp_path: Path) -> None:
    tied = TiedLayerSpec("tokens", nn.Embedding, 3, 4)
    head = TiedLayerSpec("tokens", nn.Embedding, 3, 4, forward_fn=as_head)
    layers = [tied, slow_in_place, nn.Linear(4, 4), nn.Linear(4, 4), head]
    engine, *_ = drivetrain.initialize(
        model=PipelineModule(layers, num_stages=1, loss_fn=slow_loss),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        },
    )
    batches = [(torch.ones(2, 4, dtype=torch.int64), torch.ones(2)) for _ in range(3)]
    found = list(measure(engine, iter(batches), tmp_path / "costs.json", steps=3).values())
    engine.destroy()
    forward, backward = ([getattr(x, way) for x in found] for way in ("forward", "backward"))
    assert min(forward) > 0
    assert min(backward) > 0
    assert forward[1] >= 2 * SECONDS > forward[4] >= SECONDS > max(forward[0], *forward[2:4])
    assert backward[4] >= 2 * SECONDS > SECONDS > max(backward[:4])

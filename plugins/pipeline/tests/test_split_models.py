"""Models of Transformers, split between stages as they are, train like one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import MODELS, Curve, data, train_alone

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.testing import run_distributed

STEPS, MICRO_BATCHES, RATE = 2, 4, 0.1


def engine_of(model: torch.nn.Module, section: dict[str, Any], **changes: Any) -> Engine:
    engine, *_ = drivetrain.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
            "data_parallel": {"bucket_bytes": 4096, "first_bucket_bytes": 1024},
            "pipeline": section,
            **changes,
        },
    )
    engine.get_global_grad_norm()  # from now on it is computed
    return engine


def train(
    names: list[str], section: dict[str, Any]
) -> dict[str, tuple[Curve, dict[str, torch.Tensor]] | str]:
    return {name: train_one(name, section) for name in names}


def train_one(name: str, section: dict[str, Any]) -> Any:
    engine = engine_of(MODELS[name](), section)
    curve, mesh = [], engine.job.mesh
    for step in data(STEPS, MICRO_BATCHES, mesh.size("dp")):
        loss = engine.train_batch(iter([micro[mesh.coordinate("dp")] for micro in step]))
        norm = engine.get_global_grad_norm()
        curve.append((loss.item(), float("nan") if norm is None else norm))
    found = {
        engine.job.parameters.info(p).name: p.detach().clone() for p in engine.module.parameters()
    }
    engine.destroy()
    return curve, found


def check(names: list[str], world: int, section: dict[str, Any]) -> None:
    for_each = run_distributed(train, world, names, section, timeout=200)
    for name in names:
        model = MODELS[name]()
        shards = world // section["stages"]
        expected, trained = train_alone(model, STEPS, MICRO_BATCHES, shards, RATE)
        seen: set[str] = set()
        for ranks in for_each:
            curve, parameters = ranks[name]
            for point, want in zip(curve, expected, strict=True):
                assert point == pytest.approx(want, rel=1e-6), name
            for key, values in parameters.items():
                torch.testing.assert_close(
                    values, trained[key], rtol=1e-6, atol=1e-8, msg=f"{name} {key}"
                )
            seen |= set(parameters)
        assert seen == set(trained), name


def test_unlike_models_train_like_one_process_on_two_stages() -> None:
    check(list(MODELS), 2, {"stages": 2})


@pytest.mark.parametrize(
    ("world", "section"),
    [
        pytest.param(2, {"schedule": "gpipe"}, id="gpipe"),
        pytest.param(2, {"schedule": "interleaved"}, id="interleaved"),
        pytest.param(2, {"schedule": "zb_h1"}, id="zero bubble"),
        pytest.param(2, {"schedule": "zb_v"}, id="zero bubble in V shape"),
        pytest.param(4, {"schedule": "1f1b"}, id="copies over dp"),
        pytest.param(4, {"schedule": "zb_h1", "stages": 4}, id="four stages, weights apart"),
    ],
)
def test_every_schedule_trains_like_one_process(world: int, section: dict[str, Any]) -> None:
    check(["t5"], world, {"stages": 2, **section})  # whose embedding has three uses

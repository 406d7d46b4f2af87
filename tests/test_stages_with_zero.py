"""Stages of a pipeline under ZeRO train like one process, with gradients of weights apart, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import drivetrain
from drivetrain.plan.registry import Registry
from drivetrain.states.whole import whole
from drivetrain.testing import run_distributed
from drivetrain.testing.pipeline import Curve, Layers, ToyPipeline, train_alone, train_stages

STEPS, MICRO_BATCHES, RATE, CLIPPING, STAGES = 3, 4, 0.1, 0.05, 2
CLIPPED = {"gradient_clipping": CLIPPING}
FP16 = {"fp16": {"enabled": True, "loss_scale": 128.0}}
MESSAGES = {"cpu": {"shared_memory": False}}
"""Ranks have to gather together, and in one order."""


def train(changes: dict[str, Any]) -> tuple[Curve, dict[str, torch.Tensor], list[str]]:
    changes = dict(changes)
    zero = {"stage": changes.pop("stage"), "stage3_param_persistence_threshold": 0}
    section = {"stages": STAGES, "split": changes.pop("split", "no")}
    engine, *_ = drivetrain.initialize(
        model=Layers(),
        config={
            "train_micro_batch_size_per_gpu": 3,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
            "toy_pipeline": section,
            "zero_optimization": {**zero, **changes.pop("zero", {})},
            **changes,
        },
        registry=Registry.installed().with_plugins(ToyPipeline),
    )
    engine.get_global_grad_norm()
    curve = train_stages(engine, 0, STEPS, MICRO_BATCHES)
    with whole(engine.module):
        found = {n: p.detach().double().clone() for n, p in engine.module.named_parameters()}
    late = list(engine.states.learned())
    engine.destroy()
    engine.job.close()
    return curve, found, late


CASES = [
    pytest.param(world, {"stage": stage, **changes}, id=f"{world} ranks, stage {stage}, {name}")
    for stage in (1, 2, 3)
    for world, name, changes in (
        (2, "alone in its stage", {}),
        (4, "clipped", CLIPPED),
        (4, "by messages", {**MESSAGES}),
        (4, "weights by a backward", {"split": "backward", **MESSAGES}),
        (4, "weights by autograd.grad", {"split": "grad", **MESSAGES, **CLIPPED}),
        (4, "weights by hand", {"split": "stored", **MESSAGES, **CLIPPED}),
        (2, "fp16", FP16),
        (4, "fp16, weights by autograd.grad", {**FP16, "split": "grad"}),
    )
]


@pytest.mark.parametrize(("world", "changes"), CASES)
def test_stages_train_like_one_process(world: int, changes: dict[str, Any]) -> None:
    rtol = 3e-3 if "fp16" in changes else 1e-5
    clipping = changes.get("gradient_clipping", 0.0)
    expected, trained = train_alone(STEPS, MICRO_BATCHES, world // STAGES, RATE, clipping)
    names: set[str] = set()
    for curve, parameters, late in run_distributed(train, world, changes, timeout=100):
        for point, want in zip(curve, expected, strict=True):
            assert point == pytest.approx(want, rel=rtol)
        for name, values in parameters.items():
            torch.testing.assert_close(values, trained[name], rtol=rtol, atol=rtol)
        names |= set(parameters)
        assert late == []  # every gradient took part in the reduction of its round
    assert names == set(trained)

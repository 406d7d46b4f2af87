"""Gradients that scripts set between backward and step, at every stage, wherever states are."""

from __future__ import annotations

from typing import Any

import drivetrain_zero as zero
import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.testing import run_distributed

OFFLOAD: dict[str, dict[str, Any]] = {
    "none": {},
    "host": {"offload_optimizer": {"device": "cpu"}},
    "late": {"offload_optimizer": {"device": "cpu", "delayed_update": True}},
    "guessing": {"offload_optimizer": {"device": "cpu", "super_offload": True}},
    "by importance": {
        "offload_optimizer": {"device": "cpu"},
        "zenflow": {"topk_ratio": 0.2, "update_interval": 1, "full_warm_up_rounds": 0},
    },
}
WIDTH = 8


def engine_of(stage: int, name: str) -> Engine:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}
        | OFFLOAD[name],
    }
    return drivetrain.initialize(model=module, config=config)[0]


def set_full(engine: Engine, value: float) -> None:
    for parameter in engine.module.parameters():
        zero.safe_set_full_grad(parameter, torch.full(parameter.shape, value))


def set_local(engine: Engine, value: float) -> None:
    for parameter in engine.module.parameters():
        mine = zero.safe_get_local_grad(parameter)
        assert mine is not None
        zero.safe_set_local_grad(parameter, torch.full_like(mine, value))


def set_vectorized(engine: Engine, value: float) -> None:
    parameters = list(engine.module.parameters())
    zero.safe_update_full_grad_vectorized(parameters, lambda gradient, _: gradient.fill_(value))


def set_fragments(engine: Engine, value: float) -> None:
    engine.states.complete_gradients()
    divisor = engine.gradient_divisor()
    for fragment in engine.states.fragments():
        if fragment.kind == "gradient":
            fragment.write(torch.full_like(fragment.read(), value * divisor))


WAYS = [set_full, set_local, set_vectorized, set_fragments]


def masters(engine: Engine) -> torch.Tensor:
    found = [zero.safe_get_full_fp32_param(parameter) for parameter in engine.module.parameters()]
    return torch.cat([value.flatten().clone() for value in found if value is not None])


def moved_by_what_was_set(stage: int, name: str) -> None:
    engine = engine_of(stage, name)
    before = masters(engine)
    for number, way in enumerate(WAYS):
        engine.backward(engine(torch.ones(1, WIDTH, dtype=torch.bfloat16)).float().sum())
        value = (0.0, 0.5, -0.25, 0.0)[number]
        way(engine, value)
        engine.step()
        now = masters(engine)
        # A step of plain torch.optim.SGD at rate 1 takes the gradient off every weight.
        torch.testing.assert_close(now, before - value, msg=f"{way.__name__} {now - before}")
        before = now
    engine.destroy()


def all_stages(name: str) -> None:
    for stage in (0, 1, 2, 3) if name == "none" else (1, 2, 3):
        moved_by_what_was_set(stage, name)


@pytest.mark.parametrize("name", OFFLOAD)
def test_gradients_set_between_backward_and_step_are_what_the_step_uses(name: str) -> None:
    run_distributed(all_stages, 2, name)

"""A plugin changes each gradient as it arrives, and provides the norm; on every path once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import drivetrain
from drivetrain.contracts import Axis, GradientFilter, GradientNorm, Plugin, hookimpl
from drivetrain.job.job import Job
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed

FACTOR, NORM = 3.0, 7.0


class Changing(Plugin):
    name = "changing"

    @hookimpl
    def describe_parameters(self, job: Job, module: nn.Module) -> None:
        for parameter in module.parameters():
            job.parameters.info(parameter).gradient_dtype = torch.float64
            job.parameters.info(parameter).reduce_dtype = torch.float64

    @hookimpl
    def receive_gradients(self, job: Job) -> Sequence[GradientFilter]:
        def receive(parameter: nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
            assert gradient.shape == parameter.shape
            return gradient.double() * FACTOR

        return [receive]

    @hookimpl
    def build_gradient_norm(self, job: Job) -> GradientNorm:
        def norm(counted: Mapping[int, Sequence[torch.Tensor]], over: Axis | None) -> torch.Tensor:
            assert all(part.dtype == torch.float64 for parts in counted.values() for part in parts)
            return torch.tensor(NORM, dtype=torch.float64)

        return norm


class Model(nn.Module):
    """One layer accumulates inside and outside a re-entrant checkpoint, so it is late at first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
        self.by_hand = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.shared(x))
        x = checkpoint(lambda y: torch.tanh(self.shared(y)), x, use_reentrant=True)
        return self.head(x).sum()


def trained(keys: dict[str, Any]) -> tuple[float | None, dict[str, torch.Tensor]]:
    module = Model()
    engine, *_ = drivetrain.initialize(
        model=module,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
            "data_parallel": {"bucket_bytes": 64, "first_bucket_bytes": 16},
            "plugins": {"changing": True},
            **keys,
        },
        registry=Registry.installed().with_plugins(Changing),
    )
    engine.get_global_grad_norm()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for micro in range(2):
        engine.backward(engine(torch.full((2, 4), 0.1 * (micro + 1))))
        module.by_hand.grad = torch.ones(3)
        engine.step()
    change = {name: before[name] - p.detach() for name, p in module.named_parameters()}
    norm = engine.get_global_grad_norm()
    engine.destroy()
    return norm, change


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("limit", [0.0, 1.0], ids=["", "clipped"])
def test_every_gradient_is_changed_once_and_the_norm_is_the_plugins(
    world: int, limit: float
) -> None:
    model = Model()
    for micro in range(2):
        model(torch.full((2, 4), 0.1 * (micro + 1))).backward()
    model.by_hand.grad = torch.full((3,), 2.0)
    clip = min(1.0, limit / (NORM / (2 * world))) if limit else 1.0
    for norm, change in run_distributed(trained, world, {"gradient_clipping": limit}):
        assert norm == pytest.approx(NORM / (2 * world))
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            expected = FACTOR * clip * parameter.grad / 2
            torch.testing.assert_close(change[name], expected, rtol=1e-5, atol=1e-6)

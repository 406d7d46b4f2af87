"""The package holds to what Drivetrain asks of a plugin and of its state, and measures rightly."""

from __future__ import annotations

import pytest
import torch
from noise_scale_drivetrain import NoiseScale, gradient_noise_scale
from torch import nn

import drivetrain
from drivetrain.plan.registry import Registry
from drivetrain.testing import PluginConformance, StateConformance, run_distributed

DECAY, STEPS, MICRO_BATCH = 0.8, 6, 4


class TestNoiseScale(PluginConformance):
    plugin = NoiseScale
    config = {"gradient_noise_scale": {"decay": 0.9}}


class TestItsState(StateConformance):
    plugin = NoiseScale
    config = {"gradient_noise_scale": {"decay": 0.9}}

    # Alone, a rank has nothing to compare its gradients with.
    rest = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    }


def data(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    inputs = torch.randn(MICRO_BATCH, 5, generator=generator)
    return inputs, inputs.sum(1, keepdim=True) + torch.randn(MICRO_BATCH, 1, generator=generator)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, 1)


def measured() -> float | None:
    engine, *_ = drivetrain.initialize(
        model=model(),
        config={
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_clipping": 0.5,
            "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
            "gradient_noise_scale": {"decay": DECAY},
        },
        registry=Registry.installed().with_plugins(NoiseScale),
    )
    for step in range(STEPS):
        inputs, targets = data(step, engine.job.rank)
        engine.backward((engine(inputs) - targets).square().mean())
        engine.step()
    found = gradient_noise_scale(engine)
    engine.destroy()
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_the_scale_is_that_of_the_formulas_in_float64(world: int) -> None:
    module, signal, noise = model().double(), 0.0, 0.0
    small, large = MICRO_BATCH, MICRO_BATCH * world
    for step in range(STEPS):
        gradients = []
        for rank in range(world):
            inputs, targets = (values.double() for values in data(step, rank))
            loss = (module(inputs) - targets).square().mean()
            parts = torch.autograd.grad(loss, list(module.parameters()))
            gradients.append(torch.cat([part.flatten() for part in parts]))
        own = float(sum(g.square().sum() for g in gradients)) / world
        whole = float((sum(gradients) / world).square().sum())
        signal = DECAY * signal + (1 - DECAY) * (large * whole - small * own) / (large - small)
        noise = DECAY * noise + (1 - DECAY) * (own - whole) / (1 / small - 1 / large)
    for found in run_distributed(measured, world):
        assert found == pytest.approx(noise / signal, rel=1e-4)

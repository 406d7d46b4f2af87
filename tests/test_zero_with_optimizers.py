"""Optimizers of other distributions work on ZeRO's shards, or are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError
from drivetrain.states.whole import whole
from drivetrain.testing import RanksFailedError, run_distributed
from drivetrain.testing.data import tokens
from drivetrain.testing.models import TinyGPT

STEPS, BATCH = 4, 4
STAGES = (1, 2, 3)

Trained = tuple[list[float], dict[str, torch.Tensor]]
"""Losses by step, and the parameters at the end."""

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Lamb": {"lr": 0.02, "betas": [0.9, 0.99], "weight_decay": 0.1},
    "Lion": {"lr": 1e-3, "weight_decay": 0.1},
    "Muon": {"lr": 0.02, "momentum": 0.9, "adam_lr": 1e-2},
}


def model() -> nn.Module:
    torch.manual_seed(6)
    return TinyGPT(layers=3)


def train(name: str, stage: int) -> Trained:
    """One rank's losses and all parameters."""
    module = model()
    engine, *_ = drivetrain.initialize(
        model=module,
        config={
            "train_batch_size": BATCH,
            "gradient_clipping": 0.1,
            "optimizer": {"type": name, "params": OPTIMIZERS.get(name, {"lr": 1e-3})},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        },
    )
    rows = BATCH // engine.job.world_size
    losses = []
    for step in range(STEPS):
        inputs, targets = tokens(STEPS * BATCH)
        own = slice(step * BATCH + engine.job.rank * rows, None)
        loss = engine(inputs[own][:rows], targets[own][:rows])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    with whole(module):
        parameters = {n: p.detach().clone() for n, p in module.named_parameters()}
    engine.destroy()
    return losses, parameters


def plain(update: Callable[[list[nn.Parameter], int], None], clipping: float = 0.1) -> Trained:
    """One process with nothing but torch; ``update(parameters, step)`` is counted from 1."""
    module, losses = model(), []
    inputs, targets = tokens(STEPS * BATCH)
    for step in range(STEPS):
        module.zero_grad()
        rows = slice(step * BATCH, (step + 1) * BATCH)
        loss = module(inputs[rows], targets[rows])
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), clipping)
        with torch.no_grad():
            update(list(module.parameters()), step + 1)
        losses.append(loss.item())
    return losses, {n: p.detach() for n, p in module.named_parameters()}


class PlainLamb:
    """LAMB without bias correction, tensor by tensor, in float64 (arXiv:1904.00962)."""

    def __init__(self) -> None:
        self.moments: list[list[torch.Tensor]] = []

    def __call__(self, parameters: list[nn.Parameter], step: int) -> None:
        lr, (beta1, beta2), decay = OPTIMIZERS["Lamb"].values()
        if step == 1:
            self.moments = [[torch.zeros_like(p).double() for p in parameters] for _ in range(2)]
        for p, m, v in zip(parameters, *self.moments, strict=True):
            assert p.grad is not None
            gradient, weights = p.grad.double(), p.double()
            m.mul_(beta1).add_(gradient * (1 - beta1))
            v.mul_(beta2).add_(gradient**2 * (1 - beta2))
            move = m / (v.sqrt() + 1e-8) + decay * weights
            norms = weights.norm(), move.norm()
            trust = (norms[0] / norms[1]).clamp(0.01, 10.0) if all(norms) else 1.0
            p.copy_(weights - lr * trust * move)


def compare(found: Sequence[Trained], expected: Trained) -> None:
    """Parameters within rounding, but for biases of keys: their gradient is nothing but it."""
    means = [sum(step) / len(found) for step in zip(*(f[0] for f in found), strict=True)]
    assert means == pytest.approx(expected[0], rel=2e-5)
    for _, parameters in found:
        for name, values in parameters.items():
            if not name.endswith("qkv.bias"):
                torch.testing.assert_close(values, expected[1][name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [2, 4])
def test_lamb_takes_the_norms_of_whole_tensors(stage: int, world: int) -> None:
    compare(run_distributed(train, world, "Lamb", stage), plain(PlainLamb()))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["Lion", "Muon"])
def test_an_optimizer_updates_shards_as_it_does_in_one_process(name: str, stage: int) -> None:
    """Its own distribution holds what it does in one process to its paper."""
    (alone,) = run_distributed(train, 1, name, 0)
    compare(run_distributed(train, 2, name, stage), alone)


ONE_BIT = ("OneBitAdam", "OneBitLamb", "ZeroOneAdam")


def test_an_optimizer_that_communicates_is_refused_on_every_rank() -> None:
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(train, 2, "OneBitAdam", 3)
    assert len(caught.value.errors) == 2
    for error in caught.value.errors.values():
        assert "ConfigError: optimizer.type = OneBitAdam cannot be combined" in error.error


def refuse(name: str, zero: dict[str, Any]) -> str:
    config = {
        "train_batch_size": 1,
        "optimizer": {"type": name, "params": {}},
        "zero_optimization": zero,
    }
    with pytest.raises(ConfigError) as caught:
        drivetrain.initialize(model=nn.Linear(2, 2), config=config)
    return str(caught.value)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ONE_BIT)
def test_an_optimizer_that_communicates_is_refused_by_name(name: str, stage: int) -> None:
    said = refuse(name, {"stage": stage})
    assert f"optimizer.type = {name} cannot be combined with" in said
    assert f"zero_optimization.stage = {stage}: " in said
    assert "use stage 0" in said


@pytest.mark.parametrize("name", ONE_BIT)
@pytest.mark.parametrize("home", ["cpu", "nvme"])
def test_its_states_cannot_leave_the_device(
    name: str, home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offload = {"device": home, "nvme_path": str(tmp_path)}
    # As where the device is an accelerator; host memory is where states of jobs on CPUs are anyway.
    for module in ("drivetrain_offload.placement", "drivetrain_offload.files.home"):
        monkeypatch.setattr(f"{module}.is_host", lambda _job: False)
    said = refuse(name, {"stage": 0, "offload_optimizer": offload})
    assert f"offload_optimizer: the optimizer {name} communicates gradients by itself" in said
    assert "use device none, or another optimizer.type" in said


DECAY = 0.5


def averaged(stage: int, keys: dict[str, Any]) -> tuple[Trained, dict[str, torch.Tensor]]:
    """One rank's training with gradient descent, and the averages of its weights at the end."""
    module = model()
    engine, *_ = drivetrain.initialize(
        model=module,
        config={
            "train_batch_size": BATCH,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "weight_average": {"decay": DECAY},
            "zero_optimization": {
                "stage": stage,
                "stage3_param_persistence_threshold": 0,
                **keys,
            },
        },
    )
    rows = BATCH // engine.job.world_size
    losses = []
    inputs, targets = tokens(STEPS * BATCH)
    for step in range(STEPS):
        own = slice(step * BATCH + engine.job.rank * rows, None)
        loss = engine(inputs[own][:rows], targets[own][:rows])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        with engine.averaged_weights():
            engine(inputs[:rows], targets[:rows])
    with engine.averaged_weights(), whole(module):
        averages = {n: p.detach().clone() for n, p in module.named_parameters()}
    with whole(module):
        parameters = {n: p.detach().clone() for n, p in module.named_parameters()}
    engine.destroy()
    return (losses, parameters), averages


@pytest.mark.parametrize(
    ("stage", "keys"),
    [(1, {}), (2, {}), (3, {}), (3, {"offload_optimizer": {"device": "cpu"}})],
    ids=["1", "2", "3", "3, offloaded"],
)
def test_weights_are_averaged_in_shards_and_training_goes_on_from_its_own(
    stage: int, keys: dict[str, Any]
) -> None:
    shadow: dict[int, torch.Tensor] = {}

    def follow(parameters: list[nn.Parameter], step: int) -> None:
        for number, parameter in enumerate(parameters):
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
            if step == 1:
                shadow[number] = parameter.detach().clone()
            shadow[number] = DECAY * shadow[number] + (1 - DECAY) * parameter

    expected = plain(follow, clipping=float("inf"))
    answers = run_distributed(averaged, 2, stage, keys)
    compare([answer for answer, _ in answers], expected)
    for _, averages in answers:
        for number, name in enumerate(expected[1]):
            torch.testing.assert_close(averages[name], shadow[number], rtol=1e-3, atol=1e-5)

"""Rules that communicate by themselves, and what states of such rules survive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.contracts import (
    Atom,
    AxisRequest,
    Box,
    BucketSpec,
    BucketView,
    Hyper,
    Placement,
    Plugin,
    Purpose,
    StateSpec,
    Tag,
    UpdateRule,
    hookimpl,
)
from drivetrain.job.job import Job
from drivetrain.plan.registry import Registry
from drivetrain.testing import assert_trains_like_reference, data, reference_losses, run_distributed
from drivetrain.testing.models import mlp

SEEN = "updates seen"


class OwnSum(UpdateRule):
    """Gradient descent that sums gradients itself from the third step on, and counts its calls."""

    def __init__(self, job: Job) -> None:
        self.defaults = {"lr": 0.1}
        self._job = job

    def states(self, bucket: BucketSpec) -> Sequence[StateSpec]:
        # As long as the bucket by coincidence, but every rank has its own.
        return [StateSpec(SEEN, numel=bucket.numel)]

    def wants_reduced(self, step: int) -> bool:
        return step <= 2

    def update(self, bucket: BucketView, hyper: Hyper, scale: float | torch.Tensor) -> None:
        term = bucket.gradient * scale
        if not self.wants_reduced(bucket.step):
            tag = Tag(Purpose.STATE, bucket.key, "own sum")
            self._job.communicator.all_reduce(term, bucket.reduction, tag)
        bucket.weights.sub_(term, alpha=hyper["lr"])
        bucket.states[SEEN].add_(1 + self._job.rank)


def own_sum(params: Mapping[str, Any], job: Job) -> UpdateRule:
    return OwnSum(job)


def registry() -> Registry:
    answer = Registry.installed()
    answer.add("optimizers", "OwnSum", own_sum)
    return answer


def config(**keys: Any) -> dict[str, Any]:
    return {
        "train_batch_size": 12,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "OwnSum"},
        "data_parallel": {"bucket_bytes": 512, "first_bucket_bytes": 64},
        **keys,
    }


def batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    inputs, targets = data.vectors(12 * steps)
    return [(inputs[i : i + 12], targets[i : i + 12]) for i in range(0, 12 * steps, 12)]


def start(keys: dict[str, Any]) -> drivetrain.Engine:
    engine, *_ = drivetrain.initialize(model=mlp(), config=config(**keys), registry=registry())
    return engine


def train(engine: drivetrain.Engine, steps: int, begin: int = 0) -> list[float]:
    """Mean losses over ranks of the steps from ``begin``."""
    micro = engine.train_micro_batch_size_per_gpu()
    accumulation = engine.gradient_accumulation_steps()
    losses = []
    for inputs, targets in batches(begin + steps)[begin:]:
        place = engine.job.mesh.coordinate("dp") * accumulation * micro
        rows = range(place, place + accumulation * micro, micro)
        parts = iter([(inputs[i : i + micro], targets[i : i + micro]) for i in rows])
        losses.append(float(engine.train_batch(parts)))
    return losses


def trained(keys: dict[str, Any]) -> list[float]:
    engine = start(keys)
    losses = train(engine, 6)
    engine.destroy()
    return losses


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(
    "keys",
    [{}, {"gradient_predivide_factor": 4.0}, {"prescale_gradients": True}, {"accumulate": 2}],
    ids=str,
)
def test_a_rule_that_sums_its_terms_trains_like_the_reference(
    world: int, keys: dict[str, Any]
) -> None:
    keys = dict(keys)
    if keys.pop("accumulate", None):
        keys["gradient_accumulation_steps"] = 2
    model = mlp()
    expected = reference_losses(
        model, [[batch] for batch in batches(6)], lambda p: torch.optim.SGD(p, lr=0.1)
    )
    for losses in run_distributed(trained, world, keys):
        assert losses == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("world", [1, 2])
def test_a_predivide_factor_cancels_out(world: int) -> None:
    settings = {
        "train_batch_size": 4,
        "gradient_predivide_factor": 4.0,
        "gradient_clipping": 0.05,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    assert_trains_like_reference(settings, world, steps=5)


def save_and_go_on(folder: str) -> dict[str, Any]:
    engine = start({})
    train(engine, 3)
    engine.save_checkpoint(folder)
    losses = train(engine, 3, begin=3)
    seen = own_states(engine)
    engine.destroy()
    return {"losses": losses, "seen": seen}


def resume(folder: str) -> dict[str, Any]:
    engine = start({})
    engine.load_checkpoint(folder)
    losses = train(engine, 3, begin=3)
    seen = own_states(engine)
    engine.destroy()
    return {"losses": losses, "seen": seen}


def own_states(engine: drivetrain.Engine) -> list[float]:
    return [float(f.read()[0]) for f in engine.states.fragments() if f.kind == SEEN]


@pytest.mark.parametrize("world", [1, 2])
def test_resuming_goes_on_with_the_step_and_every_ranks_own_state(
    world: int, tmp_path: Path
) -> None:
    straight = run_distributed(save_and_go_on, world, str(tmp_path))
    resumed = run_distributed(resume, world, str(tmp_path))
    assert resumed == straight
    for rank, answer in enumerate(resumed):
        assert set(answer["seen"]) == {6.0 * (1 + rank)}


def adam_steps(folder: str, load: bool) -> list[float]:
    settings = config(optimizer={"type": "AdamW", "params": {"lr": 1e-2}})
    engine, *_ = drivetrain.initialize(model=mlp(), config=settings)
    if load:
        engine.load_checkpoint(folder)
    else:
        train(engine, 2)
        engine.save_checkpoint(folder)
    losses = train(engine, 3, begin=2)
    engine.destroy()
    return losses


def test_bias_correction_goes_on_after_resuming(tmp_path: Path) -> None:
    straight = run_distributed(adam_steps, 1, str(tmp_path), False)
    assert run_distributed(adam_steps, 1, str(tmp_path), True) == straight
    expected = reference_losses(
        mlp(),
        [[batch] for batch in batches(5)],
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0),
    )
    assert straight[0] == pytest.approx(expected[2:], rel=1e-6)


class Sliced(nn.Module):
    """A replicated scale, and a weight of which every tensor-parallel rank has a part."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.weight = nn.Parameter(torch.ones(3))
        self.factor = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((self.scale + self.factor * self.weight) * x).sum()


class Slices(Plugin):
    name = "slices"

    @hookimpl
    def mesh_axes(self) -> Sequence[AxisRequest]:
        return [Atom("tp", 2)]

    @hookimpl
    def describe_parameters(self, job: Job, module: Sliced) -> None:
        part = Box((3 * job.mesh.coordinate("tp"),), (3,), 0)
        job.parameters.info(module.weight).placement = Placement((6,), (part,), "tp")


def norm_of_slices(optimizer: str) -> float:
    settings = {
        "train_batch_size": 2,
        "plugins": {"slices": True},
        "optimizer": {"type": optimizer, "params": {}},
    }
    model = Sliced()
    engine, *_ = drivetrain.initialize(
        model=model, config=settings, registry=registry().with_plugins(Slices)
    )
    model.factor = float(2 + engine.job.mesh.coordinate("tp"))
    for _ in range(3):
        engine.backward(engine(torch.tensor([1.0, 2.0, 2.0])))
        engine.step()
    norm = engine.get_global_grad_norm()
    engine.destroy()
    assert norm is not None
    return norm


@pytest.mark.parametrize("optimizer", ["SGD", "OwnSum"])
def test_the_norm_counts_replicas_once_and_parts_each(optimizer: str) -> None:
    """Gradients are x for the scale, 2x and 3x for the weight's parts; x has norm 3."""
    expected = 3.0 * (1 + 4 + 9) ** 0.5
    assert run_distributed(norm_of_slices, 4, optimizer) == pytest.approx([expected] * 4)

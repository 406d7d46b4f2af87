"""Elastic jobs: the same global batch on any number of ranks, and leaving with a checkpoint."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_elasticity.plugin import SCHEDULER_VARIABLE, Elasticity
from drivetrain_elasticity.preemption import Preempted, Preemption

import drivetrain
from drivetrain.errors import ConfigError
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry
from drivetrain.testing import PluginConformance, data, run_distributed
from drivetrain.testing.models import mlp

ELASTIC = {"enabled": True, "micro_batch_sizes": [1, 2, 3], "max_train_batch_size": 12}


class TestElasticity(PluginConformance):
    plugin = Elasticity
    config = {"elasticity": {**ELASTIC, "ignore_non_elastic_batch_info": True}}


class TestPreemption(PluginConformance):
    plugin = Preemption
    config = {"preemption": {"enabled": True, "save_dir": "checkpoints"}}


REGISTRY = Registry.installed().with_plugins(Elasticity, Preemption)


@pytest.mark.parametrize(("ranks", "micro", "steps"), [(1, 3, 4), (2, 3, 2), (3, 2, 2), (6, 2, 1)])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(
    ranks: int, micro: int, steps: int
) -> None:
    config = {"elasticity": ELASTIC, "optimizer": {"type": "SGD"}}
    batch = Plan.build(config, world_size=ranks, registry=REGISTRY).batch
    assert batch is not None
    assert batch.train_batch_size == 12
    assert (batch.micro_batch_size, batch.accumulation_steps) == (micro, steps)


def test_batch_sizes_beside_the_section_are_refused_or_overruled() -> None:
    config: dict[str, Any] = {"elasticity": ELASTIC, "train_batch_size": 8}
    with pytest.raises(ConfigError) as caught:
        Plan.build(config, world_size=2, registry=REGISTRY)
    assert (
        "(12 = 3 micro-batch x 2 accumulation x 2 data shards), but the config gives "
        "train_batch_size 8: leave them out"
    ) in str(caught.value)
    config["elasticity"] = {**ELASTIC, "ignore_non_elastic_batch_info": True}
    batch = Plan.build(config, world_size=2, registry=REGISTRY).batch
    assert batch is not None
    assert batch.train_batch_size == 12


def test_a_section_that_differs_from_the_scheduler_s_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(SCHEDULER_VARIABLE, json.dumps({**ELASTIC, "max_train_batch_size": 24}))
    with pytest.raises(ConfigError, match="is 12, but the scheduler has planned with 24"):
        Plan.build({"elasticity": ELASTIC}, world_size=2, registry=REGISTRY)


def engine_of(folder: str, keys: dict[str, Any]) -> drivetrain.Engine:
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "preemption": {"enabled": True, "save_dir": folder, **keys},
    }
    return drivetrain.initialize(model=mlp(), config=config, registry=REGISTRY)[0]


def step(engine: drivetrain.Engine) -> None:
    inputs, targets = data.vectors(4)
    share = engine.train_micro_batch_size_per_gpu()
    rows = slice(engine.job.rank * share, (engine.job.rank + 1) * share)
    engine.backward(engine(inputs[rows], targets[rows]))
    engine.step()


def told_to_leave(folder: str, number: int, keys: dict[str, Any]) -> tuple[int, int, bool]:
    """Steps, exit status, and whether the handler of before is back."""
    before = signal.getsignal(number)
    engine = engine_of(folder, keys)
    try:
        for index in range(10):
            if index == 3 and engine.job.rank == 1:
                os.kill(os.getpid(), number)  # one rank alone
            step(engine)
    except Preempted as left:
        status = left.code
    else:
        status = -1
    return engine.global_steps, int(status or 0), signal.getsignal(number) == before


@pytest.mark.parametrize(
    ("number", "keys"),
    [(signal.SIGTERM, {}), (signal.SIGUSR1, {"signals": ["SIGUSR1", "SIGTERM"]})],
)
def test_a_signal_to_one_rank_makes_all_save_after_the_same_step(
    number: signal.Signals, keys: dict[str, Any], tmp_path: Path
) -> None:
    # seen in step 4, told at its end, known at the end of step 5
    assert run_distributed(told_to_leave, 2, str(tmp_path), number, keys) == [(5, 0, True)] * 2
    steps, weights = run_distributed(resumed, 1, str(tmp_path))[0]
    assert steps == 5
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights, run_distributed(unbroken, 2, str(tmp_path))[0], strict=True)
    )


def resumed(folder: str) -> tuple[int, list[torch.Tensor]]:
    engine = engine_of(folder, {})
    engine.load_checkpoint(folder)
    found = [p.detach().clone() for p in engine.module.parameters()]
    engine.destroy()
    engine.job.close()
    return engine.global_steps, found


def unbroken(folder: str) -> list[torch.Tensor]:
    engine = engine_of(folder, {})
    for _ in range(5):
        step(engine)
    found = [p.detach().clone() for p in engine.module.parameters()]
    engine.destroy()
    engine.job.close()
    return found


def test_a_folder_is_needed() -> None:
    with pytest.raises(ConfigError, match="save_dir is needed"):
        Plan.build({"preemption": {"enabled": True}}, registry=REGISTRY)

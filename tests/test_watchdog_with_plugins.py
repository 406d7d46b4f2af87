"""The watchdog beside ZeRO, offload and a pipeline: no false alarm, and the right one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drivetrain_watchdog.plugin import Watchdog

import drivetrain
from drivetrain.plan.registry import Registry
from drivetrain.testing import RanksFailedError, data, models, pipeline, run_distributed

REGISTRY = Registry.installed().with_plugins(Watchdog, pipeline.ToyPipeline)


def engine_of(module: Any, **keys: Any) -> drivetrain.Engine:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "communication": {"watchdog": {"patience_seconds": 60}},
        **keys,
    }
    return drivetrain.initialize(model=module, config=config, registry=REGISTRY)[0]


def steps(engine: drivetrain.Engine, count: int) -> list[float]:
    inputs, targets = data.tokens(4)
    rows = slice(2 * engine.job.rank, 2 * engine.job.rank + 2)
    losses = []
    for _ in range(count):
        loss = engine(inputs[rows], targets[rows])
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def trained(zero: dict[str, Any], watched: bool, folder: str) -> list[float]:
    keys = {} if watched else {"communication": {"watchdog": {"enabled": False}}}
    engine = engine_of(models.tiny_gpt(), zero_optimization=zero, **keys)
    losses = steps(engine, 3)
    engine.save_checkpoint(folder)
    engine.load_checkpoint(folder)
    losses += steps(engine, 3)
    engine.destroy()
    engine.job.close()
    return losses


@pytest.mark.parametrize(
    "zero",
    [
        pytest.param({"stage": 1}, marks=pytest.mark.long),
        {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        {"stage": 3},
        pytest.param(
            {
                "stage": 3,
                "offload_param": {"device": "cpu"},
                "offload_optimizer": {"device": "cpu"},
            },
            marks=pytest.mark.long,
        ),
        pytest.param({"stage": 3, "zero_hpz_partition_size": 2}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_training_is_the_same_with_it(zero: dict[str, Any], tmp_path: Any) -> None:
    watched = run_distributed(trained, 2, zero, True, str(tmp_path))
    assert watched == run_distributed(trained, 2, zero, False, str(tmp_path))


def walks_otherwise(stage: int) -> None:
    """Rank 1 leaves its loop after two steps, and evaluates."""
    engine = engine_of(models.tiny_gpt(), zero_optimization={"stage": stage})
    steps(engine, 2)
    if engine.job.rank == 1:
        with torch.no_grad():
            engine.save_checkpoint("nowhere")
    steps(engine, 2)


@pytest.mark.parametrize(
    "stage", [3, *(pytest.param(stage, marks=pytest.mark.long) for stage in (0, 1, 2))]
)
def test_a_save_on_one_rank_is_told_on_both(stage: int, tmp_path: Any) -> None:
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(walks_otherwise, 2, stage, timeout=60.0)
    for rank in (0, 1):
        said = caught.value.errors[rank].error
        assert "rank 1 issues all_reduce of control/checkpoint agreement" in said
        assert "rank 0 issues" in said


def piped() -> Any:
    keys = {"toy_pipeline": {"stages": 2}, "gradient_accumulation_steps": 2}
    engine = engine_of(pipeline.Layers(), **keys, gradient_clipping=0.7)
    curve = pipeline.train_stages(engine, 0, 3, 2)
    engine.destroy()
    engine.job.close()
    return curve


def test_a_pipeline_trains() -> None:
    expected, _ = pipeline.train_alone(3, 2, 1, 0.1, 0.7)
    for curve in run_distributed(piped, 2):
        assert [loss for loss, _ in curve] == pytest.approx([loss for loss, _ in expected], 1e-5)

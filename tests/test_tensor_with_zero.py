"""Tensor parallelism beside ZeRO's stages, offloading, precision, accumulation and checkpoints."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensor_decoder import Decoder, data, make, reference, train

from drivetrain.testing import run_distributed

STEPS = 3
CPU = {"device": "cpu"}

CASES: dict[str, dict[str, Any]] = {
    "stage 0, clipped": {"gradient_clipping": 0.5},
    "stage 1, clipped": {"zero_optimization": {"stage": 1}, "gradient_clipping": 0.5},
    "stage 2, accumulated": {
        "zero_optimization": {"stage": 2},
        "gradient_accumulation_steps": 2,
    },
    "stage 3, clipped": {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.5,
    },
    "stage 2, offloaded": {"zero_optimization": {"stage": 2, "offload_optimizer": CPU}},
    "stage 3, offloaded": {
        "zero_optimization": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}
    },
    "stage 1, recomputed and overlapped": {
        "zero_optimization": {"stage": 1},
        "activation_checkpointing": {"recompute": "all"},
        "tensor_parallel": {"autotp_size": 2, "tp_overlap_comm": True},
    },
    **{
        f"stage {stage}, sequences shared out": {
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "activation_checkpointing": {"recompute": "all" if stage % 2 else "none"},
            "gradient_clipping": 0.5,
            "tensor_parallel": {"autotp_size": 2, "sequence_parallel": True},
        }
        for stage in range(4)
    },
    "stage 2, sequences gathered while layers multiply": {
        "zero_optimization": {"stage": 2},
        "activation_checkpointing": {"recompute": "all"},
        "tensor_parallel": {
            "autotp_size": 2,
            "sequence_parallel": True,
            "tp_overlap_comm": True,
        },
    },
    **{
        f"stage {stage}, in halves": {
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "activation_checkpointing": {"recompute": "all" if stage % 2 else "none"},
            "gradient_clipping": 0.5,
            "tensor_parallel": {"autotp_size": 2, "domino": True},
        }
        for stage in (1, 2, 3)
    },
}
LOW: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}},
    "fp16": {
        "fp16": {"enabled": True, "initial_scale_power": 8},
        "zero_optimization": {"stage": 3},
    },
}


def every(cases: dict[str, dict[str, Any]], single: bool = False) -> dict[str, Any]:
    """Losses of this rank by case, and its place along ``dp``."""
    found = {}
    for name, config in cases.items():
        model = Decoder() if single else Decoder().double()
        engine = make(2, model, **config)
        found[name] = engine.job.mesh.coordinate("dp"), train(engine, 0, STEPS)
        engine.destroy()
    return found


def test_every_stage_trains_as_one_process() -> None:
    for results in run_distributed(every, 4, CASES):
        for name, (shard, losses) in results.items():
            micro = CASES[name].get("gradient_accumulation_steps", 1)
            clipping = CASES[name].get("gradient_clipping", 0.0)
            steps = reference(0, STEPS, 2 * micro, clipping)
            expected = [step[shard + 2 * number] for step in steps for number in range(micro)]
            assert losses == pytest.approx(expected, rel=1e-9), name


def test_low_precision_stays_near() -> None:
    for results in run_distributed(every, 4, LOW, True):
        for name, (shard, losses) in results.items():
            expected = [step[shard] for step in reference(0, STEPS, 2)]
            assert losses == pytest.approx(expected, rel=5e-2), name


def late_updates() -> tuple[int, list[float]]:
    """Losses where every update of one of the ranks along ``tp`` comes late."""
    engine = make(2, zero_optimization={"stage": 3, "stage3_param_persistence_threshold": 0})
    if engine.job.mesh.coordinate("tp") == 1:
        states: Any = engine.states
        for bucket in states._sums:
            home = bucket.parameters.home
            home.update = partial(late, home.update)
    found = engine.job.mesh.coordinate("dp"), train(engine, 0, STEPS)
    engine.destroy()
    return found


def late(update: Any, *arguments: Any) -> None:
    time.sleep(0.05)
    update(*arguments)


def test_no_rank_reads_what_another_has_yet_to_update() -> None:
    """Norms of queries are shared out over ``tp``, too, and ranks read them where they lie."""
    for shard, losses in run_distributed(late_updates, 4):
        expected = [step[shard] for step in reference(0, STEPS, 2)]
        assert losses == pytest.approx(expected, rel=1e-9)


# -- checkpoints -----------------------------------------------------------------------------------


def save(folder: str, tp: int, stage: int) -> None:
    engine = make(tp, zero_optimization={"stage": stage})
    train(engine, 0, 1)
    engine.save_checkpoint(folder)
    engine.destroy()


def load(folder: str, tp: int, stage: int) -> tuple[int, list[float]]:
    engine = make(tp, zero_optimization={"stage": stage})
    engine.load_checkpoint(folder)
    found = engine.job.mesh.coordinate("dp"), train(engine, 1, STEPS)
    engine.destroy()
    return found


def test_a_checkpoint_loads_at_another_number_of_ranks(tmp_path: Path) -> None:
    """Two shards of data all along: momentum, tied weights and joint parts come along."""
    expected = reference(1, STEPS, 2)
    run_distributed(save, 4, str(tmp_path / "cut"), 2, 1)
    run_distributed(save, 2, str(tmp_path / "whole"), 1, 2)
    rows = [("cut", 2, 1, 0), ("cut", 4, 2, 3), ("whole", 4, 2, 2)]
    for name, world, tp, stage in rows:
        for shard, losses in run_distributed(load, world, str(tmp_path / name), tp, stage):
            wanted = [step[shard] for step in expected]
            assert losses == pytest.approx(wanted, rel=1e-9), (name, tp, stage)


def gradients(stage: int) -> dict[str, torch.Tensor]:
    from drivetrain_zero import safe_get_full_grad

    engine = make(2, zero_optimization={"stage": stage})
    engine.backward(engine(*data(0)))
    found = {}
    for parameter in engine.module.parameters():
        gradient = safe_get_full_grad(parameter)
        assert gradient is not None
        found[engine.job.parameters.info(parameter).name] = gradient.clone()
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_scripts_see_whole_gradients(stage: int) -> None:
    model = Decoder().double()
    model(*data(0)).backward()
    for found in run_distributed(gradients, 2, stage):
        assert found.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            assert torch.allclose(found[name], parameter.grad, rtol=1e-9, atol=1e-12), name

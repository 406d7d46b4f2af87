"""A job that has trained and loads without optimizer states goes on as a new one that does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.testing import run_distributed

HOST = {"device": "cpu"}
CASES: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1},
    "stage 3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "host": {"stage": 2, "offload_optimizer": HOST},
    "delayed": {"stage": 1, "offload_optimizer": {**HOST, "delayed_update": True}},
    "speculative": {"stage": 1, "offload_optimizer": {**HOST, "super_offload": True}},
    "split": {"stage": 1, "offload_optimizer": {**HOST, "ratio": 0.5}},
    "zenflow": {
        "stage": 1,
        "offload_optimizer": HOST,
        "zenflow": {"topk_ratio": 0.3, "update_interval": 2, "select_strategy": "step"},
    },
    "files": {"stage": 3, "offload_optimizer": {"device": "nvme"}},
    "one bit": {"stage": 0},
}


def make(name: str, folder: str) -> Engine:
    torch.manual_seed(0)
    zero = {**CASES[name]}
    if zero.get("offload_optimizer", {}).get("device") == "nvme":
        zero["offload_optimizer"] = {"device": "nvme", "nvme_path": f"{folder}/swap"}
    rule = "OneBitAdam" if name == "one bit" else "Adam"
    late = {"freeze_step": 2} if name == "one bit" else {}
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "optimizer": {"type": rule, "params": {"lr": 1e-2, **late}},
        "bf16": {"enabled": True},
        "zero_optimization": zero,
    }
    module = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 5))
    return drivetrain.initialize(model=module, config=config)[0]


def train(engine: Engine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(10 * step + engine.job.rank)
        loss = engine(torch.randn(3, 4, generator=generator).bfloat16()).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def go_on(folder: str, names: Sequence[str]) -> dict[str, tuple[list[float], list[float]]]:
    """Losses after the load, of an engine that has trained and of a new one."""
    found = {}
    for name in names:
        place, ends = f"{folder}/{name}", []
        engine = make(name, place)
        train(engine, range(3))
        engine.save_checkpoint(place, "t")
        train(engine, range(3, 8))
        for _ in range(2):
            engine.load_checkpoint(place, "t", load_optimizer_states=False)
            ends.append(train(engine, range(8, 13)))
            engine.destroy()
            engine = make(name, place)
        engine.destroy()
        found[name] = (ends[0], ends[1])
    return found


def test_a_used_engine_goes_on_as_a_new_one(tmp_path: Path) -> None:
    for found in run_distributed(go_on, 2, str(tmp_path), list(CASES)):
        different = [name for name, (used, new) in found.items() if used != new]
        assert not different, {name: found[name] for name in different}

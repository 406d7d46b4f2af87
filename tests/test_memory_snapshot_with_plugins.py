"""What a step of ZeRO and of recomputed blocks has at the peak of its memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import drivetrain
from drivetrain.testing import run_distributed
from drivetrain.testing.models import TinyGPT

TOKENS = (4, 32)


def trained(folder: Path, keys: dict[str, Any]) -> None:
    config = {
        "train_micro_batch_size_per_gpu": TOKENS[0],
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "memory_snapshot": {"path": str(folder)},
        **keys,
    }
    torch.manual_seed(0)
    engine = drivetrain.initialize(model=TinyGPT(64, 64, 3), config=config)[0]
    tokens = torch.randint(64, TOKENS)
    for _ in range(3):
        engine.backward(engine(tokens, tokens))
        engine.step()
    engine.job.close()


def snapshot(folder: Path, keys: dict[str, Any], rank: int = 0) -> dict[str, Any]:
    run_distributed(trained, 2, folder, keys)
    found: dict[str, Any] = json.loads((folder / f"rank{rank}.json").read_text())
    found["kinds"] = {
        kind: sum(p["nbytes"] for p in found["pieces"] if p["kind"] == kind)
        for kind in {p["kind"] for p in found["pieces"]}
    }
    return found


ZERO = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
STATES = ("optimizer: exp_avg", "optimizer: exp_avg_sq")


def test_ranks_of_zero_have_half_of_the_states_and_units_that_are_gathered(tmp_path: Path) -> None:
    size = 4 * sum(p.numel() for p in TinyGPT(64, 64, 3).parameters())
    plain = snapshot(tmp_path / "plain", {})
    sharded = snapshot(tmp_path / "zero", ZERO, rank=1)
    for state in STATES:
        assert plain["kinds"][state] == size
        assert sharded["kinds"][state] == pytest.approx(size / 2, rel=0.01)  # padded
    assert plain["kinds"]["parameters"] == size
    assert sharded["kinds"]["parameters"] < 0.6 * size
    assert "gathered parameters" not in plain["kinds"]
    assert sharded["kinds"]["gathered parameters"] > 0
    assert sharded["nbytes"] < plain["nbytes"]


def test_recomputed_blocks_keep_no_activations_inside(tmp_path: Path) -> None:
    keys = {"activation_checkpointing": {"recompute": "all"}}

    def inside(found: dict[str, Any]) -> int:
        return sum(
            p["nbytes"]
            for p in found["pieces"]
            if p["kind"] == "activations" and "blocks." in p["module"] and p["phase"] == "forward"
        )

    kept, again = snapshot(tmp_path / "kept", {}), snapshot(tmp_path / "again", keys)
    assert inside(again) < 0.3 * inside(kept)
    assert again["nbytes"] < kept["nbytes"]

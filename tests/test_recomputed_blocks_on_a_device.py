"""Recomputed blocks whose inputs wait in host memory, beside a device that is not the host."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from drivetrain.testing import run_distributed
from drivetrain.testing.distributed import start_anew

sys.path.insert(0, str(Path(__file__).parent / "private_use"))

import activations_away
from warp_accelerator import library

HOST = {"recompute": "all", "cpu_checkpointing": True}
CONTIGUOUS = {**HOST, "contiguous_memory_optimization": True, "number_checkpoints": 2}


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """Ranks find the device in the cache; they are new ones, see the tests of the device."""
    library().ensure_built()
    start_anew()


def config(stage: int, section: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **({} if section is None else {"activation_checkpointing": section}),
    }


@pytest.mark.parametrize("stage", [0, 3])
def test_losses_are_bitwise_those_without(stage: int) -> None:
    plain = run_distributed(activations_away.losses, 2, config(stage), None, 3)
    for section in (HOST, CONTIGUOUS):
        found = run_distributed(activations_away.losses, 2, config(stage, section), None, 3)
        assert found == plain


def test_the_device_holds_less_between_forward_and_backward() -> None:
    kept = [
        run_distributed(activations_away.bytes_between, 1, config(0, section), None)[0][0]
        for section in (None, {"recompute": 2}, {"recompute": "all"}, HOST)
    ]
    away = {"activation_offload": {"enabled": True, "min_bytes": 256, "keep_last": 0}}
    both = {**config(0, {"recompute": "all"}), **away}
    kept.append(run_distributed(activations_away.bytes_between, 1, both, None)[0][0])
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(kept)

"""Activations that leave a device which is not the host, between forward and backward.

The device is the one in C++ that torch lacks; it counts its memory itself.
"""

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

AWAY = {"activation_offload": {"enabled": True, "min_bytes": 256}}
BASE = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}
BF16 = {"bf16": {"enabled": True}}


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """Ranks find the device in the cache; they are new ones, see the tests of the device."""
    library().ensure_built()
    start_anew()


def config(stage: int, **more: Any) -> dict[str, Any]:
    offload = {key: more.pop(key) for key in list(more) if key.startswith("offload")}
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **offload}
    return {**BASE, **({"zero_optimization": zero} if stage else {}), **more}


CASES = {
    "plain": config(0),
    "accumulating": config(0, gradient_accumulation_steps=3),
    "fp16": config(0, fp16={"enabled": True, "initial_scale_power": 8}),
    "autocast": config(1, torch_autocast={"enabled": True}),
    "zero1": config(1, **BF16),
    "zero2": config(2, gradient_accumulation_steps=2, **BF16),
    "zero3": config(3, gradient_accumulation_steps=2, **BF16),
    "zero3-fp32": config(3),
    "kept-parameters": config(
        3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}, **BF16
    ),
}


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not-reentrant"])
@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
def test_losses_are_bitwise_those_without(given: dict[str, Any], checkpointing: str | None) -> None:
    arguments = (checkpointing, 3)
    plain = run_distributed(activations_away.losses, 2, given, *arguments)
    assert run_distributed(activations_away.losses, 2, {**given, **AWAY}, *arguments) == plain


@pytest.mark.parametrize("accelerator", ["warp", "cpu"])
@pytest.mark.parametrize("name", ["accumulating", "fp16", "zero2", "zero3"])
def test_activations_in_files_change_nothing(name: str, accelerator: str, tmp_path: Path) -> None:
    given = {**CASES[name], "accelerator": accelerator}
    files = {"device": "nvme", "nvme_path": str(tmp_path)}
    away = {"activation_offload": {**AWAY["activation_offload"], **files}}
    plain = run_distributed(activations_away.losses, 2, given, None, 3)
    assert run_distributed(activations_away.losses, 2, {**given, **away}, None, 3) == plain
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]
    assert left == []


def test_activations_in_files_leave_host_memory_too(tmp_path: Path) -> None:
    files = {"device": "nvme", "nvme_path": str(tmp_path), "keep_last": 0}
    away = {"activation_offload": {**AWAY["activation_offload"], **files}}
    rows = run_distributed(activations_away.places_between, 1, {**config(0), **away})[0]
    assert rows["nvme"] > 5 * rows["host"] > 0


def test_the_device_holds_less_between_forward_and_backward() -> None:
    """Of four blocks one keeps its activations, so that at most about half of all stays.

    As much leaves at stage 3: the weights that are gathered are none of it.
    """
    savings = []
    for stage in (0, 3):
        given = config(stage)
        plain = run_distributed(activations_away.bytes_between, 2, given, None)
        moved = run_distributed(activations_away.bytes_between, 2, {**given, **AWAY}, None)
        for (kept, peak, none), (ours, our_peak, host) in zip(plain, moved, strict=True):
            assert none == 0
            assert our_peak < peak
            # What left the device is in host memory; buffers are up to a page too large.
            assert host >= kept - ours
            savings.append(kept - ours)
            if stage == 0:
                assert ours < 0.5 * kept
    assert savings == pytest.approx([savings[0]] * 4, rel=0.02)


def test_more_blocks_kept_are_more_bytes_on_the_device() -> None:
    found = []
    for keep_last in (0, 1, 2, 4):
        section = {"activation_offload": {**AWAY["activation_offload"], "keep_last": keep_last}}
        given = {**config(0), **section}
        found.append(run_distributed(activations_away.bytes_between, 1, given, None)[0][0])
    assert found == sorted(set(found))


def test_checkpointed_blocks_leave_only_what_surrounds_them() -> None:
    given = config(0)
    plain = run_distributed(activations_away.bytes_between, 1, given, "not-reentrant")
    moved = run_distributed(activations_away.bytes_between, 1, {**given, **AWAY}, "not-reentrant")
    assert moved[0][0] < plain[0][0]
    assert moved[0][2] > 0

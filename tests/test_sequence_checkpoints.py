"""Checkpoints load, with states of optimizers, at another number of ranks of a sequence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain.testing import run_distributed

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins" / "sequence" / "tests"))

from sequence_models import batch, engine_of, plain, tiny

SAVED, STEPS = 2, 4
ADAMW: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.01}
STAGES = (0, 2, 3)


def steps(folder: str, sp: int, first: int, last: int) -> list[list[float]]:
    """Losses of some steps at stages of ZeRO; the first are saved, later ones begin with that."""
    found = []
    for stage in STAGES:
        engine = engine_of(
            tiny("llama"),
            zero_optimization={"stage": stage, "stage3_param_persistence_threshold": 0},
            sequence_parallel_size=sp,
            optimizer={"type": "AdamW", "params": ADAMW},
        )
        where = f"{folder}/{stage}"
        if first:
            engine.load_checkpoint(where)
        losses = []
        for step in range(first, last):
            losses.append(engine(**batch(step, "packed")).loss)
            engine.backward(losses[-1])
            engine.step()
        if not first:
            engine.save_checkpoint(where)
        engine.destroy()
        found.append([loss.item() for loss in losses])
    return found


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_at_another_size(tmp_path: Path, before: int, after: int) -> None:
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    expected = plain(model, "packed", steps=STEPS, optimizer=optimizer)
    for sp, first, last in ((before, 0, SAVED), (after, SAVED, STEPS)):
        for found in run_distributed(steps, sp, str(tmp_path), sp, first, last):
            for stage, losses in zip(STAGES, found, strict=True):
                assert losses == pytest.approx(expected[first:last], rel=1e-6), stage

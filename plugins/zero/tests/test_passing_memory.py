"""Memory that ZeRO needs beside states, as it is foretold, is what a job is seen to take."""

from __future__ import annotations

from importlib.util import find_spec
from unittest.mock import patch

import pytest
import torch
from drivetrain_zero.shards.whole_memory import WholeMemory
from drivetrain_zero.states import ZeroStates

import drivetrain
from drivetrain.testing import run_distributed
from drivetrain.testing.models import TinyGPT

BLOCK = 12 * 64**2 + 13 * 64
OTHERS = 64 * 64 + 32 * 64 + 2 * 64 + 64 * 64


def seen(stage: int, prefetch: int, *, overlap: bool) -> tuple[dict[str, int], int, int]:
    """What is foretold by kind; most bytes of whole parameters; bytes of buffers for gradients."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        # Ranks that share memory gather nothing.
        **({"cpu": {"shared_memory": False}} if find_spec("drivetrain_cpu") else {}),
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": prefetch,
            "overlap_comm": overlap,
        },
    }
    engine, *_ = drivetrain.initialize(model=TinyGPT(width=64, layers=5), config=config)
    states = engine.states
    assert isinstance(states, ZeroStates)
    foretold = {kind: nbytes for kind, _, nbytes, _ in states.memory_rows()}
    buffers = sum(b.nbytes for kept in states._memory._free.values() for b in kept)
    most, take = 0, WholeMemory.take

    def taken(memory: WholeMemory) -> None:
        nonlocal most
        take(memory)
        whole = (b.whole.flat.untyped_storage().nbytes() for b in states._buckets if b.sharded)
        most = max(most, sum(whole))

    with patch.object(WholeMemory, "take", taken):
        for _ in range(3):
            tokens = torch.ones(1, 9, dtype=torch.int64)
            engine.backward(engine(tokens[:, :-1], tokens[:, 1:]))
            engine.step()
    engine.destroy()
    return foretold, most, buffers


@pytest.mark.parametrize(
    ("prefetch", "overlap", "units"),
    [
        pytest.param(0, False, 1, id="none ahead"),
        pytest.param(BLOCK + 100, True, 2, id="one ahead"),
        pytest.param(2 * BLOCK + 100, True, 3, id="two ahead"),
    ],
)
def test_units_that_are_whole_at_once(prefetch: int, overlap: bool, units: int) -> None:
    """Those that compute or come, and what is in no block; none that backward has left."""
    for foretold, most, _ in run_distributed(_seen, 2, 3, prefetch, overlap):
        assert foretold["gathered parameters, at most"] == pytest.approx(
            4 * (units * BLOCK + OTHERS), rel=0.01
        )
        assert most == foretold["gathered parameters, at most"]


@pytest.mark.parametrize(("stage", "largest"), [(2, 5 * BLOCK + OTHERS), (3, BLOCK)])
def test_two_buffers_take_the_largest_gradients(stage: int, largest: int) -> None:
    for foretold, _, buffers in run_distributed(_seen, 2, stage, 0, False):
        assert foretold["gradients on their way"] == buffers
        assert buffers == pytest.approx(2 * 4 * largest, rel=0.02)


def test_at_stage_1_gradients_travel_from_where_they_are_kept() -> None:
    for foretold, _, buffers in run_distributed(_seen, 2, 1, 0, False):
        assert foretold == {"gradients on their way": 0}
        assert buffers == 0


def _seen(stage: int, prefetch: int, overlap: bool) -> tuple[dict[str, int], int, int]:
    return seen(stage, prefetch, overlap=overlap)

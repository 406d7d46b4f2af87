"""Blocks computed in chunks of the sequence train as whole ones do, to rounding, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sequence_models import LENGTH, ROWS, batch, engine_of, plain, tiny, train
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.testing import run_distributed

CASES = [
    ("llama", "plain", LENGTH),
    ("llama", "padded", LENGTH - 1),
    ("llama", "packed", LENGTH),
    ("qwen", "plain", LENGTH - 3),
    ("mistral", "packed", LENGTH),
    ("gpt2", "padded", LENGTH),
    ("bert", "masked", LENGTH - 1),
]
CHUNKS = {"chunk": 8, "loss_tile": 5}


def chunked(sp: int, cases: list[tuple[str, str, int]], section: dict[str, Any]) -> list[Any]:
    found = []
    for name, kind, length in cases:
        here = {k: v for k, v in section.items() if name != "bert" or k != "loss_tile"}
        engine = engine_of(tiny(name), sequence_parallel_size=sp, sequence_parallel=here)
        losses = train(engine, kind, length=length)
        weights = [p.detach().clone() for p in engine.module.parameters()]
        found.append((losses, weights))
        engine.destroy()
    return found


def check(found: list[Any], cases: list[tuple[str, str, int]]) -> None:
    for (losses, weights), (name, kind, length) in zip(found, cases, strict=True):
        model = tiny(name)
        assert losses == pytest.approx(plain(model, kind, length), rel=1e-6), (name, kind)
        for ours, theirs in zip(weights, model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)


def test_models_in_chunks_train_as_whole_ones_on_one_rank() -> None:
    check(chunked(1, CASES, CHUNKS), CASES)

"""Checkpoints in an object store, here the one that fsspec keeps in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from drivetrain_checkpoint_tools.object_store import ObjectStore
from drivetrain_checkpoint_tools.verification import verify
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn

import drivetrain
from drivetrain.checkpoint.format.storage import open_storage
from drivetrain.checkpoint.opening import opened
from drivetrain.engine.engine import Engine
from drivetrain.errors import CheckpointError

ROOT = "memory://bucket/run"


@pytest.fixture(autouse=True)
def store() -> Iterator[dict[str, Any]]:
    MemoryFileSystem.store.clear()
    yield MemoryFileSystem.store
    MemoryFileSystem.store.clear()


def make(**changes: Any) -> Engine:
    torch.manual_seed(1)
    engine, *_ = drivetrain.initialize(
        model=nn.Linear(30, 20),
        config={
            "train_batch_size": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
            "checkpoint": {"keep_last": 2, **changes},
        },
    )
    return engine


def train(engine: Engine, steps: int) -> None:
    for _ in range(steps):
        engine.backward(engine(torch.ones(1, 30)).square().mean())
        engine.step()


@pytest.mark.parametrize("background", [{}, {"background": {}}], ids=["now", "in the background"])
def test_a_run_saves_resumes_and_keeps_the_last_ones(
    background: dict[str, Any], store: dict[str, Any]
) -> None:
    engine = make(**background)
    for _ in range(4):
        train(engine, 1)
        engine.save_checkpoint(ROOT)
    expected = {name: p.clone() for name, p in engine.module.named_parameters()}
    engine.destroy()
    assert {path.split("/")[3] for path in store} == {"latest", "global_step3", "global_step4"}
    engine = make()
    path, _ = engine.load_checkpoint(ROOT)
    assert path == f"{ROOT}/global_step4"
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter, expected[name])
    engine.destroy()


def test_a_damaged_object_is_found_and_the_last_good_checkpoint_taken(
    store: dict[str, Any],
) -> None:
    engine = make()
    for _ in range(2):
        train(engine, 1)
        engine.save_checkpoint(ROOT)
    with opened(ROOT) as stored:
        assert verify(stored) == []
    path = next(p for p in store if "global_step2/rank" in p)
    data = bytearray(store[path].getvalue())
    data[8 + int.from_bytes(data[:8], "little") + 9] ^= 4
    MemoryFileSystem().pipe_file(path, bytes(data))
    with opened(ROOT) as stored:
        assert "is damaged in memory://bucket/run/global_step2/rank00000" in verify(stored)[0]
    assert engine.load_checkpoint(ROOT)[0] == f"{ROOT}/global_step1"
    engine.destroy()


def test_missing_and_short_objects_are_named() -> None:
    storage = ObjectStore(ROOT)
    assert storage.names() == []
    assert storage.size("x") is None
    with pytest.raises(CheckpointError, match="memory://bucket/run/x is missing"):
        storage.read("x", 0, bytearray(4))
    storage.put("x", b"abc")
    with pytest.raises(CheckpointError, match="it ends at byte 3, but 4 are needed"):
        storage.read("x", 0, bytearray(4))
    storage.remove("x")
    storage.remove("x")
    assert storage.size("x") is None


def test_a_scheme_that_nobody_serves_is_refused_with_advice() -> None:
    with pytest.raises(CheckpointError, match=r"no installed package stores .* ftp://"):
        open_storage("ftp://host/run")


def test_a_scheme_whose_package_is_missing_is_refused_with_advice() -> None:
    with pytest.raises(CheckpointError, match=r"s3://b/run cannot be opened: .*s3fs"):
        open_storage("s3://b/run")

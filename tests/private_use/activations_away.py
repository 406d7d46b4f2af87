"""Jobs on the C++ device whose activations leave it; each function runs on a rank."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from device_memory import allocated
from drivetrain_offload import memory_table
from on_demand import loss_of, start
from torch import nn
from torch.utils.checkpoint import checkpoint

from drivetrain.engine.engine import Engine
from drivetrain.testing.models import TinyGPT


def model(checkpointing: str | None = None) -> nn.Module:
    torch.manual_seed(1)
    module = TinyGPT(layers=4, dropout=0.1)
    if checkpointing:
        for block in module.blocks:
            inner = copy.copy(block.forward)
            block.forward = lambda x, inner=inner: checkpoint(
                inner, x, use_reentrant=checkpointing == "reentrant"
            )
    return module


def losses(config: Mapping[str, Any], checkpointing: str | None, steps: int) -> list[float]:
    engine = start(config, model(checkpointing))
    found = []
    for step in range(steps * engine.gradient_accumulation_steps()):
        loss = loss_of(engine, step)
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
        with torch.no_grad():
            found.append(loss_of(engine, 50).item())
    assert _away(engine) == 0
    engine.destroy()
    return found


def bytes_between(config: Mapping[str, Any], checkpointing: str | None) -> tuple[int, int, int]:
    """The device's bytes that a forward leaves behind; its peak in backward; the host's bytes."""
    engine = start(config, model(checkpointing))
    _step(engine)
    before = allocated()
    loss = loss_of(engine, 1)
    kept = allocated() - before
    host = _away(engine)
    engine.job.accelerator.reset_peak_memory()
    engine.backward(loss)
    peak = engine.job.accelerator.max_memory_allocated() - before
    engine.step()
    engine.destroy()
    return kept, peak, host


def places_between(config: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of activations by place, between forward and backward."""
    engine = start(config, model())
    loss = loss_of(engine, 1)
    found = {row.place: row.nbytes for row in memory_table(engine) if row.kind == "activations"}
    engine.backward(loss)
    engine.destroy()
    return found


def _away(engine: Engine) -> int:
    return sum(row.nbytes for row in memory_table(engine) if row.kind == "activations")


def _step(engine: Engine) -> None:
    engine.backward(loss_of(engine, 0))
    engine.step()

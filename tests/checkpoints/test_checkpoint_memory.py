"""What saving and loading take of host memory beside the states."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import nn

import drivetrain
from drivetrain.testing import run_distributed

WIDTH, BLOCKS = 2048, 16
KINDS = 3  # a parameter and two moments


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(BLOCKS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def resident(key: str) -> int:
    """A line of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(key)


def extra_bytes(folder: str) -> dict[str, int]:
    """Peak of memory above what was there before, of a save and of a load."""
    config = {
        "train_batch_size": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 1},
    }
    module = Model()
    engine, *_ = drivetrain.initialize(
        model=module, model_parameters=module.parameters(), config=config
    )
    engine.backward(engine(torch.ones(1, WIDTH)))
    engine.step()
    found = {}
    for name, act in (("save", engine.save_checkpoint), ("load", engine.load_checkpoint)):
        gc.collect()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        act(folder)
        found[name] = resident("VmHWM") - before
    engine.destroy()
    return found


def test_saving_and_loading_take_a_block_and_five_percent(tmp_path: Path) -> None:
    block = WIDTH * WIDTH * 4 * KINDS
    bound = block + block * BLOCKS // 20
    (found,) = run_distributed(extra_bytes, 1, str(tmp_path))
    assert found["save"] <= bound, found
    assert found["load"] <= bound, found

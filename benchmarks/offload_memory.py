"""Measure where the bytes of model states live at each setting of offload, as a table.

    python benchmarks/offload_memory.py --folder /path/on/the/disk

Each line is what one of two ranks holds after a step, in bytes a parameter of the model: parameters
and gradients in bfloat16, master weights and AdamW's moments in float32, and the buffers of
drivetrain-offload. It is read from ``drivetrain_offload.memory_table``; on ranks that compute on a
CPU, "device" is the memory that is the device's there.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drivetrain.testing import run_distributed

RANKS = 2
TILE = 65_536
STATES = ("master", "exp_avg", "exp_avg_sq")


class Blocks(nn.Module):
    """Eight residual layers of 1.05 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)) for _ in range(8)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.float().square().mean()


def settings(folder: Path) -> Mapping[str, tuple[int, dict[str, Any]]]:
    """Name -> stage and the sections of offload."""
    files = {"device": "nvme", "nvme_path": str(folder)}
    states = {"offload_optimizer": {**files, "buffer_size": TILE}}
    parameters = {"offload_param": {**files, "max_in_cpu": 0}}
    host = {"offload_optimizer": {"device": "cpu"}}
    return {
        "stage 2": (2, {}),
        "stage 2, states in host memory": (2, host),
        "stage 2, states in files": (2, states),
        "stage 3": (3, {}),
        "stage 3, states in host memory": (3, host),
        "stage 3, states in files": (3, states),
        "stage 3, parameters in files": (3, parameters),
        "stage 3, both in files": (3, {**states, **parameters}),
    }


def held(stage: int, sections: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Bytes a parameter that this rank holds, by what they are for and place."""
    from drivetrain_offload import memory_table

    import drivetrain

    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **sections}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": zero,
    }
    model = Blocks()
    count = sum(p.numel() for p in model.parameters())
    engine, *_ = drivetrain.initialize(model=model, config=config)
    engine.backward(engine(torch.ones(1, 512, dtype=torch.bfloat16)))
    engine.step()
    sizes: Counter[tuple[str, str]] = Counter()
    for row in memory_table(engine):
        known = row.kind in ("parameter", "gradient")
        what = row.kind if known else "states" if row.kind in STATES else "buffers"
        if row.kind != "step":
            sizes[what, row.place] += row.nbytes
    engine.job.close()
    return {key: size / count for key, size in sizes.items()}


def main() -> None:
    """Print a table for each setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path("runs/swap"))
    folder = parser.parse_args().folder
    kinds = ("parameter", "gradient", "states", "buffers")
    print("| setting |", " | ".join(kinds), "|")
    print("|---" * (len(kinds) + 1) + "|")
    for name, (stage, sections) in settings(folder).items():
        found = run_distributed(held, RANKS, stage, sections)[0]
        cells = [
            ", ".join(
                f"{size:.2f} {place}"
                for (what, place), size in sorted(found.items())
                if what == kind and size
            )
            for kind in kinds
        ]
        print(f"| {name} |", " | ".join(cell or "-" for cell in cells), "|")


if __name__ == "__main__":
    main()

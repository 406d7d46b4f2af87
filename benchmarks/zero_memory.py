"""Measure the bytes of model states that a rank keeps at every stage of ZeRO, and draw them.

    python benchmarks/zero_memory.py --picture plugins/zero/memory.svg

Each bar is what one rank of a real run holds between backward and step: parameters and gradients
in bfloat16, master weights and AdamW's states in float32, 16 bytes a parameter without ZeRO. The
lines are the formulas of the ZeRO paper (arXiv:1910.02054, section 5).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from drivetrain.testing import run_distributed

STAGES = (0, 1, 2, 3)
RANKS = (1, 2, 4, 8)
KINDS = ("parameter", "gradient", "master", "exp_avg", "exp_avg_sq")


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


def held(stage: int) -> dict[str, float]:
    """Bytes a parameter that this rank holds, by kind."""
    import drivetrain

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    model = Blocks()
    count = sum(p.numel() for p in model.parameters())
    engine, *_ = drivetrain.initialize(model=model, config=config)
    engine.backward(engine(torch.ones(1, 512, dtype=torch.bfloat16)))
    sizes: Counter[str] = Counter()
    for fragment in engine.states.fragments():
        if fragment.kind in KINDS:
            sizes[fragment.kind] += fragment.read().nbytes
    if 0 < stage < 3:  # fragments show shards, but every rank has the whole of these
        sizes["parameter"] = sum(p.numel() * p.element_size() for p in model.parameters())
        if stage == 1:
            sizes["gradient"] = sizes["parameter"]
    engine.step()
    engine.job.close()
    return {kind: size / count for kind, size in sizes.items()}


def formula(stage: int, ranks: int) -> float:
    """Bytes a parameter by the paper, with 12 for masters and AdamW's states."""
    return {0: 16.0, 1: 4 + 12 / ranks, 2: 2 + 14 / ranks, 3: 16 / ranks}[stage]


def draw(rows: list[dict[str, float]], picture: Path) -> None:
    """One group of bars for each number of ranks, one bar for each stage."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "drivetrain"
    from matplotlib import pyplot as plt

    colors = dict(zip(KINDS, ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee"), strict=True))
    figure, axes = plt.subplots(figsize=(8, 3.6))
    for place, row in enumerate(rows):
        at = place + place // len(STAGES)
        bottom = 0.0
        for kind, color in colors.items():
            label = kind if place == 0 else None
            axes.bar(at, row[kind], 0.85, bottom=bottom, color=color, label=label)
            bottom += row[kind]
        expected = formula(int(row["stage"]), int(row["ranks"]))
        axes.hlines(expected, at - 0.45, at + 0.45, color="black", linewidth=1.2)
        axes.text(at, -0.7, f"{int(row['stage'])}", ha="center", va="top", fontsize=8)
        if place % len(STAGES) == 0:
            ranks = f"{int(row['ranks'])} rank{'s' if row['ranks'] > 1 else ''}"
            axes.text(at + 1.5, -2.0, ranks, ha="center", va="top")
    axes.set_xticks([])
    axes.set_ylabel("bytes a parameter on one rank")
    axes.legend(frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.15), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    rows = []
    for ranks in RANKS:
        for stage in STAGES:
            answers = run_distributed(held, ranks, stage, timeout=300)
            most = max(answers, key=lambda sizes: sum(sizes.values()))
            total = sum(most.values())
            row = {"ranks": ranks, "stage": stage, **most, "total": total}
            rows.append(row | {"formula": formula(stage, ranks)})
            print(json.dumps({key: round(value, 3) for key, value in rows[-1].items()}))
    if options.picture:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()

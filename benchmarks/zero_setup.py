"""Time how long an engine with ZeRO takes to set up, on one of many ranks that are not there.

    python benchmarks/zero_setup.py
    python benchmarks/zero_setup.py --stage 2 --profile

The model is a GPT on the meta device and the ranks are those of torch's fake process group, so
what is timed is the work of Python and of torch's bookkeeping, not memory or networks. Prints, for
each stage, seconds for a model of one billion parameters at 1,024 ranks, and how they grow with
the number of parameters and of ranks.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time

import torch
import torch.distributed as dist

import drivetrain
from drivetrain.testing.models import TinyGPT

SHAPES = {"0.25 B": (768, 32), "0.5 B": (1024, 36), "1 B": (1536, 34), "2 B": (2048, 38)}
"""Name -> width and layers."""

BASE, RANKS = "1 B", 1024


def set_up(stage: int, shape: str, ranks: int, *, profile: bool = False) -> tuple[float, int]:
    """Seconds, and the number of parameters."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    width, layers = SHAPES[shape]
    dist.init_process_group("fake", store=FakeStore(), rank=ranks // 2, world_size=ranks)
    with torch.device("meta"):
        module = TinyGPT(vocabulary=32000, width=width, layers=layers, heads=16, positions=1024)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": stage},
    }
    profiler = cProfile.Profile()
    begin = time.perf_counter()
    if profile:
        profiler.enable()
    engine, *_ = drivetrain.initialize(model=module, config=settings)
    profiler.disable()
    seconds = time.perf_counter() - begin
    if profile:
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(30)
    numel = sum(p.numel() for p in engine.module.parameters())
    engine.destroy()
    if dist.is_initialized():
        dist.destroy_process_group()
    return seconds, numel


def report(stage: int, numel: int, ranks: int, seconds: float) -> None:
    print(f"stage {stage}: {numel / 1e9:5.2f} B parameters, {ranks:5} ranks: {seconds:6.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), help="only this one")
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    options = parser.parse_args()
    stages = (options.stage,) if options.stage else (1, 2, 3)
    set_up(stages[0], "0.25 B", 8)  # imports, first use of everything
    for stage in stages:
        if options.profile:
            set_up(stage, BASE, RANKS, profile=True)
            continue
        for shape in SHAPES:
            seconds, numel = set_up(stage, shape, RANKS)
            report(stage, numel, RANKS, seconds)
        for ranks in (8, 64, 4096):
            seconds, numel = set_up(stage, BASE, ranks)
            report(stage, numel, ranks, seconds)


if __name__ == "__main__":
    main()

"""Time how long an engine of a 3D layout takes to set up, on one of many ranks that are not there.

    python benchmarks/layout_setup.py
    python benchmarks/layout_setup.py --profile

The model is a GPT on the meta device, and the ranks are those of torch's fake
process group: what is timed is Python's and torch's work to cut layers over `tp`, to tell stages
apart and to lay out states of ZeRO, not memory or networks. Prints seconds for one billion
parameters at 1,024 ranks, and how they grow with layers and with ranks.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time
from typing import Any

import torch
import torch.distributed as dist

import drivetrain
from drivetrain.testing.models import TinyGPT

LAYERS, WIDTH, RANKS = 32, 1536, 1024
STAGES, TENSOR = 8, 8


def set_up(layers: int, ranks: int, stage: int, *, profile: bool = False) -> tuple[float, int]:
    """Seconds, and the number of parameters of the whole model."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=ranks // 2, world_size=ranks)
    with torch.device("meta"):
        model = TinyGPT(vocabulary=32_000, width=WIDTH, layers=layers, heads=16, positions=1024)
    numel = sum(p.numel() for p in model.parameters())
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 32,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": stage},
        "pipeline": {"stages": STAGES},
        "tensor_parallel": {"autotp_size": TENSOR},
    }
    profiler = cProfile.Profile()
    begin = time.perf_counter()
    if profile:
        profiler.enable()
    engine, *_ = drivetrain.initialize(model=model, config=config)
    profiler.disable()
    seconds = time.perf_counter() - begin
    if profile:
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(45)
    engine.destroy()
    if dist.is_initialized():
        dist.destroy_process_group()
    return seconds, numel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=2, help="of ZeRO")
    parser.add_argument("--layers", type=int, help="one run with so many layers only")
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    options = parser.parse_args()
    if options.layers or options.profile:
        seconds, _ = set_up(options.layers or LAYERS, RANKS, options.stage, profile=options.profile)
        print(f"{options.layers or LAYERS} layers: {seconds:.2f} s")
        return
    set_up(STAGES, 64, options.stage)  # imports, first use of everything
    figures = {}
    for name, layers, ranks in (
        ("1 B, 1024 ranks", LAYERS, RANKS),
        ("half the layers", LAYERS // 2, RANKS),
        ("twice the layers", 2 * LAYERS, RANKS),
        ("64 ranks", LAYERS, 64),
    ):
        seconds, numel = set_up(layers, ranks, options.stage)
        figures[name] = {
            "layers": layers,
            "billions": round(numel / 1e9, 2),
            "seconds": round(seconds, 2),
        }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

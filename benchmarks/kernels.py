"""Time kernels and collectives against torch's in one run, and print ratios.

    python benchmarks/kernels.py adam --threads 2
    python benchmarks/kernels.py collectives --ranks 2
    python benchmarks/kernels.py build

Contenders take turns, round after round, so that all see the same machine at the same time. A
ratio is the median of the per-round ratios, with the lowest and highest beside it; the time is the
best round's.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from kernels_worker import take_turns, time_collectives

from drivetrain.testing import run_distributed


def show(title: str, times: Mapping[str, list[float]], moved: Mapping[str, float]) -> None:
    """One line a contender; ratios are speed relative to the first."""
    print(f"\n{title}\n  {'':32} {'best':>11} {'bandwidth':>10}   ratio (lowest .. highest)")
    base = next(iter(times.values()))
    for name, own in times.items():
        ratios = [first / second for first, second in zip(base, own, strict=True)]
        rate = f"{moved[name] / min(own) / 1e9:6.1f} GB/s" if name in moved else ""
        middle = statistics.median(ratios)
        print(
            f"  {name:32} {min(own) * 1e3:8.3f} ms {rate:>11}   "
            f"{middle:5.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
        )


# -- fused updates -------------------------------------------------------------------------------


def adam(elements: int, threads: int, rounds: int) -> None:
    """Adam in several storage dtypes against torch's fused AdamW, and memory bandwidth."""
    from drivetrain_kernels import adam as fused_adam

    torch.set_num_threads(threads)
    weights, gradient, m, v = (torch.rand(elements) for _ in range(4))
    low, out = gradient.bfloat16(), torch.empty(elements, dtype=torch.bfloat16)
    low_m, low_v, low_weights = m.bfloat16(), v.bfloat16(), weights.bfloat16()
    parameter = torch.nn.Parameter(weights)
    parameter.grad = gradient
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, fused=True)
    step: dict[str, Any] = {"step": 10, "lr": 1e-3, "weight_decay": 0.01}

    def separate_casts() -> None:
        gradient.copy_(low)
        optimizer.step()
        out.copy_(weights)

    times = take_turns(
        {
            "torch fused AdamW": optimizer.step,
            "adam": lambda: fused_adam(weights, gradient, m, v, **step),
            "in-place add (bandwidth)": lambda: m.add_(v),
            "bf16 states and gradient": lambda: fused_adam(weights, low, low_m, low_v, **step),
            "all bf16": lambda: fused_adam(low_weights, low, low_m, low_v, **step),
            "all bf16, stochastic": lambda: fused_adam(
                low_weights, low, low_m, low_v, seed=1, **step
            ),
        },
        rounds,
    )
    per_element = (28, 28, 12, 18, 14, 14)
    moved = {name: n * elements for name, n in zip(times, per_element, strict=True)}
    show(f"Adam, {elements >> 20} Mi elements, {threads} threads", times, moved)
    times = take_turns(
        {
            "torch fused AdamW and casts": separate_casts,
            "bf16 gradient and copy, one pass": lambda: fused_adam(
                weights, low, m, v, out=out, **step
            ),
        },
        rounds,
    )
    names = list(times)
    show("bf16 gradient and parameter, fp32 states", times, {names[1]: 28 * elements})


# -- collectives ----------------------------------------------------------------------------------


def collectives(elements: int, ranks: int, rounds: int) -> None:
    """Reduce-scatter, all-gather, all-reduce and latency against gloo."""
    from drivetrain_cpu.shared_memory import native_library

    native_library()
    found = run_distributed(time_collectives, ranks, elements, rounds, timeout=600)[0]
    for name, times in found.items():
        show(f"{name}, {elements * 4 >> 20} MiB float32, {ranks} ranks", times, {})


# -- builds --------------------------------------------------------------------------------------


def build() -> None:
    """First build of the CPU kernels, and the way from the cache."""
    from drivetrain_cpu.instruction_sets import selected
    from drivetrain_cpu.kernels import kernel_library

    with tempfile.TemporaryDirectory() as folder:
        os.environ["DRIVETRAIN_CACHE"] = folder
        for attempt in ("first build", "from the cache"):
            began = time.perf_counter()
            path = kernel_library(selected()).ensure_built()
            print(f"{attempt} of {path.parent.name}: {time.perf_counter() - began:.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("adam", "collectives", "build"))
    parser.add_argument("--elements", type=int, help="default: 64 Mi for adam, else 32 Mi")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    load = Path("/proc/loadavg").read_text().split()[0]
    print(f"{platform.machine()}, torch {torch.__version__}, load average {load}")
    if options.what == "adam":
        adam(options.elements or 64 << 20, options.threads, options.rounds)
    elif options.what == "collectives":
        collectives(options.elements or 32 << 20, options.ranks, options.rounds)
    else:
        build()


if __name__ == "__main__":
    main()

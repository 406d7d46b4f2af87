"""Grouped products of experts beside one dense product of the same operations, as JSON.

    python benchmarks/moe_grouped.py
    python benchmarks/moe_grouped.py --tokens 512 2048 8192 --experts 64 --rounds 20

Load of experts follows Zipf's law. Forward and backward; every round runs all of them in turn, and
the ratio is the median of the ratios by round.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable

import torch
from drivetrain_moe import grouped_linear
from torch.nn import functional


def zipf(rows: int, experts: int) -> torch.Tensor:
    """Rows of each expert, [E], the n-th busiest with 1/n of the first one's."""
    share = 1 / torch.arange(1, experts + 1, dtype=torch.float64)
    counts = (share / share.sum() * rows).long()
    counts[0] += rows - counts.sum()
    return counts[torch.randperm(experts, generator=torch.Generator().manual_seed(0))]


def timed(run: Callable[[], torch.Tensor], leaves: tuple[torch.Tensor, ...]) -> float:
    for leaf in leaves:
        leaf.grad = None
    begin = time.perf_counter()
    y = run()
    y.backward(y.detach())
    return time.perf_counter() - begin


def measure(tokens: int, options: argparse.Namespace) -> dict[str, object]:
    rows = tokens * options.k
    counts = zipf(rows, options.experts)
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    x, dense = leaf(rows, options.width), leaf(options.width, options.inner)
    weight = leaf(options.experts, options.width, options.inner)
    ends = counts.cumsum(0).int()
    runs = {
        "dense": (lambda: x @ dense, (x, dense)),
        "grouped": (lambda: grouped_linear(x, weight, counts), (x, weight)),
        "torch": (lambda: functional.grouped_mm(x, weight, offs=ends), (x, weight)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(options.rounds + 2):
        order = list(runs)
        random.Random(index).shuffle(order)  # noqa: S311
        for name in order:
            elapsed = timed(*runs[name])
            if index >= 2:
                seconds[name].append(elapsed)
    ratios = {
        name: [d / own for d, own in zip(seconds["dense"], times, strict=True)]
        for name, times in seconds.items()
    }
    return {
        "dense_seconds": round(statistics.median(seconds["dense"]), 5),
        **{
            f"{name}_speed_of_dense": round(statistics.median(ratios[name]), 3)
            for name in ("grouped", "torch")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--inner", type=int, default=1408)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {str(tokens): measure(tokens, options) for tokens in options.tokens}
    print(json.dumps({"tokens": found, "torch": torch.__version__}, indent=1))


if __name__ == "__main__":
    main()

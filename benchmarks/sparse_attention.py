"""Time and memory of block-sparse attention by length, against dense attention of torch.

One layer's attention, forward and backward, with a BigBird layout (window 3, one global and one
random block of each row). The two take turns, so that other work on the machine meets both; the
median of the repetitions counts. Times are of processors, over all threads, which other work
disturbs less than a clock on the wall. Memory is the growth of the peak of resident memory in a
process of its own. Prints JSON; ``--picture FILE`` draws it as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HEADS, WIDTH, BLOCK = 8, 64, 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def inputs(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value [1, heads, length, width] as models have them."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, length, HEADS, WIDTH, generator=generator)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for _ in range(3)
    ]


def sparse(length: int, dtype: torch.dtype) -> Callable[[], None]:
    """One forward and backward of listed blocks."""
    from drivetrain_sparse_attention import (
        BigBirdSparsityConfig,
        Blocks,
        attend_to_blocks,
        visible_blocks,
    )

    from drivetrain.contracts import AttentionFacts

    leaves = inputs(length, dtype)
    seen = BigBirdSparsityConfig(1, BLOCK).make_layout(length).bool()[None]
    blocks, visible = visible_blocks(Blocks.of(seen, BLOCK), AttentionFacts(), *leaves[:2])

    def run() -> None:
        out, _ = attend_to_blocks(*leaves, blocks.lists, visible)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


def dense(length: int, dtype: torch.dtype) -> Callable[[], None]:
    """One forward and backward of torch's attention."""
    leaves = inputs(length, dtype)

    def run() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


WAYS = {"sparse": sparse, "dense": dense}


def seconds(functions: list[Callable[[], None]], repetitions: int) -> list[float]:
    """Median processor time of each; they take turns."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repetitions):
        for function, found in zip(functions, times, strict=True):
            began = time.process_time()
            function()
            found.append(time.process_time() - began)
    return [statistics.median(found) for found in times]


def peak(way: str, length: int, dtype: str) -> float:
    """MiB that one forward and backward takes beyond its inputs, in a process of its own."""
    command = [sys.executable, __file__, "--one", way, "--lengths", str(length), "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def peak_here(way: str, length: int, dtype: torch.dtype) -> float:
    """The same in this process."""
    WAYS[way](1024, dtype)()  # code and threads
    run = WAYS[way](length, dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far
    before = resident("VmHWM")
    run()
    return resident("VmHWM") - before


def resident(line: str) -> float:
    """MiB that the kernel tells of this process."""
    text = Path("/proc/self/status").read_text()
    (found,) = (row for row in text.splitlines() if row.startswith(line))
    return int(found.split()[1]) / 1024


def draw(found: dict[str, Any], path: str) -> None:
    """Time and memory by length."""
    from matplotlib import pyplot as plt

    figure, panes = plt.subplots(1, 2, figsize=(9, 3.6))
    for pane, key, label in zip(
        panes,
        ("seconds", "mib"),
        ("processor seconds, forward and backward", "MiB beyond the inputs"),
        strict=True,
    ):
        for way, by_length in found[key].items():
            lengths = [int(length) for length in by_length]
            pane.plot(lengths, list(by_length.values()), marker="o", label=way)
        pane.set(xlabel="tokens", ylabel=label, yscale="log")
        pane.set_xscale("log", base=2)
        pane.legend()
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--dense", type=int, default=8192, help="longest dense sequence")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--one", choices=WAYS, help="memory of one way in this process")
    parser.add_argument("--picture")
    options = parser.parse_args()
    dtype = DTYPES[options.dtype]
    torch.set_num_threads(options.threads)
    if options.one:
        print(peak_here(options.one, options.lengths[0], dtype))
        return
    found: dict[str, Any] = {"seconds": {"sparse": {}, "dense": {}}, "dense_over_sparse": {}}
    for length in options.lengths:
        ways = ["sparse", "dense"] if length <= options.dense else ["sparse"]
        times = seconds([WAYS[way](length, dtype) for way in ways], options.repetitions)
        for way, each in zip(ways, times, strict=True):
            found["seconds"][way][str(length)] = round(each, 4)
        if len(times) == 2:
            found["dense_over_sparse"][str(length)] = round(times[1] / times[0], 2)
    per_token = {n: t / int(n) for n, t in found["seconds"]["sparse"].items()}
    first, last = (per_token[str(n)] for n in (min(options.lengths), max(options.lengths)))
    found["time_per_token_last_over_first"] = round(last / first, 3)
    if options.memory:
        found["mib"] = {
            way: {
                str(n): round(peak(way, n, options.dtype), 1)
                for n in options.lengths
                if way == "sparse" or n <= options.dense
            }
            for way in WAYS
        }
    print(json.dumps(found, indent=1))
    if options.picture:
        draw(found, options.picture)


if __name__ == "__main__":
    main()

"""What choosing rows for experts and summing their answers take of a layer, as JSON.

    python benchmarks/moe_permuting.py
    python benchmarks/moe_permuting.py --tokens 512 8192 --width 512 --rounds 20

Processor time of one process, forward and backward. ``floor`` is what a fused operator would take
at least: the bytes that have to be read and written, at the speed of a copy of the rows. So
``most_gain`` is the part of the layer's time that no such operator can exceed as its gain.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from drivetrain_moe import GroupedMLP
from drivetrain_moe.permuting import Places, chosen, summed


def spent(run: Callable[[], object]) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


def measure(tokens: int, options: argparse.Namespace) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    rows = tokens * options.k
    expert = torch.rand(tokens, options.experts, generator=generator).topk(options.k).indices
    order = expert.flatten().argsort(stable=True)
    counts = torch.bincount(expert.flatten(), minlength=options.experts)
    places = Places.of(order.div(options.k, rounding_mode="floor"), tokens)
    experts = GroupedMLP(options.experts, options.width, options.inner)
    x = torch.randn(tokens, options.width, generator=generator).requires_grad_()
    weight = torch.rand(rows, generator=generator).requires_grad_()
    answers = torch.randn(rows, options.width, generator=generator).requires_grad_()

    def choose() -> None:
        found = chosen(x, places)
        found.backward(answers.detach())

    def combine() -> None:
        summed(answers, places, weight).backward(x.detach())

    def layer() -> None:
        found = experts(chosen(x, places), counts)
        summed(found, places, weight).backward(x.detach())

    into = torch.empty(rows, options.width)
    runs = {
        "choose": choose,
        "combine": combine,
        "layer": layer,
        "copy": lambda: into.copy_(answers.detach()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds + 2):
        for name, run in runs.items():
            for leaf in (x, weight, answers, *experts.parameters()):
                leaf.grad = None
            elapsed = spent(run)
            if number >= 2:
                seconds[name].append(elapsed)
    found = {name: statistics.median(times) for name, times in seconds.items()}
    # In rows: choosing reads and writes each, its backward reads each and writes a token's, as
    # combining does, whose backward reads rows and a token's gradient, and writes rows.
    passes = 2 + 2 * (1 + 1 / options.k) + 2 + 1 / options.k
    floor = found["copy"] * passes / 2
    both = found["choose"] + found["combine"]
    return {
        "layer_ms": round(1e3 * found["layer"], 2),
        "share_of_layer": round(both / found["layer"], 4),
        "floor_share_of_layer": round(floor / found["layer"], 4),
        "most_gain": round(max(0.0, both - floor) / found["layer"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--inner", type=int, default=1408)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {str(tokens): measure(tokens, options) for tokens in options.tokens}
    print(json.dumps({"tokens": found, "torch": torch.__version__}, indent=1))


if __name__ == "__main__":
    main()

"""Time of one product with a quantised weight, by the number of rows.

    python benchmarks/weight_formats.py [--outputs 1536] [--inputs 576]

Each format multiplies x in bfloat16 by the fused product alone, as ``batch_invariant`` needs it,
and as an engine chooses otherwise (the same for fp8 and fp6); contenders take turns. Printed are
medians of processor time in milliseconds, one thread, and ratios to the fused product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from drivetrain_inference.weights.grouped import Int4, Int8
from drivetrain_inference.weights.minifloats import Fp6, Fp8
from torch import nn

ROUNDS = 15


def medians(contenders: dict[str, Callable[[], torch.Tensor]]) -> dict[str, float]:
    """Milliseconds of processor time, by contender."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, run in contenders.items():
            began = time.process_time()
            run()
            times[name].append(1e3 * (time.process_time() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print a table as JSON: format, rows, times and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=576)
    parser.add_argument("--outputs", type=int, default=1536)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = torch.randn(options.outputs, options.inputs)
    plain = weight.bfloat16()
    table: dict[str, dict[str, dict[str, float]]] = {}
    for form in (Int8(), Int4(), Fp8(), Fp6()):
        packed, rows = form.pack(weight), table.setdefault(form.code, {})
        fused = form.bind(packed, options.outputs, invariant=True)
        chosen = form.bind(packed, options.outputs, invariant=False)
        for count in (1, 16, 64, 256):
            x = torch.randn(count, options.inputs).bfloat16()
            found = medians(
                {
                    "bfloat16": lambda x=x: nn.functional.linear(x, plain),
                    "fused": lambda x=x, run=fused: run(x),
                    "chosen": lambda x=x, run=chosen: run(x),
                }
            )
            ratio = found["fused"] / found["chosen"]
            rows[str(count)] = {**found, "fused_over_chosen": ratio}
    print(json.dumps({"formats": table}, indent=2))


if __name__ == "__main__":
    main()

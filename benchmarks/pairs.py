"""Time of one product with a weight that was pruned 2:4, beside the dense one in bfloat16.

    python benchmarks/pairs.py

Contenders take turns; printed are medians of processor time in milliseconds, one thread, and the
ratio of the dense product to the other. Weights are as large as those of a small model, which stay
in a cache, and as those of one of 7 billion, which do not.
"""

from __future__ import annotations

import argparse
import json

import torch
from drivetrain_kernels import pair_linear
from drivetrain_kernels.ops.pair_linear import pack_pairs, unpack_pairs
from torch import nn
from weight_formats import medians  # type: ignore[import-not-found]


def main() -> None:
    """Print a table as JSON: size, rows, times and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table: dict[str, dict[str, dict[str, float]]] = {}
    for outputs, inputs in ((1536, 576), (4096, 4096), (11008, 4096)):
        values, places = pack_pairs(torch.randn(outputs, inputs).bfloat16())
        weight = unpack_pairs(values, places, outputs, inputs).contiguous()
        rows = table.setdefault(f"{outputs}x{inputs}", {})
        for count in (1, 4, 16):
            x = torch.randn(count, inputs).bfloat16()
            found = medians(
                {
                    "dense": lambda x=x, weight=weight: nn.functional.linear(x, weight),
                    "pairs": lambda x=x, v=values, p=places, o=outputs: pair_linear(x, v, p, o),
                }
            )
            rows[str(count)] = {**found, "dense_over_pairs": found["dense"] / found["pairs"]}
    print(json.dumps({"sizes": table}, indent=2))


if __name__ == "__main__":
    main()

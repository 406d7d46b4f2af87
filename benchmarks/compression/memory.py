"""The largest memory of tensors while a model is compressed by GPTQ, beside the formula for it.

    python benchmarks/compression/memory.py FOLDER     # of model.py

The formula is the model, one of its blocks, the Hessians of that block's inputs and the hidden
states of the calibration data. Counted are all tensors that operations make, and what they make
while others are still in use; files that are mapped into memory are not. Without ``--samples`` 128
rows of 512 tokens calibrate.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from drivetrain_compression import compress
from drivetrain_compression.calibrated.sources import empty
from safetensors.torch import load_file
from torch import nn

from drivetrain.states.units import units

sys.path.insert(0, str(Path(__file__).parents[2] / "plugins" / "compression" / "tests"))

from live_memory import Live  # type: ignore[import-not-found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    ids = load_file(options.folder / "rows")["calibration"][: options.samples, : options.length]
    model = empty(options.folder)
    block = units(model)[0].module
    width = model.config.hidden_size  # type: ignore[union-attr]
    inputs = [m.in_features for m in block.modules() if isinstance(m, nn.Linear)]
    parts = {
        "model": sum(p.numel() * p.element_size() for p in model.parameters()),
        "block": sum(p.numel() * p.element_size() for p in block.parameters()),
        "hessians": sum(4 * n * n for n in inputs),
        "activations": ids.numel() * width * next(model.parameters()).element_size(),
    }
    with tempfile.TemporaryDirectory() as work, Live() as live:
        compress(
            options.folder,
            {"modifiers": [{"gptq": {"group": 64}}]},
            list(ids.split(4)),
            Path(work) / "out",
        )
    found = {
        **{name: size / 1e6 for name, size in parts.items()},
        "formula": sum(parts.values()) / 1e6,
        "most": live.most / 1e6,
        "most_over_formula": live.most / sum(parts.values()),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

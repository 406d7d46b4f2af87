"""Perplexity of a real model after each method, in one table.

    python benchmarks/compression/model.py FOLDER        # once: makes the model
    python benchmarks/compression/table.py FOLDER --out RESULTS

``--methods w8a8 gptq-64`` measures some only; what is in RESULTS already is not measured again.
Figures: perplexity on held-out rows, its rise, bytes of the compressed blocks, seconds, and the
largest memory of the process that compressed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from drivetrain_compression import compress, load_compressed
from model import perplexity  # type: ignore[import-not-found]
from safetensors.torch import load_file

W8A8 = {"bits": 8, "activations": "int8"}
W4A8 = {"group": 64, "activations": "int8"}


def _awq(group: int) -> list[dict[str, Any]]:
    return [{"awq": {"group": group}}, {"round": {"group": group, "clip": True}}]


METHODS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "w8": ("compressed-tensors", [{"round": {"bits": 8}}]),
    "w8a8-rtn": ("compressed-tensors", [{"round": W8A8}]),
    "w8a8-half": (
        "compressed-tensors",
        [{"smoothquant": {"alpha": 0.5, "layers": False}}, {"gptq": W8A8}],
    ),
    "w8a8-smooth": ("compressed-tensors", [{"smoothquant": {}}, {"round": W8A8}]),
    "w8a8": ("compressed-tensors", [{"smoothquant": {}}, {"gptq": W8A8}]),
    "w8a8-rotated": ("compressed-tensors", [{"rotate": {}}, {"smoothquant": {}}, {"gptq": W8A8}]),
    "fp6-rtn": ("drivetrain", [{"round": {"format": "e3m2"}}]),
    "fp6": ("drivetrain", [{"gptq": {"format": "e3m2"}}]),
    "rtn-64": ("compressed-tensors", [{"round": {"group": 64}}]),
    "hqq-64": ("compressed-tensors", [{"hqq": {"group": 64}}]),
    "hqq-64-zeros": ("drivetrain", [{"hqq": {"group": 64, "symmetric": False}}]),
    "awq-64": ("compressed-tensors", _awq(64)),
    "awq-128": ("drivetrain", _awq(128)),
    "awq-gptq-64": ("compressed-tensors", [{"awq": {"group": 64}}, {"gptq": {"group": 64}}]),
    "gptq-64-swept": ("compressed-tensors", [{"gptq": {"group": 64, "sweeps": 2}}]),
    "gptq-64": ("compressed-tensors", [{"gptq": {"group": 64}}]),
    "gptq-64-rotated": ("compressed-tensors", [{"rotate": {}}, {"gptq": {"group": 64}}]),
    "awq-gptq-64-rotated": (
        "compressed-tensors",
        [{"rotate": {}}, {"awq": {"group": 64}}, {"gptq": {"group": 64}}],
    ),
    "gptq-128-rotated": ("drivetrain", [{"rotate": {}}, {"gptq": {"group": 128}}]),
    "gptq-128": ("drivetrain", [{"gptq": {"group": 128}}]),
    "w4a8": ("drivetrain", [{"smoothquant": {}}, {"gptq": W4A8}]),
    "w4a8-rotated": ("drivetrain", [{"rotate": {}}, {"smoothquant": {}}, {"gptq": W4A8}]),
    "sparsegpt-2:4-swept": ("plain", [{"sparsegpt": {"pattern": "2:4", "sweeps": 4}}]),
    "sparsegpt-2:4": ("plain", [{"sparsegpt": {"pattern": "2:4"}}]),
    "wanda-2:4": ("plain", [{"wanda": {"pattern": "2:4"}}]),
}


def measure(
    folder: Path, name: str, work: Path, *, samples: int, length: int, held: int
) -> dict[str, Any]:
    """Compress by one method, and measure what came out."""
    layout, modifiers = METHODS[name]
    rows = load_file(folder / "rows")
    data = list(rows["calibration"][:samples, :length].split(4))
    out = work / name.replace(":", "-")
    began, cpu = time.perf_counter(), time.process_time()
    summary = compress(folder, {"modifiers": modifiers}, data, out, format=layout)
    took, processor = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    errors = list(summary["errors"].values())
    size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    found = {
        "seconds": took,
        "processor_seconds": processor,
        "peak_megabytes": peak,
        "megabytes": size / 1e6,
        "mean_error": sum(errors) / len(errors) if errors else None,
    }
    model = load_compressed(out)
    return {**found, "perplexity": perplexity(model, rows["held"][:held])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--held", type=int, default=24, help="rows that perplexity is measured on")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sizes = {"samples": options.samples, "length": options.length, "held": options.held}
    if options.one == "base":
        rows = load_file(options.folder / "rows")
        model = load_compressed(options.folder)
        found: dict[str, Any] = {"perplexity": perplexity(model, rows["held"][: options.held])}
    elif options.one:
        found = measure(options.folder, options.one, options.out, **sizes)
    else:
        _all(options)
        return
    text = json.dumps({**found, **sizes, "threads": torch.get_num_threads()})
    (options.out / f"{options.one}.json").write_text(text, "utf-8")


def _all(options: argparse.Namespace) -> None:
    every = {}
    for name in ("base", *options.methods):
        if not (options.out / f"{name}.json").exists():  # a process each, for its peak of memory
            command = [sys.executable, *sys.argv, "--one", name]
            subprocess.run(command, check=True, env=os.environ)
        found = json.loads((options.out / f"{name}.json").read_text("utf-8"))
        if name == "base":
            base = found["perplexity"]
        rise = found["perplexity"] / base - 1
        extra = "".join(
            f"  {key} {found[key]:.3f}"
            for key in ("seconds", "megabytes", "mean_error")
            if found.get(key) is not None
        )
        every[name] = {**found, "rise": rise}
        print(f"{name:14} {found['perplexity']:.4f}  {rise:+.2%}{extra}", file=sys.stderr)
    print(json.dumps(every))


if __name__ == "__main__":
    main()

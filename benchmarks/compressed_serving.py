"""Compressed folders beside the same model in bfloat16: one stream, and prompts alone.

    python benchmarks/compressed_serving.py                 # a decoder of SmolLM2-135M's shape
    python benchmarks/compressed_serving.py --model FOLDER  # of Transformers

Weights are rounded to the nearest, as how they are chosen makes no difference to the speed: W8A8,
and 4 bits in groups of 64, whose inputs are rounded, too (``rounds_inputs``). Each has its own
engine in one process, and they take turns. Printed are medians of tokens a second, and ratios to
bfloat16.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from drivetrain_compression import compress, load_packed
from drivetrain_inference import serve
from generate import by_engine, model_of  # type: ignore[import-not-found]

RECIPES: dict[str, dict[str, Any]] = {
    "w8a8": {"round": {"bits": 8, "activations": "int8"}},
    "w4": {"round": {"bits": 4, "group": 64}},
}


def main() -> None:
    """Print one JSON object: by workload, tokens a second and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a folder of Transformers; a random model by default")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of the single stream")
    parser.add_argument("--prompt", type=int, default=384, help="tokens of each of 4 prompts")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    draw = random.Random(0)  # noqa: S311 - the same tokens every time

    def text(length: int) -> list[int]:
        return [draw.randrange(100, 40000) for _ in range(length)]

    work = {
        "single": ([(text(32), options.tokens)], options.tokens),
        "prompts": ([(text(options.prompt), 1) for _ in range(4)], 4 * options.prompt),
    }
    section = {"inference": {"max_context": 1024, "prefix_caching": False}}
    report: dict[str, Any] = {"systems": {}, "megabytes": {}, "fast": {}}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folders = {"bfloat16": Path(options.model or Path(name) / "bfloat16")}
        if options.model is None:
            model_of(None, torch.bfloat16).save_pretrained(folders["bfloat16"])
        for kind, modifier in RECIPES.items():
            folders[kind] = Path(name) / kind
            recipe = {"modifiers": [modifier]}
            compress(folders["bfloat16"], recipe, None, folders[kind], format="drivetrain")
        models: dict[str, Any] = dict(folders)
        models["w4"] = load_packed(folders["w4"], rounds_inputs=True)
        engines = {k: stack.enter_context(serve(m, section)) for k, m in models.items()}
        for kind, engine in engines.items():
            report["fast"][kind] = engine.fast
            files = folders[kind].glob("*.safetensors")
            report["megabytes"][kind] = sum(f.stat().st_size for f in files) / 1e6
            by_engine(engine, [(text(32), 8)])  # kernels are built, memory is touched
        for title, (requests, tokens) in work.items():
            rates: dict[str, list[float]] = {kind: [] for kind in engines}
            for _ in range(options.pairs):
                for kind, engine in engines.items():
                    rates[kind].append(tokens / by_engine(engine, requests))
            found = {kind: statistics.median(values) for kind, values in rates.items()}
            sys.stderr.write(f"{title}: {found}\n")
            ratios = {f"{k}_over_bfloat16": found[k] / found["bfloat16"] for k in RECIPES}
            report["systems"][title] = {**found, **ratios}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

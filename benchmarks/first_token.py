"""Time to the first token: of a prompt whose beginning is in the cache, and after a command.

    python benchmarks/first_token.py --model FOLDER_OR_GGUF_FILE

Prompts of 420 tokens, whose first 400 are the same or differ, one after another in one engine, by
turns. Then ``drivetrain serve`` is started, and the time until the first token of an answer has
come is taken; with ``--drop`` the system's page cache is emptied before, which takes the right to.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
from drivetrain_inference import SamplingParams, load_model, serve


def first(engine: Any, prompt: list[int]) -> float:
    """Seconds until the first token of a prompt."""
    engine.add(prompt, SamplingParams(max_new_tokens=1, ignore_eos=True))
    began = time.perf_counter()
    while engine.busy:
        engine.step()
    return time.perf_counter() - began


def prefixes(model: Path, pairs: int, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds with and without the beginning in the cache, and their ratio."""
    draw = random.Random(0)  # noqa: S311 - the same prompts every time

    def text(number: int) -> list[int]:
        return [draw.randrange(100, 40000) for _ in range(number)]

    shared, times = text(400), {"shared": list[float](), "fresh": list[float]()}
    with serve(load_model(model, dtype), {"inference": {"max_context": 1024}}) as engine:
        first(engine, shared + text(20))
        for _ in range(pairs):
            times["shared"].append(first(engine, shared + text(20)))
            times["fresh"].append(first(engine, text(420)))
    medians = {f"{name}_ms": 1e3 * statistics.median(each) for name, each in times.items()}
    return {**medians, "fresh_over_shared": medians["fresh_ms"] / medians["shared_ms"]}


def from_command(model: Path, dtype: str) -> float:
    """Seconds from the start of ``drivetrain serve`` until a first token has come."""
    command = [
        *(sys.executable, "-m", "drivetrain.cli", "serve", str(model), "--port", "0"),
        *("--name", "model", "--dtype", dtype),
    ]
    began = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = next(f[1] for line in process.stderr if (f := re.search(r"served at (\S+)", line)))
        asked = {"model": "model", "prompt": "Once upon a time", "max_tokens": 8, "stream": True}
        request = Request(  # noqa: S310 - our own server
            f"{url}/v1/completions",
            json.dumps(asked).encode(),
            {"content-type": "application/json"},
        )
        with urlopen(request) as answer:  # noqa: S310
            next(line for line in answer if b'"text":' in line)
            return time.perf_counter() - began
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--drop", action="store_true", help="empty the page cache before a start")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "prefix": prefixes(options.model, options.pairs, getattr(torch, options.dtype))
    }
    starts = []
    for _ in range(options.starts):
        if options.drop:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3")
        starts.append(round(from_command(options.model, options.dtype), 2))
    report["from_command_s"] = starts
    print(json.dumps({"first_token": report}, indent=1))


if __name__ == "__main__":
    main()

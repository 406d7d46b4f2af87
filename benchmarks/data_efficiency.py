"""Train the quickstart's GPT plainly and with less tokens; prints JSON, and draws the curves.

    python benchmarks/data_efficiency.py --seeds 3 --picture plugins/data_efficiency/docs/tokens.svg

The fixed recipe: sequences grow from 64 to 256 bytes over the first 70 % of the steps, and the two
inner layers of four see 192 of 256 tokens at first, all of them at half of the steps. Both runs
have the same steps, batch, optimizer and schedule (examples/gpt.json), one process, and are scored
on the same held-out windows. Tokens are those that the model was given, after truncation.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from gpt import GPT  # noqa: E402
from text_data import split, standard_library  # noqa: E402

import drivetrain  # noqa: E402

CONTEXT = 256


def recipe(steps: int) -> dict[str, Any]:
    """The section ``data_efficiency`` for so many steps."""
    lengths = {
        "clustering_type": "single_cluster",
        "min_difficulty": 64,
        "max_difficulty": CONTEXT,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": int(0.7 * steps), "difficulty_step": 8},
        "truncate": True,
    }
    dropping = {
        "enabled": True,
        "random_ltd_schedule": {
            "min_value": 192,
            "max_value": CONTEXT,
            "schedule_config": {"require_steps": steps // 2, "seq_per_step": 8},
        },
    }
    learning = {"enabled": True, "curriculum_metrics": {"seqlen": lengths}}
    return {
        "enabled": True,
        "data_sampling": {"enabled": True, "curriculum_learning": learning},
        "data_routing": {"enabled": True, "random_ltd": dropping},
    }


def train(kind: str, seed: int, steps: int, every: int) -> list[dict[str, float]]:
    """Train once; returns tokens, layer tokens, seconds and held-out bits per byte as it goes."""
    training, held_out = split(standard_library(), CONTEXT)
    torch.manual_seed(seed)
    overlays = [f"scheduler.params.total_num_steps={steps}", f"seed={seed}"]
    overlays += [f"scheduler.params.warmup_num_steps={steps // 10}", "zero_optimization.stage=0"]
    if kind == "efficient":
        overlays.append(f"data_efficiency={json.dumps(recipe(steps))}")
    engine, _, loader, _ = drivetrain.initialize(
        model=GPT(CONTEXT, 4, 128, 4),
        training_data=training,
        config=ROOT / "examples" / "gpt.json",
        overlays=overlays,
    )
    assert loader is not None
    validation = list(engine.deepspeed_io(held_out.at_most(128), route="eval"))
    found, begin, evaluated = [], time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        engine.train_batch()
        if step % every == 0 or step == steps:
            pause = time.perf_counter()
            bits = score(engine, validation)
            evaluated += time.perf_counter() - pause
            spent = time.perf_counter() - begin - evaluated
            found.append({"step": step, "tokens": engine.progress.tokens, "bits": bits,
                          "seconds": spent})  # fmt: skip
            sys.stderr.write(f"{kind} seed {seed} {found[-1]}\n")
    engine.destroy()
    return found


@torch.no_grad()
def score(engine: drivetrain.Engine, batches: list[Any]) -> float:
    """Held-out bits per byte."""
    engine.eval()
    losses = [float(engine(*batch)) for batch in batches]
    engine.train()
    return sum(losses) / len(losses) / math.log(2)


def picture(runs: dict[str, list[list[dict[str, float]]]]) -> str:
    """Held-out bits per byte over tokens, one line for each run, as SVG."""
    width, height, left, top = 720, 380, 60, 30
    points = [p for many in runs.values() for one in many for p in one]
    most, low = max(p["tokens"] for p in points), min(p["bits"] for p in points)
    high = sorted(p["bits"] for p in points)[int(0.9 * len(points))]

    def x(tokens: float) -> float:
        return left + (width - left - 20) * tokens / most

    def y(bits: float) -> float:
        return top + (height - top - 50) * min(1.0, (high - bits) / (high - low))

    box = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12"'
    rows = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="18" font-size="14">held-out bits per byte over tokens</text>',
    ]
    for color, (name, many) in zip(("#888888", "#c0392b"), runs.items(), strict=True):
        for one in many:
            line = " ".join(f"{x(p['tokens']):.1f},{max(y(p['bits']), top):.1f}" for p in one)
            rows.append(f'<polyline points="{line}" fill="none" stroke="{color}" '
                        'stroke-width="1.5"/>')  # fmt: skip
        place = 40 + 18 * (name == "efficient")
        rows.append(f'<text x="{width - 160}" y="{place}" fill="{color}">{name}</text>')
    for number in range(5):
        bits, tokens = high - (high - low) * number / 4, most * number / 4
        rows.append(
            f'<text x="{left - 6}" y="{y(bits) + 4:.0f}" text-anchor="end">{bits:.2f}</text>'
        )
        rows.append(f'<text x="{x(tokens):.0f}" y="{height - 22}" text-anchor="middle">'
                    f"{tokens / 1e3:,.0f}k</text>")  # fmt: skip
    return "\n".join([*rows, "</svg>\n"])


def main() -> None:
    """Run all seeds of both kinds."""
    parser = argparse.ArgumentParser(description="Quality by tokens of the quickstart's GPT.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    runs: dict[str, list[list[dict[str, float]]]] = {"plain": [], "efficient": []}
    rows = {}
    for seed in range(1, options.seeds + 1):
        for kind, many in runs.items():
            many.append(train(kind, seed, options.steps, options.every))
        plain, ours = runs["plain"][-1][-1], runs["efficient"][-1][-1]
        rows[f"seed {seed}"] = {
            "plain_bits": round(plain["bits"], 4),
            "bits": round(ours["bits"], 4),
            "token_ratio": round(ours["tokens"] / plain["tokens"], 4),
            "time_ratio": round(ours["seconds"] / plain["seconds"], 3),
        }
        print(json.dumps(rows), flush=True)
        if options.picture is not None:
            options.picture.write_text(picture(runs), "utf-8")


if __name__ == "__main__":
    main()

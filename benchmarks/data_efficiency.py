"""Train the quickstart's GPT plainly and with fewer tokens; prints JSON, and draws the curves.

    python benchmarks/data_efficiency.py --seeds 3 --runs runs.jsonl --picture tokens.svg
    python benchmarks/data_efficiency.py --designs plain short same-steps convex
    python benchmarks/data_efficiency.py --first-seed 2 --seeds 2 --runs runs.jsonl

Every design has the batch, the optimizer and the peak rates of examples/gpt.json, one process, and
is scored on the same held-out windows. Tokens are those that the model was given, after truncation;
layer tokens also leave out what random-LTD drops. ``efficient`` is the fixed recipe: so many steps
that the tokens are 0.75 of the plain run's, of which sequences grow from 32 to 256 bytes, slowly at
first; the second of the four layers sees half of the tokens at first, nearly all in the middle, and
232 of 256 at the end; the rate decays by tokens. ``by-tokens`` is a curriculum alone. The others
are those that were tried.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from gpt import GPT  # noqa: E402
from text_data import split, standard_library  # noqa: E402

import drivetrain  # noqa: E402

CONTEXT = 256


LAYERS = 4

BATCH = 16

SHARE = 0.75
"""Of the plain run's tokens, that the others may take."""


@dataclass(frozen=True)
class Design:
    """How sequences grow, how many tokens inner layers see, and what the rate decays by.

    Args:
        first: length at the beginning, in bytes; ``None`` for whole sequences.
        part: of the steps, until sequences are whole.
        degree: of the root by which they grow; below 1 slowly at first.
        kept: tokens that the layers which drop see at first; ``None`` for all.
        kept_part: of the steps, until they would see 256; above 1 they never do.
        dropping: numbers of the layers that drop.
        by_tokens: decay by tokens instead of steps.
        share: of the plain run's tokens; ``None`` for as many steps.
    """

    first: int | None = None
    part: float = 0.9
    degree: float = 1.0
    kept: int | None = None
    kept_part: float = 1.0
    dropping: tuple[int, ...] = (1, 2)
    by_tokens: bool = True
    share: float | None = SHARE

    def length(self, step: int, steps: int) -> int:
        """Bytes of a sequence at a step, from 1."""
        if self.first is None:
            return CONTEXT
        grown = (step / int(self.part * steps)) ** (1 / self.degree)
        raw = math.floor(grown * (CONTEXT - self.first) + self.first)
        return min(max(raw - raw % 8, self.first), CONTEXT)

    def tokens(self, steps: int) -> int:
        """Tokens of so many steps."""
        return BATCH * sum(self.length(step, steps) for step in range(1, steps + 1))

    def layer_tokens(self, steps: int) -> int:
        """Tokens that layers see in so many steps, summed over layers."""
        total = 0
        for step in range(1, steps + 1):
            length, kept = self.length(step, steps), CONTEXT
            if self.kept is not None:
                raw = int((step - 1) / int(self.kept_part * steps) * (CONTEXT - self.kept))
                kept = min(self.kept + raw - (self.kept + raw) % 8, CONTEXT)
            few = len(self.dropping)
            total += BATCH * (min(kept, length) * few + length * (LAYERS - few))
        return total

    def steps(self, plain: int) -> int:
        """The steps that the design may take beside a plain run."""
        if self.share is None:
            return plain
        allowed, steps = self.share * plain * BATCH * CONTEXT, 1
        while self.tokens(steps + 1) <= allowed:
            steps += 1
        return steps

    def section(self, steps: int) -> dict[str, Any]:
        """The section ``data_efficiency`` for so many steps."""
        section: dict[str, Any] = {"enabled": True}
        if self.first is not None:
            growth = {"total_curriculum_step": int(self.part * steps), "difficulty_step": 8}
            lengths = {
                "clustering_type": "single_cluster",
                "min_difficulty": self.first,
                "max_difficulty": CONTEXT,
                "schedule_type": "fixed_root",
                "schedule_config": {**growth, "root_degree": self.degree},
                "truncate": True,
            }
            learning = {"enabled": True, "curriculum_metrics": {"seqlen": lengths}}
            section["data_sampling"] = {"enabled": True, "curriculum_learning": learning}
        if self.by_tokens:
            total = self.tokens(steps)
            rate = {"enabled": True, "by": "tokens", "total": total, "warmup": total // 50}
            section["lr_schedule"] = rate
        if self.kept is not None:
            dropping: dict[str, Any] = {
                "enabled": True,
                "random_ltd_layer_id": list(self.dropping),
                "random_ltd_schedule": {
                    "min_value": self.kept,
                    "max_value": CONTEXT,
                    "schedule_config": {
                        "require_steps": int(self.kept_part * steps),
                        "seq_per_step": 8,
                    },
                },
            }
            section["data_routing"] = {"enabled": True, "random_ltd": dropping}
        return section


DESIGNS = {
    "plain": Design(by_tokens=False, share=None),
    "efficient": Design(first=32, part=1.0, degree=0.8, kept=16, kept_part=1.1, dropping=(1,)),
    "short": Design(by_tokens=False),  # plainly, with the tokens of the others
    "same-steps": Design(first=64, part=0.7, kept=192, kept_part=0.5, by_tokens=False, share=None),
    "by-steps": Design(first=32, by_tokens=False),
    "by-tokens": Design(first=32),
    "convex": Design(first=16, part=1.0, degree=0.5, by_tokens=False),
    "from-64": Design(first=64),
    "early": Design(first=32, part=0.7),
    "two-layers": Design(first=32, kept=24),
    "one-layer": Design(first=32, kept=24, dropping=(2,)),
    "half": Design(first=32, kept=16, kept_part=0.87),
    "to-the-end": Design(first=32, part=1.0, kept=24, dropping=(1,)),
}


def train(kind: str, seed: int, plain: int, every: int) -> dict[str, Any]:
    """Train once; returns tokens, layer tokens and held-out bits per byte as it goes."""
    training, held_out = split(standard_library(), CONTEXT)
    design = DESIGNS[kind]
    steps = design.steps(plain)
    torch.manual_seed(seed)
    by_steps = (steps, steps // 10) if not design.by_tokens else (10**9, 1)
    overlays = [f"scheduler.params.total_num_steps={by_steps[0]}", f"seed={seed}"]
    overlays += [f"scheduler.params.warmup_num_steps={by_steps[1]}", "zero_optimization.stage=0"]
    if kind not in ("plain", "short"):
        overlays.append(f"data_efficiency={json.dumps(design.section(steps))}")
    engine, _, loader, _ = drivetrain.initialize(
        model=GPT(CONTEXT, LAYERS, 128, 4),
        training_data=training,
        config=ROOT / "examples" / "gpt.json",
        overlays=overlays,
    )
    assert loader is not None
    validation = list(engine.deepspeed_io(held_out.at_most(128), route="eval"))
    points: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        engine.train_batch()
        if step % every == 0 or step == steps:
            bits = score(engine, validation)
            points.append({"step": step, "tokens": engine.progress.tokens, "bits": bits})
            sys.stderr.write(f"{kind} seed {seed} {points[-1]}\n")
    engine.destroy()
    assert points[-1]["tokens"] == design.tokens(steps)
    run: dict[str, Any] = {"kind": kind, "seed": seed, "plain_steps": plain, "points": points}
    return {**run, "layer_tokens": design.layer_tokens(steps) // LAYERS}


@torch.no_grad()
def score(engine: drivetrain.Engine, batches: list[Any]) -> float:
    """Held-out bits per byte."""
    engine.eval()
    losses = [float(engine(*batch)) for batch in batches]
    engine.train()
    return sum(losses) / len(losses) / math.log(2)


COLORS = ("#888888", "#c0392b", "#2980b9", "#27ae60", "#8e44ad", "#d35400")


def picture(runs: dict[str, list[Any]]) -> str:
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
    for number, (name, many) in enumerate(runs.items()):
        color = COLORS[number % len(COLORS)]
        for one in many:
            line = " ".join(f"{x(p['tokens']):.1f},{max(y(p['bits']), top):.1f}" for p in one)
            rows.append(f'<polyline points="{line}" fill="none" stroke="{color}" '
                        'stroke-width="1.5"/>')  # fmt: skip
        place = 40 + 18 * number
        rows.append(f'<text x="{width - 160}" y="{place}" fill="{color}">{name}</text>')
    for number in range(5):
        bits, tokens = high - (high - low) * number / 4, most * number / 4
        rows.append(
            f'<text x="{left - 6}" y="{y(bits) + 4:.0f}" text-anchor="end">{bits:.2f}</text>'
        )
        rows.append(f'<text x="{x(tokens):.0f}" y="{height - 22}" text-anchor="middle">'
                    f"{tokens / 1e3:,.0f}k</text>")  # fmt: skip
    return "\n".join([*rows, "</svg>\n"])


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each design and seed: bits, and ratios to the plain run of that seed."""
    plain = {run["seed"]: run for run in runs if run["kind"] == "plain"}
    rows: dict[str, Any] = {}
    for run in runs:
        if run["seed"] not in plain:
            continue
        last, base = run["points"][-1], plain[run["seed"]]
        end = base["points"][-1]
        rows.setdefault(run["kind"], {})[f"seed {run['seed']}"] = {
            "bits": round(last["bits"], 4),
            "bits_ratio": round(last["bits"] / end["bits"], 4),
            "token_ratio": round(last["tokens"] / end["tokens"], 4),
            "layer_token_ratio": round(run["layer_tokens"] / base["layer_tokens"], 4),
        }
    for seeds in rows.values():
        for key in ("bits", "bits_ratio"):
            seeds[f"mean_{key}"] = round(
                statistics.mean(row[key] for row in seeds.values() if isinstance(row, dict)), 4
            )
    return rows


def main() -> None:
    """Run all seeds of the designs, but for those that are in the file of runs."""
    parser = argparse.ArgumentParser(description="Quality by tokens of the quickstart's GPT.")
    parser.add_argument("--seeds", type=int, default=3, help="the last one")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--designs", nargs="+", default=["plain", "efficient"], choices=DESIGNS)
    parser.add_argument("--runs", type=Path, help="JSON lines of runs that are done, added to")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    runs = []
    if options.runs is not None and options.runs.is_file():
        runs = [json.loads(line) for line in options.runs.read_text("utf-8").splitlines()]
    done = {(run["kind"], run["seed"], run["plain_steps"]) for run in runs}
    for seed in range(options.first_seed, options.seeds + 1):
        for kind in options.designs:
            if (kind, seed, options.steps) in done:
                continue
            runs.append(train(kind, seed, options.steps, options.every))
            if options.runs is not None:
                with options.runs.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(runs[-1]) + "\n")
    runs = [run for run in runs if run["plain_steps"] == options.steps]
    print(json.dumps(summary(runs)))
    if options.picture is not None:
        shown: dict[str, list[Any]] = {}
        for run in runs:
            shown.setdefault(run["kind"], []).append(run["points"])
        options.picture.write_text(picture(shown), "utf-8")


if __name__ == "__main__":
    main()

"""Time one training step of several systems side by side, and print the ratios as JSON.

    python benchmarks/train_step.py ddp drivetrain
    python benchmarks/train_step.py ddp drivetrain --accumulation 4 --dtype bf16 --pairs 150
    python benchmarks/train_step.py ddp drivetrain:2 deepspeed:2@/path/to/other/python fsdp2

Every system runs in ranks of its own. The controller lets them take steps in turn, one step each,
round after round, so that all see the same machine at the same time; the ratio of two systems is
the median of the per-round ratios to the first system named, with a 95 % interval from order
statistics. ``system:N`` runs ZeRO stage N; ``system:N+host`` keeps its
optimizer states in host memory, ``system:N+nvme`` in files under ``--nvme-path``, and
``system:3+nvme-params`` the parameters too, and ``system:3+nvme-small`` both with little memory for
buffers and gathered units. ``system@interpreter`` runs a system under another
Python, for peers that live in an environment of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

WORKER = Path(__file__).with_name("train_step_worker.py")


@dataclass(frozen=True)
class Shape:
    """Model and batch; the defaults are the GPT of 34 M parameters."""

    layers: int = 8
    width: int = 512
    heads: int = 8
    vocabulary: int = 8192
    sequence: int = 128
    micro_batch: int = 2
    accumulation: int = 1
    dtype: str = "fp32"
    clipping: float = 0.0
    nvme_path: str = ""


class System:
    """The ranks of one system, which take a step when they are told."""

    def __init__(self, name: str, shape: Shape, ranks: int) -> None:
        self.name, _, interpreter = name.partition("@")
        port = _free_port()
        self._ranks = [
            subprocess.Popen(
                [interpreter or sys.executable, str(WORKER), self.name, json.dumps(asdict(shape))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=_environment(rank, ranks, port),
            )
            for rank in range(ranks)
        ]

    def ready(self) -> dict[str, object]:
        """Wait until every rank has built its model; rank 0's facts about itself."""
        answers = [self._answer(rank) for rank in self._ranks]
        return answers[0]

    def step(self) -> float:
        """Seconds of one step, from the word go to the last rank's answer."""
        begin = time.perf_counter()
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write("step\n")
            rank.stdin.flush()
        for rank in self._ranks:
            self._answer(rank)
        return time.perf_counter() - begin

    def close(self) -> dict[str, object]:
        """End the ranks; what rank 0 says in the end (loss, peak memory)."""
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write("end\n")
            rank.stdin.flush()
        answers = [self._answer(rank) for rank in self._ranks]
        for rank in self._ranks:
            rank.wait(30)
        return answers[0]

    def kill(self) -> None:
        """End the ranks at once."""
        for rank in self._ranks:
            rank.kill()

    def _answer(self, rank: subprocess.Popen[str]) -> dict[str, object]:
        assert rank.stdout is not None
        for line in rank.stdout:
            if line.startswith("{"):
                answer: dict[str, object] = json.loads(line)
                return answer
        raise SystemExit(f"a rank of {self.name} ended with exit code {rank.wait()}")


def main() -> None:
    options = _arguments()
    shape = Shape(**{key: getattr(options, key) for key in Shape.__dataclass_fields__})
    with _systems(options.systems, shape, options.ranks) as systems:
        facts = {name: system.ready() for name, system in systems.items()}
        seconds: dict[str, list[float]] = {name: [] for name in systems}
        for index in range(options.warmup + options.pairs):
            order = list(systems)
            random.Random(index).shuffle(order)  # noqa: S311 - nobody always runs in another's wake
            for name in order:
                elapsed = systems[name].step()
                if index >= options.warmup:
                    seconds[name].append(elapsed)
        last = {name: system.close() for name, system in systems.items()}
    print(json.dumps(_result(options, shape, facts, seconds, last), indent=1))


def _result(
    options: argparse.Namespace,
    shape: Shape,
    facts: dict[str, dict[str, object]],
    seconds: dict[str, list[float]],
    last: dict[str, dict[str, object]],
) -> dict[str, object]:
    baseline = next(iter(seconds))
    tokens = shape.micro_batch * shape.sequence * shape.accumulation * options.ranks
    rows = {}
    for name, times in seconds.items():
        ratios = [own / base for own, base in zip(times, seconds[baseline], strict=True)]
        median = statistics.median(times)
        rows[name] = {
            **facts[name],
            **last[name],
            "seconds_median": round(median, 5),
            "tokens_per_second": round(tokens / median, 1),
            f"time_ratio_to_{baseline}": round(statistics.median(ratios), 4),
            "ratio_interval_95": [round(bound, 4) for bound in median_interval(ratios)],
        }
    return {
        "command": "python benchmarks/train_step.py " + " ".join(sys.argv[1:]),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "rounds": options.pairs,
        "ranks": options.ranks,
        "shape": asdict(shape),
        "systems": rows,
    }


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median from order statistics (normal approximation of the binomial)."""
    ordered = sorted(values)
    reach = 1.96 * math.sqrt(len(ordered)) / 2
    low = max(0, math.floor(len(ordered) / 2 - reach))
    high = min(len(ordered) - 1, math.ceil(len(ordered) / 2 + reach))
    return ordered[low], ordered[high]


@contextlib.contextmanager
def _systems(names: Sequence[str], shape: Shape, ranks: int) -> Iterator[dict[str, System]]:
    systems: dict[str, System] = {}
    try:
        for name in names:
            systems[name] = System(name, shape, ranks)
        yield systems
    finally:
        for system in systems.values():
            system.kill()


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "systems",
        nargs="+",
        help="ddp, drivetrain, deepspeed, fsdp2; the first is the baseline; system:N for ZeRO "
        "stage N, system@interpreter for another Python",
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=100, help="rounds that are counted")
    parser.add_argument("--warmup", type=int, default=5)
    for key, field in Shape.__dataclass_fields__.items():
        kind = type(field.default)
        parser.add_argument(f"--{key.replace('_', '-')}", type=kind, default=field.default)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Systems that take steps in turn, so that all see the same machine at the same time.

A worker is a program that builds one rank of a system from two arguments, the system's name and
settings as JSON. It answers with a line of JSON once it is ready, after every line ``step`` that it
reads, and with its last facts after ``end``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

Facts = dict[str, object]


class System:
    """The ranks of one system, which take a step when they are told.

    Args:
        name: of the system; after ``@`` the interpreter that runs it.
        worker: what runs as a rank.
        settings: passed on to it.
        ranks: how many.
        python: interpreter of systems that name none.
        links: for each rank its network namespace and the interface there, where ranks are kept
            apart; see ``slow_link.py``.
    """

    def __init__(
        self,
        name: str,
        worker: Path,
        settings: Mapping[str, object],
        ranks: int,
        python: str,
        links: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.name, _, interpreter = name.partition("@")
        port = _free_port()
        self._ranks = [
            subprocess.Popen(
                # -P: modules beside the worker are not to be taken for installed packages
                [
                    *(("ip", "netns", "exec", links[rank][0]) if links else ()),
                    *(interpreter or python, "-P", str(worker), self.name, json.dumps(settings)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=_environment(rank, ranks, port, links),
            )
            for rank in range(ranks)
        ]

    def ready(self) -> Facts:
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

    def close(self) -> Facts:
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

    def _answer(self, rank: subprocess.Popen[str]) -> Facts:
        assert rank.stdout is not None
        for line in rank.stdout:
            if line.startswith("{"):
                answer: Facts = json.loads(line)
                return answer
        raise SystemExit(f"a rank of {self.name} ended with exit code {rank.wait()}")


@contextlib.contextmanager
def running(
    names: Sequence[str],
    worker: Path,
    settings: Mapping[str, object],
    ranks: int,
    python: str = sys.executable,
    links: Sequence[tuple[str, str]] = (),
) -> Iterator[dict[str, System]]:
    """Start systems; see :class:`System`. Those that still run at the end are killed."""
    systems: dict[str, System] = {}
    try:
        for name in names:
            systems[name] = System(name, worker, settings, ranks, python, links)
        yield systems
    finally:
        for system in systems.values():
            system.kill()


def take_turns(systems: Mapping[str, System], warmup: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every counted step; in each round every system takes one, in another order."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for index in range(warmup + rounds):
        order = list(systems)
        random.Random(index).shuffle(order)  # noqa: S311 - nobody always runs in another's wake
        for name in order:
            elapsed = systems[name].step()
            if index >= warmup:
                seconds[name].append(elapsed)
    return seconds


def row(times: Sequence[float], base: Sequence[float], baseline: str) -> Facts:
    """What is told of one system: its median, and the ratio to another in the same rounds."""
    ratios = [own / other for own, other in zip(times, base, strict=True)]
    return {
        "seconds_median": round(statistics.median(times), 5),
        f"time_ratio_to_{baseline}": round(statistics.median(ratios), 4),
        "ratio_interval_95": [round(bound, 4) for bound in median_interval(ratios)],
    }


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median from order statistics (normal approximation of the binomial)."""
    ordered = sorted(values)
    reach = 1.96 * math.sqrt(len(ordered)) / 2
    low = max(0, math.floor(len(ordered) / 2 - reach))
    high = min(len(ordered) - 1, math.ceil(len(ordered) / 2 + reach))
    return ordered[low], ordered[high]


def _environment(
    rank: int, ranks: int, port: int, links: Sequence[tuple[str, str]]
) -> dict[str, str]:
    apart = {"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": links[rank][1]} if links else {}
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        **apart,
    }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])

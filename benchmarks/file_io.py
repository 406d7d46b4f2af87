"""Our file engines beside fio: the same block size, queue depth and threads, in both directions.

    python benchmarks/file_io.py --folder /scratch --rounds 5

Both write and read one file past the page cache, in turns, so that a disk whose speed changes does
so for both. Needs the ``fio`` program (a package of that name in most distributions).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from drivetrain_offload.bench.io_measure import move
from drivetrain_offload.file_io import IOSettings

FIO_ENGINES = {"io_uring": "io_uring", "libaio": "libaio", "threads": "psync"}


@dataclass(frozen=True)
class Case:
    engine: str
    block: int
    depth: int
    threads: int
    direction: str


@dataclass(frozen=True)
class Figure:
    """GB/s, and processor seconds per GB."""

    speed: float
    cpu: float


def main() -> None:
    options = parse()
    if shutil.which("fio") is None:
        print("fio is not installed, so there is nothing to compare with; skipped")
        return
    cases = [
        Case(engine, kib << 10, depth, threads, direction)
        for engine in options.engines
        for kib, depth, threads in options.settings
        for direction in ("write", "read")
    ]
    # One file for both, by name: fio opens it in a process of its own.
    target = options.folder / "drivetrain-benchmark-of-files"
    try:
        target.touch(exist_ok=False)
        size = options.mib << 20
        os.posix_fallocate(os.open(target, os.O_RDWR), 0, size)
        move(str(target), IOSettings(), "write", size, seconds=1e9, passes=1)
        for case in cases:
            measure(str(target), case, options)
    finally:
        target.unlink(missing_ok=True)


def measure(target: str, case: Case, options: argparse.Namespace) -> None:
    figures: dict[str, list[Figure]] = {"ours": [], "fio": []}
    both = {"ours": ours, "fio": fio}
    for number in range(options.rounds):
        # Who comes first may find another disk than who comes second.
        for name in sorted(both, reverse=number % 2 == 1):
            figures[name].append(both[name](target, case, options.mib, options.seconds))
    ratios = [a.speed / b.speed for a, b in zip(figures["ours"], figures["fio"], strict=True)]
    speed = {name: median(f.speed for f in found) for name, found in figures.items()}
    cpu = {name: median(f.cpu for f in found) for name, found in figures.items()}
    print(
        f"| {case.engine} | {case.direction} | {case.block >> 10} | {case.depth} | {case.threads} "
        f"| {speed['ours']:.2f} | {speed['fio']:.2f} | {median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}) | {cpu['ours']:.2f} | {cpu['fio']:.2f} |",
        flush=True,
    )


def ours(path: str, case: Case, mib: int, seconds: float) -> Figure:
    settings = IOSettings(case.block, case.depth, case.threads, engine=case.engine)
    found, engine = move(
        path, settings, case.direction, mib << 20, seconds=seconds, request=case.block
    )
    assert engine == case.engine
    return Figure(found.bytes_per_second / 1e9, found.cores / (found.bytes_per_second / 1e9))


def fio(target: str, case: Case, mib: int, seconds: float) -> Figure:
    """fio's figure: one thread per job, each with its own part of the file and its own queue."""
    # Its synchronous engine gets its depth from threads, as ours does.
    blocking = case.engine == "threads"
    jobs = case.threads * (case.depth if blocking else 1)
    command = [
        "fio",
        "--name=job",
        f"--filename={target}",
        f"--ioengine={FIO_ENGINES[case.engine]}",
        f"--rw={case.direction}",
        f"--bs={case.block}",
        f"--iodepth={1 if blocking else case.depth}",
        f"--numjobs={jobs}",
        f"--size={(mib << 20) // jobs}",
        f"--offset_increment={(mib << 20) // jobs}",
        "--direct=1",
        "--thread",
        "--group_reporting",
        "--output-format=json",
        "--time_based",
        f"--runtime={round(seconds * 1000)}ms",
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    job = json.loads(answer)["jobs"][0]
    speed = job[case.direction]["bw_bytes"] / 1e9
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Figure(speed, cpu / (job[case.direction]["io_bytes"] / 1e9))


def median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))  # noqa: S108
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--engines", nargs="+", default=list(FIO_ENGINES), choices=FIO_ENGINES)
    parser.add_argument(
        "--settings",
        nargs="+",
        type=lambda text: tuple(map(int, text.split(","))),
        default=[(1024, 8, 1), (256, 32, 1), (1024, 8, 2)],
        help="block KiB,queue depth,threads",
    )
    options = parser.parse_args()
    print(time.strftime("%Y-%m-%d"), f"{options.rounds} rounds, medians")
    print(
        "| engine | direction | block, KiB | depth | threads | ours, GB/s | fio, GB/s "
        "| ours ÷ fio (range) "
        "| ours, CPU s/GB | fio, CPU s/GB |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    return options


if __name__ == "__main__":
    main()

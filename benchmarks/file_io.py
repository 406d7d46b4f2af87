"""Our file engines beside fio: the same block size, queue depth and threads, in both directions.

    python benchmarks/file_io.py --folder /scratch --rounds 5

Both write and read one file past the page cache, in turns, so that a disk whose speed changes does
so for both. Needs the ``fio`` program (a package of that name in most distributions).
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drivetrain_offload.file_io import IOSettings
from drivetrain_offload.io_measure import move, scratch_file

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
    with scratch_file(options.folder, options.mib << 20) as path:
        # fio opens files by name in processes of its own.
        target = options.folder / "drivetrain-fio"
        try:
            fio(str(target), Case("io_uring", 1 << 20, 8, 1, "write"), options.mib, None)
            move(path, IOSettings(), "write", options.mib << 20, seconds=1e9, passes=1)
            for case in cases:
                measure(path, str(target), case, options)
        finally:
            target.unlink(missing_ok=True)


def measure(path: str, target: str, case: Case, options: argparse.Namespace) -> None:
    own: list[Figure] = []
    other: list[Figure] = []
    for _ in range(options.rounds):
        own.append(ours(path, case, options.mib, options.seconds))
        other.append(fio(target, case, options.mib, options.seconds))
    ours_speed, fio_speed = (median(f.speed for f in figures) for figures in (own, other))
    ours_cpu, fio_cpu = (median(f.cpu for f in figures) for figures in (own, other))
    print(
        f"| {case.engine} | {case.direction} | {case.block >> 10} | {case.depth} | {case.threads} "
        f"| {ours_speed:.2f} | {fio_speed:.2f} | {ours_speed / fio_speed:.2f} "
        f"| {ours_cpu:.3f} | {fio_cpu:.3f} |",
        flush=True,
    )


def ours(path: str, case: Case, mib: int, seconds: float) -> Figure:
    settings = IOSettings(case.block, case.depth, case.threads, engine=case.engine)
    found, engine = move(
        path, settings, case.direction, mib << 20, seconds=seconds, request=case.block
    )
    assert engine == case.engine
    return Figure(found.bytes_per_second / 1e9, found.cores / (found.bytes_per_second / 1e9))


def fio(target: str, case: Case, mib: int, seconds: float | None) -> Figure:
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
        *(["--time_based", f"--runtime={seconds}"] if seconds is not None else []),
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    job = json.loads(answer)["jobs"][0]
    speed = job[case.direction]["bw_bytes"] / 1e9
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Figure(speed, cpu / (job[case.direction]["io_bytes"] / 1e9))


def median(values: Sequence[float]) -> float:
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
        "| engine | direction | block, KiB | depth | threads | ours, GB/s | fio, GB/s | ours ÷ fio "
        "| ours, CPU s/GB | fio, CPU s/GB |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    return options


if __name__ == "__main__":
    main()

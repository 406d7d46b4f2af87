"""A step with optimizer states in files, beside what the disk and the update take by themselves.

    python benchmarks/nvme_home.py --folder /scratch --millions 128 --steps 5

One bucket of bf16 parameters with float32 masters and Adam's moments. The disk's share is the
states' bytes at the bandwidths measured, with the same ``aio`` settings and in the same run: for
reading and for writing alone, one after the other, and for both at once, which is what a step does.
Compute is the same update with the states in memory. All take turns, so that a disk whose speed
changes does so for all.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from drivetrain_kernels.rules import FusedAdam
from drivetrain_offload.bench.io_measure import move, scratch_file
from drivetrain_offload.file_io import IOSettings
from drivetrain_offload.files.home import nvme_homes
from drivetrain_offload.section import Aio, OffloadOptimizer

from drivetrain.contracts import BucketSpec, Segment, StateHome
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.states.device_home import DeviceHome

KINDS = 3  # masters and two moments, in float32


def main() -> None:
    options = parse()
    rule = FusedAdam(lr=1e-4)
    numel = options.millions * 10**6
    spec = BucketSpec(
        key="b0",
        numel=numel,
        segments=(Segment("weights", (numel,), 0, numel, 0),),
        parameter_dtype=torch.bfloat16,
        gradient_dtype=torch.bfloat16,
        master_dtype=torch.float32,
        state_dtype=torch.float32,
        reduction=("dp",),
        rule=rule,
        group=0,
        device=torch.device("cpu"),
    )
    section = OffloadOptimizer.model_validate(
        {
            "device": "nvme",
            "nvme_path": str(options.folder),
            "buffer_size": options.buffer_size,
            "buffer_count": options.buffer_count,
        }
    )
    parameters = torch.zeros(numel, dtype=torch.bfloat16)
    gradient = torch.randn(1 << 16).to(torch.bfloat16).repeat(numel // (1 << 16) + 1)[:numel]
    settings = IOSettings(options.block_size << 10, options.queue_depth, engine=options.engine)
    aio = Aio.model_validate(asdict(settings))
    plan = Plan.build({"train_batch_size": 1}, world_size=1)
    with Job.open(plan) as job, scratch_file(options.folder, options.mib << 20) as scratch:
        (home,) = nvme_homes(job, [spec], section, aio)
        home.adopt(parameters, parameters)
        memory = DeviceHome(spec)
        memory.adopt(parameters.clone(), parameters)
        move(scratch, settings, "write", options.mib << 20, seconds=1e9, passes=1)

        def bandwidth(direction: str) -> float:
            seconds = options.seconds
            found, _ = move(scratch, settings, direction, options.mib << 20, seconds=seconds)
            return found.bytes_per_second

        measure(home, memory, gradient, bandwidth, options.steps)


def measure(
    home: StateHome,
    memory: StateHome,
    gradient: torch.Tensor,
    bandwidth: Callable[[str], float],
    steps: int,
) -> None:
    rows = []
    nbytes = gradient.numel() * KINDS * 4
    for number in range(steps + 1):
        read, write = bandwidth("read"), bandwidth("write")
        with ThreadPoolExecutor() as pool:
            both = sum(pool.map(bandwidth, ("read", "write")))
        compute = timed(memory, gradient)
        cpu = time.process_time()
        spent = timed(home, gradient)
        cpu = time.process_time() - cpu
        if number:  # the first step finds nothing read ahead
            in_turn = nbytes / read + nbytes / write
            rows.append((spent, in_turn, 2 * nbytes / both, compute, cpu, read, write, both))
    step, in_turn, at_once, compute, cpu, *speeds = map(statistics.median, zip(*rows, strict=True))
    read, write, both = (f"{speed / 1e9:.2f}" for speed in speeds)
    print(
        f"states of {nbytes / 1e9:.2f} GB; disk: {read} GB/s read, {write} GB/s written, {both} "
        f"GB/s both at once\nstep {step:.2f} s (processor {cpu:.2f} s); disk alone {in_turn:.2f} s "
        f"in turn, {at_once:.2f} s at once; compute alone {compute:.2f} s"
    )
    ratios = sorted(row[0] / max(row[2], row[3]) for row in rows)
    print("step / larger of disk at once and compute:", *(f"{ratio:.2f}" for ratio in ratios))


def timed(home: StateHome, gradient: torch.Tensor) -> float:
    rule = home.spec.rule
    assert rule is not None
    began = time.perf_counter()
    home.gradient_ready(gradient)
    home.update(gradient, rule.defaults, 1.0)
    home.publish()
    home.flush()
    return time.perf_counter() - began


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))  # noqa: S108
    parser.add_argument("--millions", type=int, default=128, help="parameters")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--buffer-size", type=int, default=1_048_576, help="elements of a tile")
    parser.add_argument("--buffer-count", type=int, default=16)
    parser.add_argument("--block-size", type=int, default=1024, help="KiB")
    parser.add_argument("--queue-depth", type=int, default=8)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--mib", type=int, default=1024, help="file that measures the disk")
    parser.add_argument("--seconds", type=float, default=1.0, help="for measuring the disk")
    return parser.parse_args()


if __name__ == "__main__":
    main()

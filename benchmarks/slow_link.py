"""Step rates of four ranks in two network namespaces whose link is throttled (Linux, as root).

Each namespace stands for a host with two ranks. What leaves it passes a token bucket (``tc tbf``),
so ``--mbit`` bounds each direction of the link. Shared memory is off, since the hosts are one.
Every way of training is run for some steps; the table has the median step, how many times the
plain run's rate that is, and the bytes that a rank sends per step by the communicator's log.

    sudo .venv/bin/python benchmarks/slow_link.py --mbit 100
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

RANKS, HOSTS = 4, 2
WARM_UP = 2
"""Updates of the warm-up of 1-bit optimizers, before what is measured."""

_ONE_BIT = {"lr": 1e-4, "freeze_step": WARM_UP}
_ZERO_ONE = {
    "lr": 1e-4,
    "var_freeze_step": WARM_UP,
    "local_step_scaler": 1,
    "local_step_clipper": 4,
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16 gradients": {"communication_data_type": "bf16"},
    "int8 gradients": {"compress": {"method": "int8", "error_feedback": True}},
    "int4 gradients": {"compress": {"method": "int4", "error_feedback": True}},
    "PowerSGD, rank 4": {"compress": {"method": "powersgd"}},
    "top 1 %": {"compress": {"method": "top_k"}},
    "1-bit Adam": {"optimizer": ("OneBitAdam", _ONE_BIT)},
    "1-bit LAMB": {"optimizer": ("OneBitLamb", _ONE_BIT)},
    "0/1 Adam, every 4th": {"optimizer": ("ZeroOneAdam", _ZERO_ONE)},
}


def config_of(way: dict[str, Any]) -> dict[str, Any]:
    kind, params = way.get("optimizer", ("Adam", {"lr": 1e-4}))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "cpu": {"shared_memory": False, "bind_cores": False, "threads": 1},
        "optimizer": {"type": kind, "params": params},
    }
    if "compress" in way:
        config["communication"] = {"compress": {"gradients": way["compress"]}}
    if "communication_data_type" in way:
        config["communication_data_type"] = way["communication_data_type"]
    return config


def worker(name: str, steps: int, width: int) -> None:
    """One rank: train, and let rank 0 print what a step took and sent."""
    import torch
    from torch import nn

    import drivetrain

    torch.manual_seed(0)
    layers = [nn.Linear(width, width) for _ in range(4)]
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.GELU())])
    engine, *_ = drivetrain.initialize(model=model, config=config_of(WAYS[name]))
    inputs = torch.randn(2, width)
    times = []
    for step in range(WARM_UP + 2 + steps):
        if step == WARM_UP + 2:
            engine.job.byte_log.reset()
        begin = time.perf_counter()
        engine.backward(engine(inputs).square().mean())
        engine.step()
        times.append(time.perf_counter() - begin)
    sent = engine.job.byte_log.total().sent_bytes / steps
    if engine.job.rank == 0:
        # A mean over steps, since some ways communicate in some steps only.
        seconds = statistics.mean(times[WARM_UP + 2 :])
        numel = sum(p.numel() for p in model.parameters())
        print(json.dumps({"seconds": seconds, "sent": sent, "parameters": numel}))
    engine.destroy()


@contextmanager
def hosts(mbit: int) -> Iterator[list[str]]:
    """Names of two namespaces whose link takes ``mbit`` Mbit/s each way; gone afterwards."""
    names = [f"dt{os.getpid()}{host}" for host in "ab"]
    ends = [f"v{os.getpid()}{host}" for host in "ab"]

    def run(*words: str) -> None:
        subprocess.run(words, check=True)

    try:
        for name in names:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            inside = ("ip", "-n", name)
            run("ip", "link", "set", end, "netns", name)
            run(*inside, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            run(*inside, "link", "set", end, "up")
            run(*inside, "link", "set", "lo", "up")
            rate = ("rate", f"{mbit}mbit", "burst", "64kb", "latency", "400ms")
            run("tc", "-n", name, "qdisc", "add", "dev", end, "root", "tbf", *rate)
        yield names
    finally:
        for name in names:
            subprocess.run(("ip", "netns", "del", name), check=False)  # noqa: S607


def measure(names: list[str], way: str, steps: int, width: int, port: int) -> dict[str, Any]:
    """What rank 0 prints of one way."""
    ranks = []
    for rank in range(RANKS):
        host, local = divmod(rank, RANKS // HOSTS)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "WORLD_SIZE": str(RANKS),
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(RANKS // HOSTS),
            "MASTER_ADDR": "10.77.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": f"v{os.getpid()}{'ab'[host]}",
        }
        own = [sys.executable, __file__, "--worker", way, "--steps", str(steps)]
        command = ["ip", "netns", "exec", names[host], *own, "--width", str(width)]
        out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        ranks.append(
            subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.DEVNULL)
        )
    try:
        text, _ = ranks[0].communicate(timeout=900)
        for process in ranks[1:]:
            process.wait(timeout=60)
    finally:
        for process in ranks:
            process.kill()
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mbit", type=int, default=100, help="of the link, each way")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--width", type=int, default=512, help="of the model's four layers")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker, given.steps, given.width)
        return
    rows = {}
    with hosts(given.mbit) as names:
        for number, way in enumerate(given.ways):
            rows[way] = measure(names, way, given.steps, given.width, 29400 + number)
            print(way, rows[way], file=sys.stderr)
    plain = rows[given.ways[0]]["seconds"]
    for row in rows.values():
        row["rate"] = plain / row["seconds"]
    print(json.dumps({"mbit": given.mbit, "ways": rows}, indent=1))


if __name__ == "__main__":
    main()

"""One rank of a training whose peak memory and step time are measured; see plan.py.

Usage: plan_worker.py CONFIG.json MODEL SEQUENCE STEPS RESULTS [LIMIT]

MODEL is a name in plan_models. LIMIT: bytes that the process may map for data (RLIMIT_DATA) more
than it has when it begins to build.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import plan_models
import torch

import drivetrain


def status(key: str, file: str = "status") -> int:
    """Bytes that a file of ``/proc/self`` tells."""
    for line in Path("/proc/self", file).read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(key)


def of_others() -> int:
    """Bytes of the resident set that are other ranks' part of what is shared.

    Each of n processes that map a page counts it whole. As 1/n of a page in each, what ranks have
    adds up to what the host needs.
    """
    return status("RssShmem") - status("Pss_Shmem", "smaps_rollup")


def micro_batch(samples: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and the tokens that follow them."""
    tokens = torch.randint(0, 100, (samples, sequence + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def train(model: torch.nn.Module, config: dict, sequence: int, steps: int) -> dict[str, Any]:
    """Wall and processor seconds of each step, and :func:`of_others` when all have run."""
    engine, *_ = drivetrain.initialize(model=model, config=config)
    samples = engine.train_micro_batch_size_per_gpu()
    wall, cpu = [], []
    for _ in range(steps):
        begin, used = time.perf_counter(), time.process_time()
        micro_batches = (
            micro_batch(samples, sequence) for _ in range(engine.gradient_accumulation_steps())
        )
        if engine.job.mesh.size("pp") > 1:
            engine.train_batch(micro_batches)
        for inputs in micro_batches:  # those that no pipeline has taken
            loss = engine(*inputs)
            engine.backward(loss)
            del loss
            engine.step()
        wall.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - used)
    # What is shared is made by the first step, and is there until the engine ends on any rank.
    others = of_others()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    engine.destroy()
    return {"wall": wall, "cpu": cpu, "others": others}


def main() -> None:
    config_file, name, sequence, steps, results, *limit = sys.argv[1:]
    config = json.loads(Path(config_file).read_text())
    torch.distributed.init_process_group("gloo") if "WORLD_SIZE" in os.environ else None
    # What a first step loads (kernels, threads) is no tensor of the job: a small one comes before.
    train(plan_models.TINY(), config, 8, 2)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    if limit:
        most = status("VmData") + int(limit[0])
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    found = train(getattr(plan_models, name)(), config, int(sequence), int(steps))
    found["resident"] = status("VmHWM") - before
    found["peak"] = found["resident"] - found["others"]
    rank = os.environ.get("RANK", "0")
    Path(results, f"rank{rank}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

"""A script whose ranks are killed, for tests: trains a model, and goes on from memory.

Arguments: a JSON object with ``config``, ``steps``, ``kills`` (one [step, rank] for each start of
the workers, the first ones) and ``weights`` (file that rank 0 writes at the end); ``parts`` is
[start, step, rank] where one rank meets nobody; ``waits`` is [start, step, file] where all write a
mark into the folder ``marks`` and wait for the file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from drivetrain_elasticity import resume
from drivetrain_elasticity.client import owner_of_workers

import drivetrain
from drivetrain.contracts import Purpose, Tag
from drivetrain.testing import data, models


def main() -> None:
    """Train to the end."""
    order: dict[str, Any] = json.loads(sys.argv[1])
    samples = list(zip(*data.tokens(64), strict=True))
    engine = drivetrain.initialize(
        model=models.tiny_gpt(), config=order["config"], training_data=samples
    )[0]
    place, _ = resume(engine, order.get("save_dir"))
    start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if engine.job.rank == 0:
        sys.stdout.write(f"start {start}: from {place} at step {engine.global_steps}\n")
        sys.stdout.write(f"keeper of {owner_of_workers()}\n")
    kills = dict(enumerate(order["kills"]))
    while engine.global_steps < order["steps"]:
        if kills.get(start) == [engine.global_steps, engine.job.rank]:
            os.kill(os.getpid(), signal.SIGKILL)
        if [start, engine.global_steps, engine.job.rank] == order.get("parts"):
            engine.job.communicator.barrier("world", Tag(Purpose.CONTROL, site="alone"))
        if [start, engine.global_steps] == order.get("waits", [])[:2]:
            (Path(order["marks"]) / f"waits-{engine.job.rank}").touch()
            while not Path(order["waits"][2]).exists():
                time.sleep(0.05)
        engine.train_batch()
    weights = engine.module_state_dict()
    if engine.job.rank == 0:
        torch.save(weights, order["weights"])
    engine.job.close()


if __name__ == "__main__":
    main()

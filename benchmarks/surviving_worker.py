"""A rank of ``surviving.py``: trains from a copy in memory or a checkpoint, and tells what it saw.

Arguments: a JSON object with ``config``, ``folder`` (of files between driver and ranks), ``pace``
(seconds that a step takes at least), ``until`` (steps, or null for: until ``folder/stop`` exists),
``leave_at`` (step after which rank 0 is told to leave, or null) and ``save_dir`` (or null).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from drivetrain_elasticity import resume

import drivetrain
from drivetrain.contracts import Op, Purpose, Tag
from drivetrain.testing import data
from drivetrain.testing.models import TinyGPT


class Opened:
    """Files that Python has opened while :meth:`counting` is entered; code and devices aside."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._on = False
        sys.addaudithook(self._hear)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count inside of the block."""
        self._on = True
        yield
        self._on = False

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on or event != "open" or not isinstance(arguments[0], str | bytes):
            return
        name = os.fsdecode(arguments[0])
        if not name.startswith(("/proc/", "/sys/", "/dev/")) and not name.endswith((".py", ".pyc")):
            self.names.append(name)


def disk_bytes() -> int:
    """Bytes that this process has fetched from disks."""
    lines = Path("/proc/self/io").read_text("utf-8").splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def main() -> None:
    """Train to the end."""
    order: dict[str, Any] = json.loads(sys.argv[1])
    folder = Path(order["folder"])
    opened, moments = Opened(), {"started": time.time()}
    torch.manual_seed(0)
    samples = list(zip(*data.tokens(600), strict=True))
    engine: Any = drivetrain.initialize(
        model=TinyGPT(64, 64, 4), config=order["config"], training_data=samples
    )[0]
    moments["initialized"] = time.time()
    rank, start = engine.job.rank, int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    (folder / f"{start}-rank{rank}.pid").write_text(str(os.getpid()), "utf-8")
    before = disk_bytes()
    with opened.counting():
        place, _ = resume(engine, order["save_dir"])
    moments["resumed"] = time.time()
    facts = {"opened": opened.names, "disk_bytes": disk_bytes() - before}
    (folder / f"{start}-rank{rank}.read.json").write_text(json.dumps(facts), "utf-8")
    first = True
    while not ended(engine, order, folder):
        began = time.monotonic()
        if rank == 0 and engine.global_steps == order["leave_at"]:
            os.kill(os.getpid(), signal.SIGTERM)
        engine.train_batch()
        if first and rank == 0:
            moments["stepped"] = time.time()
            facts = {"from": place, "step": engine.global_steps - 1, "moments": moments}
            aside = folder / "aside"
            aside.write_text(json.dumps(facts), "utf-8")
            aside.rename(folder / f"{start}.started.json")
        first = False
        time.sleep(max(0.0, order["pace"] - (time.monotonic() - began)))
    weights = engine.module_state_dict()
    if rank == 0:
        torch.save({"steps": engine.global_steps, "weights": weights}, folder / "end.pt")
    engine.job.close()


def ended(engine: Any, order: dict[str, Any], folder: Path) -> bool:
    """Whether training is over, the same on all ranks."""
    if order["until"] is not None:
        return bool(engine.global_steps >= order["until"])
    seen = torch.tensor(float((folder / "stop").exists()))
    tag = Tag(Purpose.CONTROL, site="stop")
    engine.job.communicator.all_reduce(seen, "world", tag, op=Op.MAX)
    return bool(seen)


if __name__ == "__main__":
    main()

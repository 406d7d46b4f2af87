"""How much of a processor a warm rank takes until it has an engine, as JSON.

    python benchmarks/warm_start.py

One rank of ``drivetrain run --spare`` builds a small GPT with ZeRO's second stage, ``survival`` and
``exact``, fails, and is started again, until nothing is left to import: ``first`` is the start at
which the spare has what every job needs, ``later`` the median of three starts at which it has also
what this rank had imported. Seconds are of the rank's processor time, from the first line of its
script to the end of ``initialize``, and do not depend on what else the machine does.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "train_batch_size": 12,
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 2},
    "exact": {},
    "survival": {"every": 5},
}
STARTS = 3
"""Of a rank for which everything is loaded."""


def main() -> None:
    """Print the figures, or be the rank."""
    if len(sys.argv) > 1:
        rank(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory(dir=".") as place:
        facts = Path(place).resolve() / "facts"
        command = [
            *(str(Path(sys.executable).with_name("drivetrain")), "run", "--nproc", "1", "--spare"),
            *("--max-restarts", "50", "--log-dir", f"{place}/logs", __file__, str(facts)),
        ]
        subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=sys.stderr, check=True
        )
        starts = [json.loads(line) for line in facts.read_text("utf-8").splitlines()]
    later = statistics.median(start["seconds"] for start in starts if not start["imported"])
    first = starts[0]["seconds"]
    found = {"first": first, "later": round(later, 3), "later_of_first": round(later / first, 3)}
    print(json.dumps({**found, "starts": starts}, indent=2))


def rank(facts: Path) -> None:
    """One start; fails unless it is the last one."""
    began, had = time.process_time(), set(sys.modules)
    import drivetrain
    from drivetrain.testing import data
    from drivetrain.testing.models import TinyGPT

    samples = list(zip(*data.tokens(60), strict=True))
    drivetrain.initialize(model=TinyGPT(64, 64, 4), config=CONFIG, training_data=samples)
    seconds = time.process_time() - began
    imported = len([name for name in sys.modules if name not in had])
    with facts.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"seconds": round(seconds, 3), "imported": imported}) + "\n")
    lines = facts.read_text("utf-8").splitlines()
    if sum(json.loads(line)["imported"] == 0 for line in lines) < STARTS:
        time.sleep(3)  # so that the spare learns
        os._exit(1)


if __name__ == "__main__":
    main()

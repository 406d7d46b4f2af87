"""Time the start and a resume of a curriculum over many samples; prints JSON.

    python benchmarks/sampler_start.py --samples 100000000 --folder /somewhere/with/room

The metric's files are written first (4 bytes a sample). A start is everything from the config's
section to the first global batch; a resume goes to a step in the middle of the curriculum.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from drivetrain_data_efficiency import CurriculumOrder, IndexedWriter
from drivetrain_data_efficiency.section import CurriculumLearningSection

VALUES = 1000


def anonymous() -> int:
    """Memory of this process that is no mapped file, in KiB."""
    rows = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("RssAnon"))


def write(folder: Path, samples: int) -> dict[str, str]:
    """Files of a metric with ``VALUES`` values, equally frequent."""
    paths = {}
    for name, key in (("sample", "index_to_sample_path"), ("metric", "index_to_metric_path")):
        prefix = folder / f"m_index_to_{name}"
        writer = IndexedWriter(f"{prefix}.bin", np.uint32 if name == "sample" else np.int64)
        for value in range(VALUES):
            row = np.arange(value, samples, VALUES) if name == "sample" else np.array([value + 1])
            writer.add_item(row)
        writer.finalize(f"{prefix}.idx")
        paths[key] = str(prefix)
    return paths


def main() -> None:
    """Write, start, resume."""
    parser = argparse.ArgumentParser(description="Seconds until the first batch of a curriculum.")
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--folder", type=Path, help="where files are written; a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        metric = {
            **write(Path(folder), options.samples),
            "min_difficulty": 10,
            "max_difficulty": VALUES,
            "schedule_type": "fixed_linear",
            "schedule_config": {"total_curriculum_step": 10_000, "difficulty_step": 1},
        }
        section = CurriculumLearningSection.model_validate(
            {"enabled": True, "curriculum_metrics": {"m": metric}}
        )
        before = anonymous()
        keys = {"batch_size": 1024, "num_epochs": 1, "seed": 1}
        begin = time.perf_counter()
        order = CurriculumOrder(section, options.samples, **keys)
        first = order.items(0, 0)
        batch = [next(first) for _ in range(1024)]
        started = time.perf_counter() - begin
        middle = 1024 * 5000
        next(order.items(0, middle))  # a run that comes to step 5000
        state = order.state_dict(0, middle)
        begin = time.perf_counter()
        other = CurriculumOrder(section, options.samples, **keys)
        other.load_state_dict(json.loads(json.dumps(state)))
        rest = other.items(0, middle)
        again = [next(rest) for _ in range(1024)]
        resumed = time.perf_counter() - begin
        assert len(batch) == len(again)
        grown = anonymous() - before
    figures = {"start_s": round(started, 4), "resume_s": round(resumed, 4)}
    print(json.dumps({"samples": options.samples, **figures, "grown_mib": round(grown / 1024, 1)}))


if __name__ == "__main__":
    main()

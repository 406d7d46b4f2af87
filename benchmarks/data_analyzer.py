"""Time the analysis of a data set's lengths, by processes of its own; prints JSON.

    python benchmarks/data_analyzer.py
    python benchmarks/data_analyzer.py --peer /path/to/python/with/deepspeed

Both analyze the same samples with the same metric function and number of processes, through the
class that DeepSpeed calls ``DataAnalyzer``. Each takes its turn ``--rounds`` times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch


class Rows(torch.utils.data.Dataset[torch.Tensor]):
    """Rows of tokens whose lengths are log-normal, 8 to 2048."""

    def __init__(self, samples: int) -> None:
        drawn = np.random.default_rng(0).lognormal(5.6, 0.7, samples)
        self.lengths = np.minimum(drawn.astype(int) + 8, 2048)
        self.flat = torch.zeros(2048, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.flat[: self.lengths[index]]


def as_they_are(samples: list[torch.Tensor]) -> list[torch.Tensor]:
    """A batch that is the list of samples."""
    return samples


def lengths(batch: list[torch.Tensor]) -> torch.Tensor:
    """Tokens of each sample."""
    return torch.tensor([len(sample) for sample in batch], dtype=torch.int64)


def once(who: str, samples: int, processes: int) -> None:
    """Analyze in this process, and print the seconds."""
    if who == "deepspeed":
        from deepspeed.runtime.data_pipeline.data_sampling.data_analyzer import DataAnalyzer
    else:
        from drivetrain_data_efficiency.deepspeed.analyzer import DataAnalyzer
    with tempfile.TemporaryDirectory() as folder:
        analyzer = DataAnalyzer(
            Rows(samples),
            num_threads=processes,
            num_threads_reduce=processes,
            batch_size=64,
            metric_names=["seqlen"],
            metric_functions=[lengths],
            metric_types=["single_value_per_sample"],
            metric_dtypes=[torch.int64],
            save_path=f"{folder}/",
            collate_fn=as_they_are,
        )
        begin = time.perf_counter()
        analyzer.run_map()
        analyzer.run_reduce()
        print(time.perf_counter() - begin)


def main() -> None:
    """Take turns, and print medians."""
    parser = argparse.ArgumentParser(description="Seconds of an analysis.")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", help="a Python in which deepspeed is DeepSpeed")
    parser.add_argument("--once", choices=["drivetrain", "deepspeed"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        once(options.once, options.samples, options.processes)
        return
    seconds: dict[str, list[float]] = {"drivetrain": []}
    if options.peer:
        seconds["deepspeed"] = []
    for _ in range(options.rounds):
        for who, times in seconds.items():
            python = options.peer if who == "deepspeed" else sys.executable
            command = [python, __file__, "--once", who, "--samples", str(options.samples)]
            command += ["--processes", str(options.processes)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            times.append(float(done.stdout.split()[-1]))
    found = {who: round(statistics.median(times), 3) for who, times in seconds.items()}
    answer: dict[str, object] = {"samples": options.samples, "seconds": found}
    if options.peer:
        answer["times_as_fast"] = round(found["deepspeed"] / found["drivetrain"], 2)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()

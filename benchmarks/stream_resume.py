"""Time a mid-epoch resume over many shards, ours and by reading past; prints JSON.

    python benchmarks/stream_resume.py --shards 10000 --samples 20

Tar files in WebDataset's layout and Parquet files are written first and indexed. A resume is
everything from the index on disk to the first micro-batch at the middle of an epoch, on the second
of four data shards. Beside it: the WebDataset pipeline of the same tar files, which has to read and
decode what comes before the position.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import webdataset
from drivetrain_data_efficiency import ParquetShards, TarShards, index_shards
from pyarrow import parquet, table

from drivetrain.contracts import LoaderRequest
from drivetrain.engine.loader import default_loader

MICRO = 16


def write_tars(folder: Path, shards: int, samples: int) -> list[Path]:
    """Tar files with samples of a JSON file of about 200 bytes."""
    body = json.dumps({"tokens": list(range(50))}).encode()
    names = [folder / f"{shard:06d}.tar" for shard in range(shards)]
    for shard, name in enumerate(names):
        with tarfile.open(name, "w") as archive:
            for sample in range(samples):
                member = tarfile.TarInfo(f"{shard * samples + sample:09d}.json")
                member.size = len(body)
                archive.addfile(member, io.BytesIO(body))
    return names


def write_parquets(folder: Path, rows: int) -> list[Path]:
    """A hundred Parquet files with row groups of 1,000 rows."""
    names = [folder / f"{number:03d}.parquet" for number in range(100)]
    for name in names:
        own = {"tokens": [list(range(50))] * (rows // len(names))}
        parquet.write_table(table(own), name, row_group_size=1000)
    return names


def resumed(make: Callable[[], Any], epochs_part: float) -> float:
    """Seconds from an index to the micro-batch at a part of an epoch."""
    begin = time.perf_counter()
    dataset = make()
    request = LoaderRequest(dataset, MICRO, collate_fn=list, shard=1, num_shards=4, seed=1)
    loader = default_loader(request)
    place = int(len(dataset) * epochs_part) // (4 * MICRO) * 4 * MICRO
    order = dataset.sample_order(1).state_dict(0, place)
    loader.load_state_dict({"epoch": 0, "consumed": place, "order": order})
    assert len(next(iter(loader))) == MICRO
    return time.perf_counter() - begin


def read_past(names: list[Path], position: int) -> float:
    """Seconds until WebDataset's pipeline has read up to a position."""
    begin = time.perf_counter()
    stream = webdataset.WebDataset([str(name) for name in names], shardshuffle=False).decode()
    next(islice(stream, position, None))
    return time.perf_counter() - begin


def main() -> None:
    """Write, index, resume."""
    parser = argparse.ArgumentParser(description="Seconds of a mid-epoch resume over shards.")
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=20, help="of each tar file")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, Any] = {"shards": options.shards, "samples": options.shards * options.samples}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tars = write_tars(folder, options.shards, options.samples)
        begin = time.perf_counter()
        index_shards(folder / "tars", tars, workers=2)
        found["index_s"] = round(time.perf_counter() - begin, 2)
        index_shards(folder / "rows", write_parquets(folder, found["samples"]))
        makers: dict[str, Callable[[], Any]] = {
            "tar": lambda: TarShards(folder / "tars", lanes=8, run=MICRO),
            "parquet": lambda: ParquetShards(folder / "rows", lanes=8, run=MICRO),
        }
        for kind, make in makers.items():
            times = [resumed(make, 0.5) for _ in range(options.rounds)]
            found[f"{kind}_resume_s"] = round(statistics.median(times), 3)
        found["reading_past_s"] = round(read_past(tars, found["samples"] // 2), 2)
    found["times_as_fast"] = round(found["reading_past_s"] / found["tar_resume_s"], 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

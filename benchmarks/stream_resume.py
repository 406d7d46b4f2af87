"""Time a mid-epoch resume of each kind of data, ours and by reading past; prints JSON.

    python benchmarks/stream_resume.py --shards 10000 --samples 20

Tar files in WebDataset's layout and Parquet files are written first and indexed, and the same
samples to one array and to one file of lines. A resume is everything from the index or file on disk
to the first micro-batch at the middle of an epoch, on the second of four data shards. Beside it:
the WebDataset pipeline of the same tar files, which has to read and decode what comes before the
position, as the loader has to of the plain stream of lines.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from drivetrain_data_efficiency import ParquetShards, TarShards, index_shards
from pyarrow import parquet, table
from torch.utils.data import Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from drivetrain.contracts import LoaderRequest
from drivetrain.engine.loader import default_loader

MICRO, SHARD, SHARDS = 16, 1, 4


class Rows(Dataset[Any]):
    """Rows of an array on disk, by number."""

    def __init__(self, file: Path) -> None:
        self.rows = np.load(file, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index].tolist()


class Lines(IterableDataset[Any]):
    """A stream that does not know its position: JSON of a file, line by line."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __iter__(self) -> Iterator[Any]:
        with self.file.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)


def stateful(file: Path) -> StatefulDataLoader[Any]:
    """torchdata's loader of the same rows, which a script shards itself."""
    rows = Rows(file)
    sampler = StatefulDistributedSampler(rows, num_replicas=SHARDS, rank=SHARD, seed=1)
    return StatefulDataLoader(rows, batch_size=MICRO, sampler=sampler, collate_fn=list)


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


def resumed(make: Callable[[], Any], rounds: int) -> float:
    """Seconds from files to the micro-batch after so many of every shard."""
    begin = time.perf_counter()
    dataset, place = make(), rounds * SHARDS * MICRO
    request = LoaderRequest(dataset, MICRO, collate_fn=list, shard=SHARD, num_shards=SHARDS, seed=1)
    loader = default_loader(request)
    state: dict[str, Any] = {"epoch": 0, "consumed": place}
    if hasattr(dataset, "sample_order"):
        state["order"] = dataset.sample_order(1).state_dict(0, place)
    loader.load_state_dict(state)
    assert len(next(iter(loader))) == MICRO
    return time.perf_counter() - begin


def loader_resumed(make: Callable[[], Any], rounds: int) -> float:
    """The same of a loader that knows its position, which has to be brought there first."""

    def loader() -> Any:
        return default_loader(LoaderRequest(make(), MICRO, shard=SHARD, num_shards=SHARDS))

    saved = loader()
    for _ in islice(iter(saved), rounds):
        pass
    state = saved.state_dict()
    begin = time.perf_counter()
    again = loader()
    again.load_state_dict(state)
    assert len(next(iter(again))) == MICRO
    return time.perf_counter() - begin


def read_past(names: list[Path], position: int) -> float:
    """Seconds until WebDataset's pipeline has read up to a position."""
    begin = time.perf_counter()
    stream = webdataset.WebDataset([str(name) for name in names], shardshuffle=False).decode()
    next(islice(stream, position, None))
    return time.perf_counter() - begin


def main() -> None:
    """Write, index, resume."""
    parser = argparse.ArgumentParser(description="Seconds of a mid-epoch resume.")
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
        array, lines = folder / "rows.npy", folder / "rows.jsonl"
        np.save(array, np.tile(np.arange(50, dtype=np.int32), (found["samples"], 1)))
        lines.write_text(f"{json.dumps(list(range(50)))}\n" * found["samples"], "utf-8")
        tar = partial(TarShards, folder / "tars", lanes=8, run=MICRO)
        rows = partial(ParquetShards, folder / "rows", lanes=8, run=MICRO)
        kinds: dict[str, tuple[Callable[..., float], Callable[[], Any]]] = {
            "tar": (resumed, tar),
            "parquet": (resumed, rows),
            "map": (resumed, partial(Rows, array)),
            "stateful_loader": (loader_resumed, partial(stateful, array)),
            "plain_stream": (resumed, partial(Lines, lines)),
        }
        middle = found["samples"] // 2 // (SHARDS * MICRO)
        for kind, (timed, make) in kinds.items():
            times = [timed(make, middle) for _ in range(options.rounds)]
            found[f"{kind}_resume_s"] = round(statistics.median(times), 4)
        times = [resumed(partial(Lines, lines), middle // 2) for _ in range(options.rounds)]
        found["plain_stream_at_a_quarter_s"] = round(statistics.median(times), 4)
        found["reading_past_s"] = round(read_past(tars, found["samples"] // 2), 2)
    found["times_as_fast"] = round(found["reading_past_s"] / found["tar_resume_s"], 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

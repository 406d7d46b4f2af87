"""Tar files and Parquet by number: the samples of other readers, in the order of the contract."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from drivetrain_data_efficiency import (
    DataEfficiency,
    ParquetShards,
    ShardedDataset,
    TarShards,
    index_shards,
)
from drivetrain_data_efficiency.analysis.command import data
from drivetrain_data_efficiency.streaming import sharded
from shard_files import write_parquet, write_tar
from torch import nn

import drivetrain
from drivetrain.errors import CheckpointError, ConfigError, TrainingError
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed

webdataset = pytest.importorskip("webdataset")
pytest.importorskip("pyarrow")

SIZES = (6, 9, 4, 5)


def tars(folder: Path, **options: Any) -> TarShards:
    files, at = [], 0
    for number, size in enumerate(SIZES):
        name = "{:06d}" if number else "long/" + 120 * "n" + "/{:06d}"  # a name of a longer format
        files.append(write_tar(folder / f"{number}.tar", range(at, at + size), name))
        at += size
    index_shards(folder / "index", files)
    return TarShards(folder / "index", **options)


def parquets(folder: Path, **options: Any) -> ParquetShards:
    files, at = [], 0
    for number, size in enumerate((11, 13)):
        files.append(write_parquet(folder / f"{number}.parquet", range(at, at + size), 5))
        at += size
    index_shards(folder / "index", files)
    return ParquetShards(folder / "index", **options)


def test_samples_are_those_that_webdataset_reads(tmp_path: Path) -> None:
    shards = tars(tmp_path)
    urls = [str(tmp_path / f"{number}.tar") for number in range(4)]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(theirs) == len(shards) == 24
    for number, expected in enumerate(theirs):
        found = shards[number]
        assert found["__key__"] == expected["__key__"]
        assert found["json"] == expected["json"] == {"number": number}
        assert found["txt"] == expected["txt"]
    assert shards[-1]["json"] == {"number": 23}
    with pytest.raises(IndexError):
        shards[24]


def test_samples_may_stay_bytes_or_go_through_a_function(tmp_path: Path) -> None:
    assert tars(tmp_path, decode=False)[3]["json"] == b'{"number": 3}'
    shards = TarShards(tmp_path / "index", transform=lambda sample: sample["json"]["number"] * 2)
    assert [shards[n] for n in range(24)] == [2 * n for n in range(24)]
    upper = TarShards(
        tmp_path / "index", decode=[lambda key, data: data.upper() if key == ".txt" else None]
    )
    assert upper[1]["txt"] == b"SAMPLE 1"


def test_files_that_are_no_part_of_a_sample_are_left_out(tmp_path: Path) -> None:
    import io
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in (
            "__meta__/x.json",
            "__info__",
            "1.txt",
            "folder",
            "noextension",
            "1.json",
            "2.a.b",
        ):
            member = tarfile.TarInfo(name)
            if name == "folder":
                member.type = tarfile.DIRTYPE
                archive.addfile(member)
                continue
            member.size = 2
            archive.addfile(member, io.BytesIO(b"12"))
    index_shards(tmp_path / "index", [tmp_path / "a.tar"])
    shards = TarShards(tmp_path / "index", decode=False)
    theirs = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    ours = [{k: v for k, v in shards[n].items() if k != "__url__"} for n in range(len(shards))]
    assert ours == [
        {k: v for k, v in sample.items() if k not in ("__url__", "__local_path__")}
        for sample in theirs
    ]
    assert [sample["__key__"] for sample in ours] == ["1", "2"]


def test_a_pickle_in_a_shard_is_not_opened(tmp_path: Path) -> None:
    import io
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("1.pyd")
        body = pickle.dumps({"a": 1})
        member.size = len(body)
        archive.addfile(member, io.BytesIO(body))
    index_shards(tmp_path / "index", [tmp_path / "a.tar"])
    with pytest.raises(TrainingError, match=r"pyd of the sample 1 .* may run any code"):
        TarShards(tmp_path / "index")[0]
    own = TarShards(tmp_path / "index", decode=[lambda key, data: len(data)])
    assert own[0]["pyd"] == len(body)


def test_rows_are_those_of_the_files(tmp_path: Path) -> None:
    import pyarrow.parquet

    shards = parquets(tmp_path)
    rows = [
        r for n in (0, 1) for r in pyarrow.parquet.read_table(tmp_path / f"{n}.parquet").to_pylist()
    ]
    assert len(shards) == len(rows) == 24
    assert shards.counts.tolist() == [5, 5, 1, 5, 5, 3]
    for number, row in enumerate(rows):
        found = shards[number]
        assert found["number"] == row["number"] == number
        assert found["text"] == row["text"]
        assert found["tokens"].tolist() == row["tokens"]
    batch = torch.utils.data.default_collate([shards[0], shards[5]])
    assert batch["tokens"].tolist() == [[0, 1, 2], [5, 6, 7]]
    some = ParquetShards(tmp_path / "index", columns=["text"], transform=lambda row: row["text"])
    assert some[7] == "sample 7"


def test_a_row_group_is_decoded_once_an_epoch_where_a_block_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from drivetrain_data_efficiency.streaming import parquet

    decoded: list[int] = []
    inner = parquet.ParquetShards._note
    monkeypatch.setattr(
        parquet.ParquetShards, "_note", lambda self, g: (decoded.append(g), inner(self, g))[1]
    )
    parquets(tmp_path)
    shards = ParquetShards(tmp_path / "index", block=10)
    for (number,) in shards.sample_order(1).items(0, 0):
        shards[number]
    assert sorted(decoded) == list(range(6))
    assert not caplog.records
    small = ParquetShards(tmp_path / "index", block=24, kept=1)
    for (number,) in small.sample_order(1).items(0, 0):
        small[number]
    assert "decoded for the third time" in caplog.text
    assert len([r for r in caplog.records if "decoded" in r.message]) == 1


def test_names_are_kept_relative_and_files_open_from_anywhere(tmp_path: Path) -> None:
    tars(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert TarShards(tmp_path / "b" / "index")[8]["json"] == {"number": 8}
    for root in (tmp_path / "b", f"file://{tmp_path / 'b'}"):
        (tmp_path / "c").mkdir(exist_ok=True)
        for end in ("json", "bin", "idx"):
            shutil.copy(tmp_path / "b" / f"index.{end}", tmp_path / "c" / f"index.{end}")
        assert TarShards(tmp_path / "c" / "index", root=root)[20]["json"] == {"number": 20}


def test_few_files_are_open_and_a_copy_of_the_data_set_opens_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded, "OPEN", 2)
    shards = tars(tmp_path)
    assert [shards[n]["json"]["number"] for n in (0, 23, 8, 16, 1)] == [0, 23, 8, 16, 1]
    assert len(shards._files) == 2
    copy = pickle.loads(pickle.dumps(shards))
    assert not copy._files
    assert copy[5]["json"] == {"number": 5}
    monkeypatch.setattr(shards, "_process", -1)  # as after a fork
    assert shards[9]["json"] == {"number": 9}
    assert len(shards._files) == 1


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        self.seen += numbers.tolist()
        return (self.weight - numbers.double() / 24).square().mean()


class Number:
    def __call__(self, sample: Any) -> int:
        return int(sample["json"]["number"] if "json" in sample else sample["number"])


def made(kind: str, folder: Path) -> ShardedDataset:
    maker: Any = TarShards if kind == "tar" else ParquetShards
    return maker(folder / "index", transform=Number(), lanes=2, run=3, block=4)


def train(kind: str, folder: str, micro: int, steps: int, load: bool, workers: int) -> Any:
    dataset = made(kind, Path(folder))
    engine, *_ = drivetrain.initialize(
        model=Sums(),
        training_data=dataset,
        config={
            "train_batch_size": 6,
            "train_micro_batch_size_per_gpu": micro,
            "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
            "seed": 7,
        },
        registry=Registry.installed().with_plugins(DataEfficiency),
    )
    engine.training_dataloader = engine.deepspeed_io(dataset, num_workers=workers)
    if load:
        engine.load_checkpoint(folder)
    for _ in range(steps):
        engine.train_batch()
    engine.save_checkpoint(folder)
    answer = engine.module.seen, float(engine.module.weight.detach())
    engine.destroy()
    return answer


@pytest.mark.parametrize(("kind", "workers"), [("tar", 0), ("tar", 2), ("parquet", 0)])
def test_training_goes_on_on_other_ranks_with_the_samples_that_are_left(
    tmp_path: Path, kind: str, workers: int
) -> None:
    (tars if kind == "tar" else parquets)(tmp_path)
    reference = [sample for (sample,) in made(kind, tmp_path).sample_order(7).items(0, 0)]
    weight = 0.0
    for step in range(4):
        batch = [number / 24 for number in reference[6 * step : 6 * step + 6]]
        weight -= 0.5 * sum(2 * (weight - value) for value in batch) / 6
    first = run_distributed(train, 2, kind, str(tmp_path), 3, 1, False, workers)
    [second] = run_distributed(train, 1, kind, str(tmp_path), 2, 1, True, workers)
    third = run_distributed(train, 3, kind, str(tmp_path), 2, 2, True, workers)
    parts = [[s for seen, _ in part for s in seen] for part in (first, [second], third)]
    assert [sorted(part) for part in parts] == [
        sorted(reference[a:b]) for a, b in ((0, 6), (6, 12), (12, 24))
    ]
    assert third[0][1] == pytest.approx(weight, rel=1e-6)


def test_the_command_indexes_and_says_what_there_is(tmp_path: Path) -> None:
    files = [str(write_tar(tmp_path / f"{n}.tar", range(10 * n, 10 * n + 10))) for n in range(3)]
    done = CliRunner().invoke(data, ["index", str(tmp_path / "i"), *files, "--workers", "2"])
    assert done.exit_code == 0, done.output
    assert "3 tar shards, 30 samples" in done.output
    assert TarShards(tmp_path / "i")[29]["json"] == {"number": 29}
    rows = str(write_parquet(tmp_path / "a.parquet", range(12), 5))
    done = CliRunner().invoke(data, ["index", str(tmp_path / "p"), rows])
    assert "1 parquet shards, 12 samples" in done.output


def test_indexes_and_shards_that_do_not_fit_are_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no index of shards .*drivetrain data index"):
        TarShards(tmp_path / "index")
    tars(tmp_path)
    with pytest.raises(ConfigError, match="is an index of tar files, not of parquet files"):
        ParquetShards(tmp_path / "index")
    write_tar(tmp_path / "1.tar", range(6, 20))
    with pytest.raises(
        TrainingError, match=r"1\.tar has \d+ bytes, and had \d+ when it was indexed"
    ):
        TarShards(tmp_path / "index")[7]
    (tmp_path / "2.tar").unlink()
    with pytest.raises(TrainingError, match=r"2\.tar cannot be opened"):
        TarShards(tmp_path / "index")[15]
    size = (tmp_path / "3.tar").stat().st_size
    (tmp_path / "3.tar").write_bytes(b"x" * size)
    with pytest.raises(TrainingError, match=r"a sample of the shard .*3\.tar cannot be read"):
        TarShards(tmp_path / "index")[20]
    (tmp_path / "index.json").write_text('{"kind": "tar"}')
    with pytest.raises(ConfigError, match=r"index\.json is no index of shards"):
        TarShards(tmp_path / "index")
    (tmp_path / "index.json").write_text(json.dumps({"kind": "tar", "files": [["a", 1]]}))
    with pytest.raises(ConfigError, match=r"names 1 files, and .* has 4"):
        TarShards(tmp_path / "index")


def test_files_that_cannot_be_indexed_are_one_error(tmp_path: Path) -> None:
    import gzip

    tar = write_tar(tmp_path / "a.tar", range(4))
    for files, message in (
        ([], "at least one file"),
        ([tar, tar], "is named twice"),
        ([tar, tmp_path / "b.parquet"], r"all \.tar or all \.parquet files; got parquet, tar"),
        ([tmp_path / "b.zip"], r"b\.zip: no \.tar or \.parquet"),
        ([tmp_path / "none.tar"], "cannot be opened"),
    ):
        with pytest.raises(ConfigError, match=message):
            index_shards(tmp_path / "index", files)
    (tmp_path / "c.tar").write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(ConfigError, match=r"c\.tar is no uncompressed tar file"):
        index_shards(tmp_path / "index", [tmp_path / "c.tar"])
    for length in (700, 1100, 1536, 1600, 6000):
        (tmp_path / "d.tar").write_bytes(tar.read_bytes()[:length])
        with pytest.raises(ConfigError, match=r"d\.tar is (cut off|no uncompressed)"):
            index_shards(tmp_path / "index", [tmp_path / "d.tar"])
    (tmp_path / "e.parquet").write_bytes(b"PAR1" * 20)
    with pytest.raises(ConfigError, match=r"e\.parquet is no Parquet file"):
        index_shards(tmp_path / "index", [tmp_path / "e.parquet"])
    rows = write_parquet(tmp_path / "f.parquet", range(4), 2)
    index_shards(tmp_path / "rows", [rows])
    with pytest.raises(TrainingError, match="has no column labels"):
        ParquetShards(tmp_path / "rows", columns=["labels"])[0]


@pytest.mark.parametrize(("kind", "package"), [("tar", "webdataset"), ("parquet", "pyarrow")])
def test_a_missing_library_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, package: str
) -> None:
    (tars if kind == "tar" else parquets)(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"package {package}: pip install"):
        made(kind, tmp_path)


def test_other_shards_than_those_of_the_checkpoint_are_refused(tmp_path: Path) -> None:
    tars(tmp_path / "a")
    loader = drivetrain.engine.loader.default_loader
    from drivetrain.contracts import LoaderRequest

    first = loader(LoaderRequest(made("tar", tmp_path / "a"), 3))
    next(iter(first))
    state = first.state_dict()
    parquets(tmp_path / "b")
    other = loader(LoaderRequest(made("parquet", tmp_path / "b"), 3))
    with pytest.raises(
        CheckpointError, match="order of shards in the checkpoint had shards 4, now"
    ):
        other.load_state_dict(state)


def test_the_stateful_loader_of_torchdata_goes_on_where_it_was(tmp_path: Path) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def start() -> Any:
        rows = torch.arange(24)
        loader = torchdata.StatefulDataLoader(rows, batch_size=3, num_workers=2, shuffle=True)
        engine, *_ = drivetrain.initialize(
            model=Sums(),
            training_data=loader,
            config={
                "train_batch_size": 6,
                "train_micro_batch_size_per_gpu": 3,
                "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
            },
            registry=Registry.installed().with_plugins(DataEfficiency),
        )
        return engine

    engine = start()
    for _ in range(2):
        engine.train_batch()
    engine.save_checkpoint(str(tmp_path))
    first = list(engine.module.seen)
    for _ in range(2):
        engine.train_batch()
    rest = engine.module.seen[12:]
    engine.destroy()
    engine = start()
    engine.load_checkpoint(str(tmp_path))
    for _ in range(3):
        engine.train_batch()
    assert engine.module.seen[:12] == rest
    assert sorted(first + rest) == list(range(24))
    assert np.unique(engine.module.seen[12:]).size == 6
    engine.destroy()

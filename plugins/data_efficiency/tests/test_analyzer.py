"""What the analyzer writes, against the format's description and plain counting."""

from __future__ import annotations

import pickle
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from drivetrain_data_efficiency import IndexedDataset, IndexedWriter
from drivetrain_data_efficiency.analysis import metrics
from drivetrain_data_efficiency.analysis.analyzer import Analyzer
from drivetrain_data_efficiency.analysis.command import data
from drivetrain_data_efficiency.analysis.indexed import CODES, smallest_dtype
from drivetrain_data_efficiency.analysis.metrics import Metric
from drivetrain_data_efficiency.analysis.summary import summary
from metric_files import write_indexed
from torch import nn

from drivetrain.errors import ConfigError, TrainingError


class Texts:
    """Rows of tokens of many lengths; fails at ``fails_at``."""

    def __init__(self, samples: int = 500, fails_at: int | None = None, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        lengths = generator.integers(1, 40, samples)
        self.rows = [generator.integers(0, 50, n) for n in lengths]
        self.fails_at = fails_at
        self.loaded = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        if index == self.fails_at:
            raise OSError("the disk is gone")
        self.loaded += 1
        return self.rows[index]


def rows(prefix: Path) -> list[list[int]]:
    return [item.tolist() for item in IndexedDataset(prefix)]


# -- the indexed data set -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "letter", "code"),
    [
        *[("u1", "B", 1), ("i1", "b", 2), ("i2", "h", 3), ("i4", "i", 4), ("i8", "q", 5)],
        *[("u2", "H", 6), ("u4", "I", 7), ("u8", "Q", 8)],
    ],
)
def test_files_are_written_byte_by_byte_as_the_format_says(
    tmp_path: Path, dtype: str, letter: str, code: int
) -> None:
    items = [[1, 2, 3], [], [100], [7] * 5]
    write_indexed(tmp_path / "theirs", items, letter, code)
    writer = IndexedWriter(tmp_path / "ours.bin", np.dtype(dtype))
    for item in items:
        writer.add_item(torch.tensor(item))
    writer.finalize(tmp_path / "ours.idx")
    for end in ("bin", "idx"):
        theirs = (tmp_path / f"theirs.{end}").read_bytes()
        assert (tmp_path / f"ours.{end}").read_bytes() == theirs
    found = IndexedDataset(tmp_path / "theirs")
    assert found.dtype == np.dtype(dtype)
    assert [item.tolist() for item in found] == items
    assert found.get(3, 2, 2).tolist() == [7, 7]
    assert found[-1].tolist() == [7] * 5
    assert [item.tolist() for item in found[1:3]] == [[], [100]]
    assert [item.tolist() for item in pickle.loads(pickle.dumps(found))] == items


def test_megatrons_own_codes_are_another_table(tmp_path: Path) -> None:
    items = [[1, 2], [65535]]
    write_indexed(tmp_path / "m", items, "H", 8)
    assert [item.tolist() for item in IndexedDataset(tmp_path / "m", CODES)] == items
    write_indexed(tmp_path / "x", items, "H", 9)
    with pytest.raises(ConfigError, match="dtype code 9"):
        IndexedDataset(tmp_path / "x")


def test_documents_and_merges_go_on_where_the_first_ends(tmp_path: Path) -> None:
    for name in "ab":
        writer = IndexedWriter(tmp_path / f"{name}.bin", np.int32)
        writer.add_items([[1], [2, 3]])
        writer.end_document()
        writer.add_item([4])
        writer.end_document()
        writer.finalize(tmp_path / f"{name}.idx")
    writer = IndexedWriter(tmp_path / "c.bin", np.int32)
    writer.merge_file_(tmp_path / "a")
    writer.merge_file_(tmp_path / "b")
    writer.finalize(tmp_path / "c.idx")
    merged = IndexedDataset(tmp_path / "c")
    assert merged.doc_idx.tolist() == [0, 2, 3, 5, 6]
    assert rows(tmp_path / "c") == [[1], [2, 3], [4]] * 2
    other = IndexedWriter(tmp_path / "d.bin", np.int64)
    with pytest.raises(ConfigError, match="int32, and int64"):
        other.merge_file_(tmp_path / "a")
    other.finalize(tmp_path / "d.idx")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    write_indexed(tmp_path / "a", [[1, 2], [3]], "i", 4)
    index, content = tmp_path / "a.idx", (tmp_path / "a.idx").read_bytes()
    for broken, message in (
        (content[:-3], "is damaged"),
        (content[:15], "is cut off"),
        (b"TNTIDX\x00\x00" + content[8:], "not in the mmap format"),
        (content[:9] + struct.pack("<Q", 7) + content[17:], "version 7"),
    ):
        index.write_bytes(broken)
        with pytest.raises(ConfigError, match=message):
            IndexedDataset(tmp_path / "a")
    index.write_bytes(content)
    (tmp_path / "a.bin").write_bytes(b"\0" * 8)
    with pytest.raises(ConfigError, match="is cut off"):
        IndexedDataset(tmp_path / "a")


def test_the_smallest_dtype_has_both_ends() -> None:
    assert smallest_dtype(0, 255) is np.uint8
    assert smallest_dtype(0, 256) is np.uint16
    assert smallest_dtype(-1, 255) is np.int16
    with pytest.raises(TrainingError, match="no integer type"):
        smallest_dtype(-1, 2**63)


# -- the analyzer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_files_of_a_value_are_those_of_plain_counting(tmp_path: Path, workers: int) -> None:
    texts = Texts()
    Analyzer(texts, [metrics.length()], tmp_path, batch_size=7, workers=workers).run()
    lengths = [len(row) for row in texts.rows]
    prefix = tmp_path / "seqlen" / "seqlen"
    assert rows(Path(f"{prefix}_sample_to_metric")) == [[n] for n in lengths]
    distinct = sorted(set(lengths))
    assert rows(Path(f"{prefix}_index_to_metric")) == [[n] for n in distinct]
    expected = [[i for i, n in enumerate(lengths) if n == each] for each in distinct]
    assert rows(Path(f"{prefix}_index_to_sample")) == expected
    merged = rows(Path(f"{prefix}_index_to_sample_percentile_merged"))
    assert [i for row in merged for i in row] == [i for row in expected for i in row]
    assert all(len(row) >= 5 for row in merged[:-1])
    assert len(merged) <= 100


def test_rarity_is_minus_the_log_of_the_shares_of_tokens(tmp_path: Path) -> None:
    texts = Texts(60)
    Analyzer(texts, [metrics.vocabulary_rarity(50)], tmp_path, batch_size=4).run()
    counts = Counter(int(token) for row in texts.rows for token in row)
    total = sum(counts.values())
    [vector] = rows(tmp_path / "vocabulary" / "vocabulary_metric_value")
    assert vector == [counts[token] for token in range(50)]
    expected = [
        [round(-sum(np.log(counts[int(token)] / total) for token in row))] for row in texts.rows
    ]
    found = rows(tmp_path / "vocabularyrarity" / "vocabularyrarity_sample_to_metric")
    assert found == expected
    with pytest.raises(TrainingError, match="vocabulary was said to have 10"):
        Analyzer(texts, [metrics.vocabulary(10)], tmp_path / "b", batch_size=4).run()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 1)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table(tokens).square().mean()


def test_loss_and_gradient_norm_are_those_of_each_sample_alone(tmp_path: Path) -> None:
    texts, model = Texts(20), Model().double()
    wanted = [metrics.model_loss(model), metrics.gradient_norm(model)]
    Analyzer(texts, wanted, tmp_path, batch_size=3).run()
    for number, row in enumerate(texts.rows):
        model.zero_grad()
        loss = model(torch.tensor(row)[None])
        loss.backward()
        norm = float(model.table.weight.grad.norm())
        for name, value in (("loss", loss.item()), ("gradient_norm", norm)):
            saved = IndexedDataset(tmp_path / name / f"{name}_sample_to_metric")
            assert int(saved[number][0]) == round(1000 * value)


def test_near_duplicates_are_those_of_exact_sets(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    texts = Texts(40)
    texts.rows = [generator.integers(0, 1000, 120) for _ in range(40)]
    texts.rows[30] = texts.rows[4].copy()
    texts.rows[35] = np.concatenate([texts.rows[4][:118], [1, 2]])
    texts.rows[36] = np.concatenate([texts.rows[7][:60], texts.rows[8][60:]])
    Analyzer(texts, [metrics.near_duplicates()], tmp_path, batch_size=8).run()
    found = [n for (n,) in rows(tmp_path / "duplicates" / "duplicates_sample_to_metric")]

    def alike(a: Any, b: Any) -> float:
        sets = [{tuple(row[i : i + 5]) for i in range(len(row) - 4)} for row in (a, b)]
        return len(sets[0] & sets[1]) / len(sets[0] | sets[1])

    exact = [sum(alike(texts.rows[i], texts.rows[j]) >= 0.8 for j in range(i)) for i in range(40)]
    assert found == exact
    assert found[30] == 1
    assert found[35] == 2


def test_an_analysis_goes_on_after_an_interruption(tmp_path: Path) -> None:
    broken = Texts(fails_at=300)
    with pytest.raises(OSError, match="the disk is gone"):
        Analyzer(broken, [metrics.length()], tmp_path, batch_size=4).run()
    with pytest.raises(TrainingError, match="lacks 7 of 16 chunks, the first at sample 288"):
        Analyzer(broken, [metrics.length()], tmp_path, batch_size=4).reduce()
    texts = Texts()
    Analyzer(texts, [metrics.length()], tmp_path, batch_size=4).run()
    assert texts.loaded < 300
    found = rows(tmp_path / "seqlen" / "seqlen_sample_to_metric")
    assert found == [[len(row)] for row in texts.rows]
    with pytest.raises(ConfigError, match="another data set or batch size"):
        Analyzer(Texts(seed=1), [metrics.length()], tmp_path, batch_size=4).run()


def test_ranks_map_parts_and_one_reduces(tmp_path: Path) -> None:
    texts = Texts()
    for rank in range(3):
        Analyzer(texts, [metrics.length()], tmp_path, batch_size=4, rank=rank, world_size=3).map()
    Analyzer(texts, [metrics.length()], tmp_path, batch_size=4).reduce()
    found = rows(tmp_path / "seqlen" / "seqlen_sample_to_metric")
    assert found == [[len(row)] for row in texts.rows]


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda batch: np.ones(len(batch)), "is float64; metrics are whole numbers"),
        (lambda batch: [1], r"samples 0 to 3 has shape \(1,\): one number each"),
    ],
)
def test_wrong_results_name_the_samples(tmp_path: Path, measure: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Analyzer(Texts(), [Metric("mine", measure)], tmp_path, batch_size=4).run()


# -- the command ----------------------------------------------------------------------------------

SCRIPT = """
import numpy as np

class Rows:
    def __len__(self):
        return 40
    def __getitem__(self, index):
        return np.arange(index % 10 + 1)

def odd(samples):
    return np.array([len(sample) % 2 for sample in samples])

thing = 3
"""


def command(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(data, list(map(str, arguments)))
    text = done.output if done.exception is None else f"{done.output}{done.exception}"
    return done.exit_code, text


def test_the_command_analyzes_shows_and_merges(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    names = ["-m", "seqlen", "-m", f"{script}:odd", "-m", "vocabularyrarity"]
    for folder in ("a", "b"):
        options = [*names, "--vocabulary-size", 10, "-b", 8]
        code, text = command("analyze", f"{script}:Rows", tmp_path / folder, *options)
        assert code == 0, text
    assert "seqlen: 40 samples, 10 values, mean 5.5" in text
    assert "odd: 40 samples, 2 values, mean 0.5" in text
    code, text = command("merge", tmp_path / "c", tmp_path / "a", tmp_path / "b")
    assert "odd, seqlen, vocabularyrarity of 2 analyses" in text
    code, text = command("inspect", tmp_path / "c", "--picture", tmp_path / "pictures")
    assert "seqlen: 80 samples, 10 values, mean 5.5" in text
    assert "0 % 1, 1 % 1, 5 % 1, 25 % 3, 50 % 5, 75 % 8, 95 % 10, 99 % 10, 100 % 10" in text
    picture = (tmp_path / "pictures" / "seqlen.svg").read_text()
    assert picture.startswith("<svg")
    assert picture.count("<rect") == 11
    assert sum(summary(tmp_path / "c" / "seqlen").counts) == 80
    found = rows(tmp_path / "c" / "seqlen" / "seqlen_index_to_sample")
    assert found[0] == [0, 10, 20, 30, 40, 50, 60, 70]


def test_the_command_maps_parts_and_merges_data_sets(tmp_path: Path) -> None:
    write_indexed(tmp_path / "one", [[1, 2], [3]], "i", 4)
    code, text = command("merge", tmp_path / "two", tmp_path / "one", tmp_path / "one")
    assert "4 items" in text
    for rank in (0, 1):
        code, text = command(
            "analyze", tmp_path / "two", tmp_path / "m", "--rank", rank, "--world-size", 2
        )
        assert f"part {rank} of 2 is mapped" in text
    code, text = command("analyze", tmp_path / "two", tmp_path / "m", "--reduce")
    assert code == 0
    assert "seqlen: 4 samples, 2 values" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["analyze", "nothing", "x"], "neither an indexed data set nor"),
        (["analyze", "SCRIPT:thing", "x"], "is a int: no __len__"),
        (["analyze", "SCRIPT:other", "x"], "has no 'other'"),
        (["analyze", "SCRIPT:Rows", "x", "-m", "lenght"], "no metric is called 'lenght'"),
        (["analyze", "SCRIPT:Rows", "x", "-m", "vocabulary"], "needs --vocabulary-size"),
        (["analyze", "SCRIPT:Rows", "x", "-m", "SCRIPT:thing"], "neither a Metric nor a function"),
        (["inspect", "."], "has no metrics"),
    ],
)
def test_bad_arguments_are_one_error(
    tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SCRIPT)
    code, text = command(*[a.replace("SCRIPT", "mine.py") for a in arguments])
    assert code != 0
    assert message in text

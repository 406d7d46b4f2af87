"""Files of a checkpoint: what is damaged, missing or hostile is refused by name."""

from __future__ import annotations

import json
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from stored_states import (
    DATA,
    INDEX,
    content_hash,
    edit_index,
    load_all,
    save_all,
    some_tensors,
)

from drivetrain.checkpoint.format import index
from drivetrain.checkpoint.format.index import Stored, seal
from drivetrain.checkpoint.format.storage import LocalStorage
from drivetrain.errors import CheckpointError

TENSORS = some_tensors(1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_all(tmp_path, "t", TENSORS, 2)
    return tmp_path / "t"


def refusal(folder: Path, tag: str = "t") -> str:
    with pytest.raises(CheckpointError) as caught:
        load_all(folder, tag, TENSORS)
    return str(caught.value)


# -- the format ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loaded_on", [1, 2, 3, 5])
@pytest.mark.parametrize("saved_on", [1, 2, 4])
def test_tensors_come_back_bit_by_bit_in_any_cut(
    tmp_path: Path, saved_on: int, loaded_on: int
) -> None:
    save_all(tmp_path, "t", TENSORS, saved_on)
    loaded = load_all(tmp_path, "t", TENSORS, loaded_on)
    assert content_hash(loaded) == content_hash(TENSORS)


def test_a_checkpoint_is_a_manifest_an_index_and_a_file_per_rank(saved: Path) -> None:
    names = sorted(path.name for path in saved.iterdir())
    assert names == [INDEX, "manifest.json", DATA, "rank00001-0123abcd.safetensors"]
    assert (saved.parent / "latest").read_text() == "t"


def test_tensor_files_are_safetensors_with_a_key_per_box(saved: Path) -> None:
    whole = torch.zeros(5, 7)
    boxes = 0
    for path in saved.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                name, _, place = key.partition("@")
                if name == "exp_avg/weight":
                    row, column = map(int, place.split(","))
                    part = file.get_tensor(key)
                    whole[row : row + part.shape[0], column : column + part.shape[1]] = part
                    boxes += 1
    assert boxes > 2
    assert torch.equal(whole, TENSORS["exp_avg/weight"])


def test_only_the_bytes_that_a_rank_needs_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = {"parameter/big": torch.arange(4 << 20, dtype=torch.float32).reshape(4096, 1024)}
    save_all(tmp_path, "t", big, 1)
    read: list[int] = []
    original = LocalStorage.read

    def count(self: LocalStorage, path: str, offset: int, into: memoryview) -> None:
        read.append(len(memoryview(into)) if "safetensors" in path else 0)
        original(self, path, offset, into)

    monkeypatch.setattr(LocalStorage, "read", count)
    from stored_states import fragments

    from drivetrain.checkpoint.format.reading import restore

    part = fragments(big, 0, 8, filled=False)
    stored = Stored(LocalStorage(str(tmp_path)), "t")
    source = stored.find("parameter", "big")
    assert source is not None
    read.clear()
    restore(stored.storage, [(part[0], source)])
    needed = part[0].read().numel() * 4
    assert torch.equal(part[0].read(), big["parameter/big"].flatten()[: needed // 4])
    assert needed <= sum(read) <= needed + (1 << 20)  # whole blocks are checked


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["manifest.json", INDEX, DATA])
def test_one_flipped_bit_anywhere_is_found_and_in_a_tensor_named(saved: Path, name: str) -> None:
    path = saved / name
    good = path.read_bytes()
    begin = 8 + int.from_bytes(good[:8], "little") if name == DATA else len(good)
    for at in range(0, len(good), 3):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        message = outcome(saved.parent)
        if message is None:  # white space between the fields
            assert name == "manifest.json"
            continue
        assert name in message
        assert at < begin or any(key.split("/")[1] in message for key in [*TENSORS, "/state"])


def test_damage_anywhere_in_a_large_tensor_is_found(tmp_path: Path) -> None:
    """Every block of a box has a checksum of its own, and every one of them is compared."""
    numbers = torch.arange((5 << 20) // 4 + 3, dtype=torch.float32)
    large = {"parameter/large": numbers, "exp_avg/large": numbers + 0.5}
    save_all(tmp_path, "t", large, 1)
    path = tmp_path / "t" / DATA
    after = 100  # beside the tensors, the file ends with a few bytes of other state
    last = path.stat().st_size - after
    for at in range(last, last - 2 * (5 << 20), -(1 << 20)):
        with path.open("r+b", buffering=0) as file:
            good = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([good[0] ^ 1]), at)
            with pytest.raises(CheckpointError, match=r"large \(\w+\) is damaged in"):
                load_all(tmp_path, "t", large)
            os.pwrite(file.fileno(), good, at)
    assert content_hash(load_all(tmp_path, "t", large)) == content_hash(large)


def outcome(folder: Path) -> str | None:
    """What is wrong; ``None`` when what was saved comes back."""
    try:
        loaded = load_all(folder, "t", TENSORS)
    except CheckpointError as error:
        return str(error)
    assert content_hash(loaded) == content_hash(TENSORS)
    return None


@pytest.mark.parametrize("name", ["manifest.json", INDEX, DATA])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    message = refusal(saved.parent)
    if name == "manifest.json":
        assert f"there is no checkpoint {saved}: its save was not finished" in message
    else:
        assert f"{name} is missing" in message


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, -1])
@pytest.mark.parametrize("name", ["manifest.json", INDEX, DATA])
def test_a_cut_off_file_is_named(saved: Path, name: str, keep: int) -> None:
    path = saved / name
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(saved.parent)
    assert name in message
    assert "damaged" in message


def test_a_file_that_has_grown_is_named(saved: Path) -> None:
    with (saved / DATA).open("ab") as file:
        file.write(b"x")
    assert f"{DATA} is damaged: it has" in refusal(saved.parent)


def without_box(content: dict[str, Any]) -> None:
    for column, count in {"rank": 1, "at": 1, "offset": 2, "size": 2, "crc": 1}.items():
        del content["tensors"]["exp_avg/weight"][column][-count:]


def test_a_missing_box_is_found_and_the_tensor_named(saved: Path) -> None:
    edit_index(saved, without_box)
    assert "holds only a part of weight (exp_avg)" in refusal(saved.parent)


def test_a_tensor_of_another_shape_is_named(saved: Path) -> None:
    other = {**TENSORS, "exp_avg/weight": torch.zeros(7, 5)}
    with pytest.raises(CheckpointError) as caught:
        load_all(saved.parent, "t", other)
    assert "weight (exp_avg) has shape [7, 5] in the model, but [5, 7]" in str(caught.value)


# -- hostility -------------------------------------------------------------------------------------


class Payload:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("name", ["manifest.json", INDEX, DATA])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_pickle_in_any_file_is_refused_and_runs_nothing(
    saved: Path, tmp_path: Path, name: str, form: str
) -> None:
    trace, path = tmp_path / "trace", saved / name
    if form == "pickle":
        path.write_bytes(pickle.dumps(Payload(trace)))
    else:
        torch.save({"module": Payload(trace)}, path)
    assert name in refusal(saved.parent)
    assert not trace.exists()


ABSURD = 1 << 60


def setter(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        inner: Any = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


WEIGHT = ("tensors", "exp_avg/weight")


@pytest.mark.parametrize(
    "change",
    [
        setter(*WEIGHT, "shape", value=[ABSURD, ABSURD]),
        setter(*WEIGHT, "size", value=[ABSURD, 1] * 3),
        setter(*WEIGHT, "size", value=[-1, 1] * 3),
        setter(*WEIGHT, "offset", value=[-1, 0] * 3),
        setter(*WEIGHT, "at", 0, value=ABSURD),
        setter(*WEIGHT, "at", 0, value=-1),
        setter(*WEIGHT, "at", 0, value="0"),
        setter(*WEIGHT, "rank", 0, value=ABSURD),
        setter(*WEIGHT, "rank", 0, value=-1),
        setter(*WEIGHT, "rank", 0, value="../../etc/passwd"),
        setter(*WEIGHT, "crc", 0, value=""),
        setter(*WEIGHT, "crc", 0, value="0" * 8000),
        setter(*WEIGHT, "dtype", value="OBJECT"),
        setter(*WEIGHT, value=None),
        setter(*WEIGHT, value={}),
        setter("tensors", value=[]),
        setter("ranks", value=[]),
        setter("ranks", 0, value={"bytes": 1}),
        setter("ranks", 0, "bytes", value=ABSURD),
        setter("ranks", 0, "header", value=ABSURD),
        setter("ranks", 0, "header", value=-1),
        setter("ranks", 0, "own", value={"state": {}}),
        setter("ranks", 0, "own", "state", "shape", value=[ABSURD]),
        setter("ranks", 0, "own", "state", "size", value=[1 << 40]),
    ],
)
def test_an_index_made_to_harm_is_refused_without_taking_memory(
    saved: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edit_index(saved, change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert str(saved.parent) in refusal(saved.parent)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


@pytest.mark.parametrize("save_id", ["../../../etc", "0123abcd/../x", "", "0123ABCD", "0123abcd\n"])
def test_an_id_that_leads_elsewhere_is_refused(saved: Path, save_id: str) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())["manifest"]
    (saved / "manifest.json").write_bytes(seal({**manifest, "id": save_id}))
    assert f"its id is {save_id!r}" in refusal(saved.parent)


@pytest.mark.parametrize("tag", ["..", "../t", "/etc", "a/b", "a\\b", "", ".", "a\0b", "x" * 300])
def test_a_tag_that_leads_elsewhere_is_refused(saved: Path, tag: str) -> None:
    assert "is not a plain directory name" in refusal(saved.parent, tag)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"manifest": ' * 50_000, "9" * 5_000, '{"manifest": NaN}', "null", "\xff", ""],
)
def test_json_made_to_harm_is_refused(saved: Path, text: str) -> None:
    (saved / "manifest.json").write_bytes(text.encode("latin-1"))
    assert "manifest.json is damaged" in refusal(saved.parent)


def test_a_manifest_of_absurd_length_is_refused_before_it_is_read(saved: Path) -> None:
    with (saved / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)
    assert "no such file has more than" in refusal(saved.parent)


def test_another_format_is_named(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())["manifest"]
    (saved / "manifest.json").write_bytes(seal({**manifest, "format": "drivetrain-checkpoint-9"}))
    assert "has format 'drivetrain-checkpoint-9', expected 'drivetrain" in refusal(saved.parent)


def test_file_names_are_never_read_from_a_file() -> None:
    assert index.data_file(3, "0123abcd") == "rank00003-0123abcd.safetensors"
    assert index.id_of("rank00003-0123abcd.safetensors") == "0123abcd"
    assert index.id_of("weights.safetensors") is None

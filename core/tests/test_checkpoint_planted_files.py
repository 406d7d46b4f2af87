"""What others put in place of a checkpoint's files, or make of its boxes, is refused by name."""

from __future__ import annotations

import itertools
import json
import os
import random
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_engine import make, train
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
from drivetrain.checkpoint.format.boxes import covers_once
from drivetrain.checkpoint.format.index import Stored
from drivetrain.checkpoint.format.reading import read_whole
from drivetrain.checkpoint.format.storage import LocalStorage
from drivetrain.contracts import is_plain, plain
from drivetrain.errors import CheckpointError
from drivetrain.testing import run_distributed

TENSORS = some_tensors(1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_all(tmp_path / "run", "t", TENSORS, 2)
    return tmp_path / "run"


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_all(folder, "t", TENSORS)
    return str(caught.value)


# -- boxes -----------------------------------------------------------------------------------------


def cut(draw: random.Random, low: tuple[int, ...], high: tuple[int, ...], depth: int) -> list[Any]:
    """Boxes that make up a rectangle."""
    axes = [axis for axis, (a, b) in enumerate(zip(low, high, strict=True)) if b - a > 1]
    if depth == 0 or not axes:
        return [(low, high)]
    axis = draw.choice(axes)
    middle = draw.randrange(low[axis] + 1, high[axis])
    first, second = list(high), list(low)
    first[axis] = second[axis] = middle
    return [
        *cut(draw, low, tuple(first), depth - 1),
        *cut(draw, tuple(second), high, depth - 1),
    ]


def counts(boxes: list[Any], shape: tuple[int, ...]) -> torch.Tensor:
    """How often each element is in a box, counted one by one."""
    found = torch.zeros(shape, dtype=torch.int64)
    for low, high in boxes:
        for at in itertools.product(*map(range, low, high)):
            found[at] += 1
    return found


@pytest.mark.parametrize("seed", range(30))
def test_boxes_cover_a_tensor_once_exactly_if_each_element_is_counted_once(seed: int) -> None:
    draw = random.Random(seed)
    shape = tuple(draw.randrange(1, 6) for _ in range(draw.randrange(4)))
    origin = (0,) * len(shape)
    sound = cut(draw, origin, shape, 3)
    draw.shuffle(sound)
    others = [draw.choices(sound, k=len(sound)) for _ in range(5)]
    moved = [
        (
            tuple(a - (a > 0) for a in low),
            tuple(b - (a > 0) for a, b in zip(low, high, strict=True)),
        )
        for low, high in sound
    ]
    for boxes in [sound, moved, sound[1:], [*sound, sound[0]], *others]:
        expected = bool((counts(boxes, shape) == 1).all())
        assert covers_once(boxes, origin, shape) is expected
    assert covers_once(sound, origin, shape)


def test_many_boxes_are_compared_in_little_time() -> None:
    rows = 20_000
    boxes = [((row, 0), (row + 1, 1 << 40)) for row in range(rows)]
    began = time.process_time()
    assert covers_once(boxes, (0, 0), (rows, 1 << 40))
    assert not covers_once([*boxes[1:], boxes[1]], (0, 0), (rows, 1 << 40))
    assert time.process_time() - began < 5


def as_boxes(*rows: tuple[int, int]) -> Callable[[dict[str, Any]], None]:
    """Make a tensor consist of rows from one offset to another, each with right checksums."""

    def change(content: dict[str, Any]) -> None:
        raw, count = content["tensors"]["exp_avg/weight"], len(rows)
        raw |= {"rank": [0] * count, "at": [0] * count, "crc": ["0" * 8] * count}
        raw["offset"] = [n for first, _ in rows for n in (first, 0)]
        raw["size"] = [n for first, last in rows for n in (last - first, 7)]

    return change


@pytest.mark.parametrize("rows", [[(0, 2), (0, 2), (4, 5)], [(0, 3), (1, 3)], [(0, 4), (3, 4)]])
def test_boxes_that_are_double_beside_a_hole_are_found_before_memory_is_taken(
    saved: Path, rows: list[tuple[int, int]]
) -> None:
    edit_index(saved / "t", as_boxes(*rows))
    assert "holds twice a part of weight (exp_avg), and another part not at all" in refusal(saved)
    stored = Stored(LocalStorage(str(saved)), "t")
    source = stored.find("exp_avg", "weight")
    assert source is not None
    with pytest.raises(CheckpointError, match=r"only a part of weight \(exp_avg\), or a part tw"):
        read_whole(stored.storage, source)


def test_tensors_that_are_more_than_the_files_are_refused(saved: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        weight = content["tensors"]["exp_avg/weight"]
        content["tensors"] |= {f"exp_avg/{n}": weight for n in range(1000)}

    edit_index(saved / "t", change)
    assert "its tensors have " in refusal(saved)


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["manifest.json", INDEX, DATA])
@pytest.mark.parametrize("what", ["pipe", "folder", "link", "device"])
def test_what_is_no_file_of_the_folder_is_refused_at_once(
    saved: Path, tmp_path: Path, name: str, what: str
) -> None:
    path = saved / "t" / name
    path.rename(tmp_path / "moved")
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "moved" if what == "link" else "/dev/zero")
    message = refusal(saved)
    assert name in message
    expected = "is no regular file" if what in ("pipe", "folder") else f"leads out of {saved}, to "
    assert expected in message


def test_links_that_stay_in_the_runs_folder_are_followed(saved: Path) -> None:
    (saved / "t").rename(saved / "other")
    (saved / "t").symlink_to("other")
    (saved / "other" / DATA).rename(saved / "data")
    (saved / "other" / DATA).symlink_to("../data")
    assert content_hash(load_all(saved, "t", TENSORS)) == content_hash(TENSORS)


def test_a_run_may_be_reached_through_a_link(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(saved)
    assert content_hash(load_all(tmp_path / "link", "t", TENSORS)) == content_hash(TENSORS)


def test_a_folder_of_a_checkpoint_that_is_elsewhere_is_not_entered(
    saved: Path, tmp_path: Path
) -> None:
    (saved / "t").rename(tmp_path / "elsewhere")
    (saved / "t").symlink_to(tmp_path / "elsewhere")
    message = refusal(saved)
    assert f"{saved}/t leads out of {saved}, to {tmp_path}/elsewhere, and is not fol" in message


@pytest.mark.parametrize("name", ["manifest.json", INDEX, DATA])
def test_a_file_of_holes_takes_no_memory(saved: Path, name: str) -> None:
    os.truncate(saved / "t" / name, 1 << 31)
    message = refusal(saved)
    assert name in message


# -- plain data ------------------------------------------------------------------------------------


def doubled(depth: int) -> list[Any]:
    made: list[Any] = ["x"]
    for _ in range(depth):
        made = [made, made]
    return made


def cycle() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


def nested(depth: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(depth):
        made = [made]
    return made


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (doubled(100), "more than 268,435,456 characters of JSON"),
        (["x" * (1 << 20)] * 1000, "more than 268,435,456 characters of JSON"),
        ({"a": [{"b": cycle()}]}, r"client_state.a\[0\].b\[0\] \(nested too deeply\)"),
        (nested(100_000), "nested too deeply"),
        ({"a": [0, 10**5000]}, r"client_state.a\[1\] \(an integer of thousands of digits\)"),
        ({"a": (1, {2: 3})}, r"key 2 of client_state.a\[1\] is not"),
        ([object()], r"client_state\[0\] \(object\) is not"),
    ],
)
def test_data_that_would_take_for_ever_as_json_is_refused(value: Any, problem: str) -> None:
    began = time.process_time()
    with pytest.raises(CheckpointError, match=problem):
        plain(value, "client_state")
    assert not is_plain(value)
    assert time.process_time() - began < 2


def test_plain_data_comes_back_and_what_is_there_twice_counts_as_often_as_it_is_written() -> None:
    shared = {"a": [1, 2.5, None, True, "\u00e9"]}
    value = {"x": shared, "y": [shared, (1, 2)], "z": nested(150)}
    assert plain(value, "s") == json.loads(json.dumps(value))
    assert is_plain([shared] * 10, longest=1000)
    assert not is_plain([shared] * 100, longest=1000)


def test_names_out_of_files_are_shown_in_one_line_and_not_without_end() -> None:
    assert index.shown("layer.weight") == "layer.weight"
    assert index.shown("\x1b[31m\nx") == "'\\x1b[31m\\nx'"
    assert len(index.shown("x" * 10_000)) < 250


# -- on all ranks ----------------------------------------------------------------------------------


def save(folder: str) -> None:
    engine = make()
    train(engine, 1)
    engine.save_checkpoint(folder, "t")
    engine.destroy()


def refused(folder: str) -> str:
    engine = make()
    with pytest.raises(CheckpointError) as caught:
        engine.load_checkpoint(folder, "t")
    engine.destroy()
    return str(caught.value)


def test_state_of_one_rank_that_means_nothing_is_refused_on_all(tmp_path: Path) -> None:
    run_distributed(save, 2, str(tmp_path))
    (data,) = (tmp_path / "t").glob("rank00001-*.safetensors")

    def change(content: dict[str, Any]) -> None:
        raw, whole = content["ranks"][1]["own"]["state"], bytearray(data.read_bytes())
        place = slice(raw["at"][0], raw["at"][0] + raw["shape"][0])
        state = {**json.loads(whole[place]), "random": {"streams": 5}}
        whole[place] = json.dumps(state).encode().ljust(raw["shape"][0])
        raw["crc"] = [f"{zlib.crc32(whole[place]):08x}"]
        data.write_bytes(whole)

    edit_index(tmp_path / "t", change)
    for message in run_distributed(refused, 2, str(tmp_path)):
        assert "state in" in message
        assert "does not fit: TypeError" in message

"""A load without a tag takes the latest, or says loudly why not; it never takes another way."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_engine import damage
from torch import nn

import drivetrain
from drivetrain.checkpoint.format import index
from drivetrain.engine.engine import Engine
from drivetrain.errors import CheckpointError
from drivetrain.testing.faulty_disk import Fault, failing


def make(width: int = 2) -> Engine:
    torch.manual_seed(0)
    engine, *_ = drivetrain.initialize(
        model=nn.Linear(3, width),
        config={"train_batch_size": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}},
    )
    return engine


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = make()
    yield made
    made.destroy()


def save(engine: Engine, folder: Path, *tags: str, **options: Any) -> None:
    for tag in tags:
        engine.backward(engine(torch.ones(1, 3)).square().mean())
        engine.step()
        with failing(None):  # which spares the disk
            engine.save_checkpoint(folder, tag, **options)


def loaded(engine: Engine, folder: Path) -> str | None:
    path, _ = engine.load_checkpoint(folder)
    return None if path is None else Path(path).name


def harm(folder: Path, tag: str) -> None:
    damage(next((folder / tag).glob("rank00000-*.safetensors")))


def shouts(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR)


def test_a_latest_that_names_an_older_one_is_obeyed_loudly(
    tmp_path: Path, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    save(engine, tmp_path, "step10", "step20", "step30")
    assert loaded(engine, tmp_path) == "step30"
    assert shouts(caplog) == ""
    (tmp_path / "latest").write_text("step20")  # a digit has changed
    assert loaded(engine, tmp_path) == "step20"
    assert "latest names step20 (step 2, saved at" in shouts(caplog)
    assert "step30 (step 3, saved at" in shouts(caplog)
    assert "tag='step30'" in shouts(caplog)


def test_a_run_that_went_back_is_no_reason_to_shout(
    tmp_path: Path, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    save(engine, tmp_path, "a1", "a2", "a3")
    engine.load_checkpoint(tmp_path, "a1")
    save(engine, tmp_path, "b2")
    save(engine, tmp_path, "side", save_latest=False)
    assert loaded(engine, tmp_path) == "b2"
    assert shouts(caplog) == ""


def test_without_latest_the_one_that_was_saved_last_is_taken_loudly(
    tmp_path: Path, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    save(engine, tmp_path, "a1", "a2", "a3")
    engine.load_checkpoint(tmp_path, "a1")
    save(engine, tmp_path, "b2")
    (tmp_path / "latest").unlink()
    assert loaded(engine, tmp_path) == "b2"
    assert "latest is missing; the checkpoint that was saved last is tried" in shouts(caplog)


def test_checkpoints_that_were_not_to_be_the_latest_are_not_taken_for_it(
    tmp_path: Path, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    save(engine, tmp_path, "best", save_latest=False)
    assert loaded(engine, tmp_path) is None
    assert "was saved as the latest; load one with tag='best'" in caplog.text


def test_a_damaged_latest_gives_way_to_what_it_continued_from_alone(
    tmp_path: Path, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    save(engine, tmp_path, "a1", "a2", "a3")
    engine.load_checkpoint(tmp_path, "a1")
    save(engine, tmp_path, "b2", "b3")
    harm(tmp_path, "b3")
    assert loaded(engine, tmp_path) == "b2"
    assert "it is not the latest, which is damaged" in shouts(caplog)
    harm(tmp_path, "b2")
    assert loaded(engine, tmp_path) == "a1"
    harm(tmp_path, "a1")
    with pytest.raises(CheckpointError, match=r"other checkpoints there: a3, a2;"):
        engine.load_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["manifest", "folder", "latest"])
def test_where_no_manifest_tells_the_one_that_was_saved_last_is_taken(
    tmp_path: Path, engine: Engine, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(engine, tmp_path, "high1", "high2", "high3")
    engine.load_checkpoint(tmp_path, "high1")
    save(engine, tmp_path, "low2", "low3")
    if kind == "manifest":
        (tmp_path / "low3" / "manifest.json").write_text("{}")
    elif kind == "folder":
        (tmp_path / "low3").rename(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    else:
        (tmp_path / "latest").write_bytes(b"\xff\0")
    assert loaded(engine, tmp_path) == ("low3" if kind == "latest" else "low2")
    assert "falling back to the last good checkpoint" in shouts(caplog)


def test_whatever_cannot_be_read_for_now_is_not_called_damaged(
    tmp_path: Path, engine: Engine
) -> None:
    save(engine, tmp_path, "one", "two")
    number, failed = 0, True
    found, refusals = set[str | None](), list[str]()
    while failed:
        number += 1
        with failing(number, Fault(errno.EIO)) as disk:
            try:
                found.add(loaded(engine, tmp_path))
            except CheckpointError as error:
                refusals.append(str(error))
            failed = disk.has_failed
    assert found == {"two"}
    assert len(refusals) > 5
    assert all("Errno 5" in text and "damaged:" not in text for text in refusals)
    assert loaded(engine, tmp_path) == "two"


def test_a_checkpoint_that_does_not_fit_is_refused_and_no_other_taken(
    tmp_path: Path, engine: Engine
) -> None:
    save(engine, tmp_path, "fits")
    other = make(width=5)
    save(other, tmp_path, "other")
    other.destroy()
    with pytest.raises(CheckpointError, match=r"has shape .* so no other one is taken"):
        engine.load_checkpoint(tmp_path)


def test_a_checkpoint_of_another_version_is_refused_and_no_other_taken(
    tmp_path: Path, engine: Engine
) -> None:
    save(engine, tmp_path, "now", "later")
    place = tmp_path / "later" / "manifest.json"
    manifest = json.loads(place.read_bytes())["manifest"]
    place.write_bytes(index.seal({**manifest, "format": "drivetrain-checkpoint-99"}))
    with pytest.raises(CheckpointError, match=r"checkpoint-99.* so no other one is taken"):
        engine.load_checkpoint(tmp_path)

"""Whatever is in a file that somebody else made, reading it ends soon and does no harm."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_checkpoint_tools import import_weights
from safetensors.torch import save_file

from drivetrain.checkpoint.format.reading import read_whole
from drivetrain.checkpoint.opening import opened
from drivetrain.errors import CheckpointError

SECONDS = 2
MIB = 1 << 20


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """What became of every case; all run in one process, whose memory is looked at."""
    folder = tmp_path_factory.mktemp("hostile")
    command = [sys.executable, str(Path(__file__).with_name("hostile_cases.py")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    yield json.loads(done.stdout.splitlines()[-1])
    assert (folder / "outside" / "secret").read_text() == "secret"


def failing(outcomes: list[dict[str, Any]], *facts: str, **limits: float) -> list[Any]:
    return [
        [case["name"], *(case[fact] for fact in facts)]
        for case in outcomes
        if any(case[fact] > limit for fact, limit in limits.items())
    ]


def test_there_are_enough_cases_of_each_kind(outcomes: list[dict[str, Any]]) -> None:
    names = [case["name"] for case in outcomes]
    assert len(names) == len(set(names))
    kinds = {
        kind: sum(name.startswith(kind) for name in names)
        for kind in ("checkpoint", "engine", "weights", "import")
    }
    assert sum(kinds.values()) == len(names) >= 200
    assert min(kinds.values()) >= 20


def test_each_is_refused_in_one_line_or_turns_out_sound(outcomes: list[dict[str, Any]]) -> None:
    tracebacks = [
        c["name"] + "\n" + c["raised"] for c in outcomes if c["kind"] not in ("", "CheckpointError")
    ]
    assert tracebacks == []
    lines = [(c["name"], c["raised"]) for c in outcomes if c["raised"]]
    assert [line for line in lines if not line[1].isprintable() or len(line[1]) > 1500] == []


def test_what_is_hostile_by_construction_is_refused(outcomes: list[dict[str, Any]]) -> None:
    assert [case["name"] for case in outcomes if case["must_fail"] and not case["kind"]] == []


def test_each_ends_soon(outcomes: list[dict[str, Any]]) -> None:
    # Processor time: how long it takes is up to what else runs on the machine.
    assert failing(outcomes, "seconds", seconds=SECONDS) == []


def test_memory_and_disk_follow_what_the_files_have(outcomes: list[dict[str, Any]]) -> None:
    assert sum(case["grown"] for case in outcomes) * 1024 < 200 * MIB, failing(
        outcomes, "grown", grown=MIB // 1024
    )
    assert failing(outcomes, "written", written=20 * MIB) == []


def test_nothing_outside_is_touched(outcomes: list[dict[str, Any]]) -> None:
    assert [(case["name"], case["outside"]) for case in outcomes if case["outside"]] == []


def test_weights_in_the_hubs_cache_are_read_through_its_links_and_no_others(
    tmp_path: Path,
) -> None:
    snapshot, blobs = (
        tmp_path / "models--x" / "snapshots" / "1234abcd",
        tmp_path / "models--x/blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    weights = {"weight": torch.arange(6.0)}
    save_file(weights, blobs / "5678")
    (snapshot / "model.safetensors").symlink_to("../../blobs/5678")
    place = import_weights(str(snapshot), str(tmp_path / "out"))
    with opened(place) as stored:
        found = stored.find("parameter", "weight")
        assert found is not None
        assert torch.equal(read_whole(stored.storage, found), weights["weight"])
    (blobs / "5678").rename(tmp_path / "elsewhere")
    (blobs / "5678").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"leads out of .*models--x, to .*elsewhere, and is"):
        import_weights(str(snapshot), str(tmp_path / "other"))

"""A disk that fails at any operation of a save takes no checkpoint with it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.checkpoint.agreement import any_rank
from drivetrain.checkpoint.format.commit import UnfinishedSaveError
from drivetrain.engine.engine import Engine
from drivetrain.errors import CheckpointError
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed
from drivetrain.testing.faulty_disk import (
    DONE,
    FULL,
    GONE,
    Contents,
    Fault,
    check_all,
    contents,
    failing,
    open_files,
    stored_contents,
)
from drivetrain.testing.sharded import ShardedStates

NEW = 4
"""The step whose save fails; steps 1, 2 and 3 have been saved."""


@dataclass(frozen=True)
class Case:
    """A save that fails.

    Args:
        tag: what it is called.
        keep_last: how many checkpoints stay.
        save_latest: whether ``latest`` follows.
        torn: the save of step 2 was killed before.
        kept: steps of the checkpoints that are there when a save succeeds.
    """

    tag: str = f"global_step{NEW}"
    keep_last: int | None = None
    save_latest: bool = True
    torn: bool = False
    kept: tuple[int, ...] = (1, 2, 3, NEW)


CASES = {
    "another tag": Case(),
    "the same tag": Case("global_step3", kept=(1, 2, NEW)),
    "one is kept": Case(keep_last=1, kept=(NEW,)),
    "two are kept, and one is torn": Case(keep_last=2, torn=True, kept=(3, NEW)),
    "latest stays behind": Case(keep_last=1, save_latest=False, kept=(3, NEW)),
    "the same tag, latest stays behind": Case("global_step3", save_latest=False, kept=(1, 2, NEW)),
}

Steps = dict[str, int]
"""The step of every checkpoint, by its tag."""


def make(keep_last: int | None = None, world: int = 1) -> Engine:
    torch.manual_seed(0)
    engine, *_ = drivetrain.initialize(
        model=nn.Linear(3, 2),
        config={
            "train_batch_size": world,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
            "checkpoint": {"keep_last": keep_last},
            "plugins": {"sharded_states": True} if world > 1 else {},
        },
        registry=Registry.installed().with_plugins(ShardedStates),
    )
    return engine


def train(engine: Engine) -> None:
    engine.backward(engine(torch.ones(1, 3)).square().mean())
    engine.step()


def begin(folder: Path, case: Case, world: int = 1) -> tuple[Engine, dict[int, Contents]]:
    """An engine whose next save is to fail, after a run that saved; contents by step."""
    engine, saved = make(world=world), {}
    for step in range(1, NEW + 1):
        train(engine)
        place = folder if step < NEW else folder / "not of this run"
        with failing(None):  # which spares the disk
            engine.save_checkpoint(place)
        saved[step] = stored_contents(place, f"global_step{step}")
        assert world > 1 or str(saved[step]) == str(contents(engine))
    any_rank(engine.job, [False])  # all have read it
    if engine.job.rank == 0:
        shutil.rmtree(place)
    engine.destroy()
    engine = make(case.keep_last, world)
    engine.load_checkpoint(folder)
    train(engine)
    if case.torn and engine.job.rank == 0:
        (folder / "global_step2" / "manifest.json").unlink()
    return engine, saved


def save(engine: Engine, folder: Path, case: Case) -> Exception | None:
    try:
        engine.save_checkpoint(folder, case.tag, save_latest=case.save_latest)
    except CheckpointError as error:
        return error
    return None


def check_outcome(
    folder: Path, case: Case, before: Steps, after: Steps, raised: Exception | None
) -> None:
    """What a save leaves behind, by how it ended."""
    named = (folder / "latest").read_text()
    assert after[named] in (3, NEW)
    if raised is None:
        assert after[case.tag] == NEW
        assert after[named] == (NEW if case.save_latest or named == case.tag else 3)
    elif isinstance(raised, UnfinishedSaveError):
        assert NEW in after.values() or "may be there" in str(raised)
        assert set(before) <= set(after), "something older was removed"
    else:
        assert "was not saved" in str(raised)
        assert after == before


def fail_everywhere(root: Path, case: Case, fault: Fault, world: int = 1) -> set[type]:
    """Save once for each operation of each rank, and let that operation fail; how saves ended."""
    engine, saved = begin(root / "base", case, world)
    first, before = engine.job.rank == 0, check_all(root / "base", saved)
    outcomes, victim, number = set(), 0, 0
    while victim < world:
        number += 1
        folder = root / f"{victim}-{number}"
        if first:
            shutil.copytree(root / "base", folder)
        any_rank(engine.job, [False])  # wait for each other
        with failing(number if engine.job.rank == victim else None, fault) as faulty:
            raised = save(engine, folder, case)
        assert open_files(folder) == []
        (more,) = any_rank(engine.job, [faulty.has_failed])
        if first:
            check_outcome(folder, case, before, check_all(folder, saved), raised)
        outcomes.add(type(raised))
        if not more:
            assert number > 12
            assert not first or sorted(check_all(folder, saved).values()) == list(case.kept)
            victim, number = victim + 1, 0
        elif number % 7 == 0:  # nothing is in the way of the next attempt
            with failing(None):
                assert save(engine, folder, case) is None
            if first:
                check_outcome(folder, case, before, check_all(folder, saved), None)
        any_rank(engine.job, [False])
        if first:
            shutil.rmtree(folder)
    engine.destroy()
    return outcomes


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *((name, FULL) for name in CASES),
        ("the same tag", DONE),
        ("one is kept", DONE),
        ("the same tag", GONE),
        ("one is kept", GONE),
    ],
)
def test_every_checkpoint_that_a_manifest_names_loads_whichever_operation_fails(
    tmp_path: Path, name: str, fault: Fault
) -> None:
    outcomes = fail_everywhere(tmp_path, CASES[name], fault)
    assert outcomes == {type(None), CheckpointError, UnfinishedSaveError}


def fail_on_ranks(root: str) -> list[str]:
    ends = fail_everywhere(Path(root), CASES["one is kept"], FULL, 2)
    return [kind.__name__ for kind in ends]


def test_whichever_of_two_ranks_has_a_disk_that_fails_all_checkpoints_load(tmp_path: Path) -> None:
    for names in run_distributed(fail_on_ranks, 2, str(tmp_path)):
        assert set(names) == {"NoneType", "CheckpointError", "UnfinishedSaveError"}

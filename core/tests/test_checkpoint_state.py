"""State beside parameters: plugins' own, ranks' own, and what a resume is said to be worth."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from small_engine import (
    CONFIG,
    Model,
    damage,
    load_and_report,
    make,
    save_and_report,
    train,
)

import drivetrain
from drivetrain.checkpoint.format.commit import PendingSave
from drivetrain.communication.process_group import Ranks
from drivetrain.contracts import Plugin, Section, Sections, StateReader, StateWriter, hookimpl
from drivetrain.engine.engine import Engine
from drivetrain.errors import CheckpointError
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed

# -- plugins' state --------------------------------------------------------------------------------


class Counting(Plugin):
    """Stores whatever the test says."""

    name = "counting"
    sections: ClassVar[Sections] = {"counting": Section}
    stored: ClassVar[dict[str, Any]] = {}
    found: ClassVar[dict[str, Any]] = {}

    @hookimpl
    def save_state(self, engine: Engine, writer: StateWriter) -> None:
        for key, value in self.stored.items():
            writer.put(key, value)
        writer.put("counting/rank", engine.job.rank, per_rank=True)

    @hookimpl
    def load_state(self, engine: Engine, reader: StateReader) -> None:
        for key in (*self.stored, "counting/rank"):
            self.found[key] = reader.get(key)


class Silent(Plugin):
    name = "counting"
    sections: ClassVar[Sections] = {"counting": Section}

    @hookimpl
    def save_state(self, engine: Engine, writer: StateWriter) -> None:
        pass

    @hookimpl
    def load_state(self, engine: Engine, reader: StateReader) -> None:
        pass


class OneWay(Counting):
    load_state = None


class Unregistered(Plugin):
    name = "counting"
    sections: ClassVar[Sections] = {"counting": Section}

    def state_dict(self) -> dict[str, Any]:
        return {}


def make_with(plugin: type[Plugin]) -> Engine:
    module = Model()
    engine, *_ = drivetrain.initialize(
        model=module,
        model_parameters=module.parameters(),
        config={**CONFIG, "counting": {}},
        registry=Registry.installed().with_plugins(plugin),
    )
    return engine


def counted(folder: str, loads: bool) -> dict[str, Any]:
    Counting.stored = {"counting/a": [1, "x"], "counting/b": torch.arange(3)}
    engine = make_with(Counting)
    if loads:
        engine.load_checkpoint(folder, "t")
    else:
        engine.save_checkpoint(folder, "t")
    engine.destroy()
    return Counting.found


def test_a_plugins_state_comes_back_and_its_ranks_own_in_the_same_layout_only(
    tmp_path: Path,
) -> None:
    run_distributed(counted, 2, str(tmp_path), False)
    for world, ranks in ((2, [0, 1]), (3, [None] * 3)):
        answers = run_distributed(counted, world, str(tmp_path), True)
        assert [answer["counting/rank"] for answer in answers] == ranks
        for answer in answers:
            assert answer["counting/a"] == [1, "x"]
            assert answer["counting/b"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("plugin", "flaw"),
    [
        (Silent, "its save_state stored nothing under 'counting/'"),
        (OneWay, "it implements one of save_state and load_state without the other"),
        (Unregistered, "it has a state_dict, but no hook save_state that stores it"),
    ],
)
def test_saving_fails_when_a_plugins_state_would_be_lost(
    tmp_path: Path, plugin: type[Plugin], flaw: str
) -> None:
    engine = make_with(plugin)
    with pytest.raises(CheckpointError, match=flaw):
        engine.save_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == []
    engine.destroy()


# -- several ranks ---------------------------------------------------------------------------------


def save_under_tags_of_their_own(folder: str, policy: str) -> str:
    engine = make(checkpoint={"tag_validation": policy})
    try:
        return engine.save_checkpoint(folder, f"tag{Ranks.current().rank}")
    except CheckpointError as error:
        return str(error)
    finally:
        engine.destroy()


def fail_on_rank_one(folder: str) -> str:
    engine = make()
    if Ranks.current().rank == 1:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        PendingSave.write, original = full, PendingSave.write  # type: ignore[method-assign]
    try:
        return engine.save_checkpoint(folder, "second")
    except CheckpointError as error:
        return str(error)
    finally:
        if Ranks.current().rank == 1:
            PendingSave.write = original  # type: ignore[method-assign]
        engine.destroy()


def save_seventh(folder: str, changes: dict[str, Any]) -> None:
    torch.manual_seed(10 + Ranks.current().rank)
    engine = make(**changes)
    train(engine, 7)  # in the middle of the second epoch
    engine.save_checkpoint(folder, client_state={"note": "seven"})
    engine.destroy()


def load_damaged(folder: str) -> tuple[str | None, int]:
    engine = make()
    path, _ = engine.load_checkpoint(folder)
    steps = engine.global_steps
    engine.destroy()
    return path, steps


def test_ranks_with_different_tags_save_under_rank_0s_or_not_at_all(tmp_path: Path) -> None:
    for rank, answer in enumerate(
        run_distributed(save_under_tags_of_their_own, 2, str(tmp_path), "Fail")
    ):
        assert f"different tags; this rank's is 'tag{rank}'" in answer
    assert list(tmp_path.iterdir()) == []
    for policy in ("Warn", "Ignore"):
        answers = run_distributed(save_under_tags_of_their_own, 2, str(tmp_path), policy)
        assert answers == [str(tmp_path / "tag0")] * 2


def test_a_rank_that_cannot_write_fails_all_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    run_distributed(save_and_report, 2, str(tmp_path), {})
    for answer in run_distributed(fail_on_rank_one, 2, str(tmp_path)):
        assert "second was not saved: rank 1: [Errno 28] No space left on device" in answer
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "t"]
    assert (tmp_path / "latest").read_text() == "t"
    run_distributed(load_and_report, 2, str(tmp_path), {})


def test_all_ranks_fall_back_together_when_one_finds_damage(tmp_path: Path) -> None:
    run_distributed(save_and_report, 2, str(tmp_path), {})
    run_distributed(save_seventh, 2, str(tmp_path), {})
    damage(next((tmp_path / "global_step7").glob("rank00001-*.safetensors")))
    assert run_distributed(load_damaged, 2, str(tmp_path)) == [(str(tmp_path / "t"), 3)] * 2


# -- the guarantee ---------------------------------------------------------------------------------


def logged_load(folder: str, changes: dict[str, Any]) -> str:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("drivetrain.checkpoint")
    logger.addHandler(handler)
    logger.setLevel("INFO")
    try:
        load_and_report(folder, changes)
    finally:
        logger.removeHandler(handler)
    return "\n".join(records)


def test_the_guarantee_names_its_grade_and_all_that_is_weaker(tmp_path: Path) -> None:
    run_distributed(save_and_report, 2, str(tmp_path), {})
    same = run_distributed(logged_load, 2, str(tmp_path), {})[0]
    assert same.endswith("step 3; same layout: bitwise")
    other = logged_load(str(tmp_path), {})
    assert "reshaped: state bit-identical, sample order identical, except: " in other
    assert "random streams start afresh" in other
    assert "2 buffers differ between ranks" in other
    pure = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
    narrow = {**pure, "bf16": {**pure["bf16"], "bf16_optimizer_states": True}}
    assert "exp_avg narrows from torch.float32 to torch.bfloat16" in logged_load(
        str(tmp_path), narrow
    )


def test_the_promise_is_made_when_saving(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    engine = make(train_batch_size=12, gradient_accumulation_steps=3)
    engine.backward(engine(torch.ones(4, 4), torch.ones(4, 1)))
    engine.step()
    engine.save_checkpoint(tmp_path)
    assert "resumes in the same layout: bitwise, except: the gradients of 1 micro-" in caplog.text
    assert "in another: state bit-identical, sample order identical, except:" in caplog.text
    engine.load_checkpoint(tmp_path)
    assert engine.micro_steps == 0
    engine.destroy()

"""Stage 3 with its parameters in files: bitwise the training without offload, within bounds."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_zero_with_offload import MODES, assert_equal, losses_and_weights, start

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.errors import ConfigError, DrivetrainError
from drivetrain.plan.plan import Plan
from drivetrain.testing import run_distributed

OPTIMIZER = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}
STEPS = 6


def config(folder: Path | None, optimizer: str = "none", **more: Any) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 100}
    if folder is not None:
        path = {"nvme_path": str(folder)}
        zero["offload_param"] = {"device": "nvme", "max_in_cpu": 0, **path}
        zero["offload_optimizer"] = {"device": optimizer, "buffer_size": 1000, **path}
    return {
        "train_batch_size": 8,
        "optimizer": OPTIMIZER,
        "gradient_clipping": 0.1,  # bites
        "zero_optimization": zero,
        **more,
    }


@cache
def without(world: int, mode: str) -> list[Any]:
    more = {**MODES[mode], "train_batch_size": 4 * world * (2 if mode == "accumulating" else 1)}
    return run_distributed(losses_and_weights, world, config(None, **more), STEPS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("optimizer", ["none", "cpu", "nvme"])
def test_training_is_bitwise_that_without_offload(
    optimizer: str, world: int, mode: str, tmp_path: Path
) -> None:
    more = {**MODES[mode], "train_batch_size": 4 * world * (2 if mode == "accumulating" else 1)}
    given = config(tmp_path, optimizer, **more)
    assert_equal(run_distributed(losses_and_weights, world, given, STEPS), without(world, mode))
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix == ".swap"]
    assert not left


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_states_in_files_train_alike_at_the_other_stages(stage: int, tmp_path: Path) -> None:
    bare = config(None, **MODES["bf16"])
    given = config(tmp_path, "nvme", **MODES["bf16"])
    del given["zero_optimization"]["offload_param"]
    for each in (bare, given):
        each["zero_optimization"]["stage"] = stage
    expected = run_distributed(losses_and_weights, 2, bare, STEPS)
    assert_equal(run_distributed(losses_and_weights, 2, given, STEPS), expected)


@pytest.mark.parametrize("optimizer", ["none", "nvme"])
def test_a_resumed_run_is_bitwise_one_that_was_not_stopped(optimizer: str, tmp_path: Path) -> None:
    given = config(tmp_path / "swap", optimizer, **MODES["bf16"])
    folder = str(tmp_path / "saved")
    found = run_distributed(losses_and_weights, 2, given, STEPS, folder)
    assert_equal(found, without(2, "bf16"))


def bytes_in_memory(given: dict[str, Any]) -> tuple[int, int]:
    """Bytes of parameters after a step, and those of the model."""
    engine = start(given)
    generator = torch.Generator().manual_seed(Ranks.current().rank)
    tokens = torch.randint(64, (4, 9), generator=generator)
    engine.backward(engine(tokens[:, :-1], tokens[:, 1:]))
    engine.step()
    held = sum(
        fragment.read().untyped_storage().nbytes()
        for fragment in engine.states.fragments()
        if fragment.kind == "parameter" and fragment.home != "nvme"
    )
    whole = sum(p.untyped_storage().nbytes() for p in engine.module.parameters() if any(p.stride()))
    total = sum(p.numel() * p.element_size() for p in engine.module.parameters())
    engine.job.close()
    return held + whole, total


@pytest.mark.parametrize("world", [1, 2])
def test_between_steps_no_parameter_is_on_the_device(world: int, tmp_path: Path) -> None:
    given = config(tmp_path, "nvme", train_batch_size=4 * world)
    given["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    for held, total in run_distributed(bytes_in_memory, world, given):
        assert total > 50_000
        assert held == 0


def test_what_fits_into_max_in_cpu_stays_in_memory(tmp_path: Path) -> None:
    given = config(tmp_path, train_batch_size=4)
    given["zero_optimization"]["offload_param"]["max_in_cpu"] = 10**9
    ((held, total),) = run_distributed(bytes_in_memory, 1, given)
    assert held >= total


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_other_stages_are_refused(stage: int, tmp_path: Path) -> None:
    given = config(tmp_path)
    given["zero_optimization"]["stage"] = stage
    with pytest.raises(ConfigError, match=r"offload_param.device: .*stage 3 only"):
        Plan.build(given, world_size=1)


def test_guessing_ahead_is_refused(tmp_path: Path) -> None:
    given = config(tmp_path, "cpu")
    given["zero_optimization"]["offload_optimizer"]["super_offload"] = True
    with pytest.raises(ConfigError, match=r"super_offload: .*files"):
        Plan.build(given, world_size=1)


def test_direct_storage_is_refused(tmp_path: Path) -> None:
    given = {**config(tmp_path, "nvme"), "aio": {"use_gds": True}}
    with pytest.raises(ConfigError, match=r"aio.use_gds: no accelerator"):
        Plan.build(given, world_size=1)


def a_path_that_cannot_be(folder: str) -> str:
    given = config(Path(folder), train_batch_size=8)
    try:
        start(given)
    except DrivetrainError as error:
        return str(error)
    return "nothing"


def test_a_path_that_cannot_be_a_folder_is_named_on_every_rank(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    for message in run_distributed(a_path_that_cannot_be, 2, str(blocked / "below")):
        assert str(blocked / "below") in message


def arrays(given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a client took out of a gathered parameter, and what the parameter is."""
    engine = start(given)
    weight = engine.module.blocks[0].up.weight
    with drivetrain.whole(weight):
        taken = weight.detach().numpy()
    tokens = torch.ones(4, 9, dtype=torch.int64)
    with torch.no_grad():
        engine(tokens[:, :-1], tokens[:, 1:])  # gathers it and gives its memory back
    with drivetrain.whole(weight):
        found = weight.detach().clone()
    kept = torch.from_numpy(taken).clone()
    engine.job.close()
    return kept, found


def test_an_array_of_a_gathered_parameter_may_be_kept(tmp_path: Path) -> None:
    given = config(tmp_path, train_batch_size=4)
    given["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    ((kept, found),) = run_distributed(arrays, 1, given)
    assert found.any()
    assert torch.equal(kept, found)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("buffer_count", [1, 2])
def test_little_memory_near_the_states_gives_the_same_bits(
    buffer_count: int, world: int, tmp_path: Path
) -> None:
    given = config(tmp_path, "nvme", **{**MODES["fp32"], "train_batch_size": 4 * world})
    given["zero_optimization"]["offload_param"]["buffer_count"] = buffer_count
    given["zero_optimization"]["offload_optimizer"]["buffer_count"] = 2
    found = run_distributed(losses_and_weights, world, given, STEPS)
    assert_equal(found, without(world, "fp32"))


def tables(given: dict[str, Any]) -> tuple[set[Any], set[Any]]:
    """Bytes of every kind before and after the states are laid out anew."""
    from drivetrain_offload import memory_table

    engine = start(given)
    before = {(row.kind, row.place, row.nbytes) for row in memory_table(engine)}
    engine.states.rebuild()
    after = [(row.kind, row.place, row.nbytes) for row in memory_table(engine)]
    engine.job.close()
    assert len(after) == len({*after}), after
    return before, {*after}


def test_memory_of_states_that_were_replaced_is_not_counted(tmp_path: Path) -> None:
    ((before, after),) = run_distributed(tables, 1, config(tmp_path, "nvme", train_batch_size=4))
    assert after == before

"""ZeRO whose shards are updated in host memory, where that is the device's memory too."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.errors import ConfigError
from drivetrain.plan.plan import Plan
from drivetrain.testing import assert_trains_like_reference, run_distributed
from drivetrain.testing.models import tiny_gpt

OPTIMIZER = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}
WORLD = 2


def config(stage: int, offload: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": 8,
        "optimizer": OPTIMIZER,
        "gradient_clipping": 0.1,  # bites
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 100,
            "reduce_bucket_size": 5_000,
            "offload_optimizer": offload,
        },
        **more,
    }


def losses_and_weights(
    given: dict[str, Any], steps: int, folder: str | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """With a folder, the job is saved half way, and a new one goes on from there."""
    losses: list[float] = []
    engine = start(given)
    for step in range(steps):
        if folder is not None and step == steps // 2:
            engine.save_checkpoint(folder)
            engine.destroy()
            engine.job.close()
            engine = start(given)
            engine.load_checkpoint(folder)
        generator = torch.Generator().manual_seed(100 * step + Ranks.current().rank)
        tokens = torch.randint(64, (4, 9), generator=generator)
        loss = engine(tokens[:, :-1], tokens[:, 1:])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    weights = engine.module_state_dict()
    engine.job.close()
    return losses, weights


def start(given: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    module = tiny_gpt()
    engine, *_ = drivetrain.initialize(
        model=module, model_parameters=module.parameters(), config=given
    )
    return engine


MODES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
    "accumulating": {"bf16": {"enabled": True}, "gradient_accumulation_steps": 2},
}


@cache
def without(stage: int, mode: str) -> list[Any]:
    given = config(stage, {"device": "none"}, **MODES[mode])
    return run_distributed(losses_and_weights, WORLD, given, 6)


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    for (losses, weights), (other_losses, other_weights) in zip(found, expected, strict=True):
        assert losses == other_losses
        for name, value in other_weights.items():
            assert torch.equal(weights[name], value), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_is_bitwise_that_without_offload(stage: int, mode: str) -> None:
    given = config(stage, {"device": "cpu"}, **MODES[mode])
    assert_equal(run_distributed(losses_and_weights, WORLD, given, 6), without(stage, mode))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_ratio_works_at_every_stage(stage: int) -> None:
    given = config(stage, {"device": "cpu", "ratio": 0.5}, **MODES["bf16"])
    assert_equal(run_distributed(losses_and_weights, WORLD, given, 6), without(stage, "bf16"))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_resumed_run_is_bitwise_one_that_was_not_stopped(stage: int, tmp_path: Path) -> None:
    given = config(stage, {"device": "cpu"}, **MODES["bf16"])
    found = run_distributed(losses_and_weights, WORLD, given, 6, str(tmp_path))
    assert_equal(found, without(stage, "bf16"))


ZENFLOW = {"topk_ratio": 0.2, "update_interval": 2, "select_interval": 2, "overlap_step": True}


@pytest.mark.parametrize("way", ["delayed_update", "super_offload", "zenflow"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_so_is_one_whose_updates_come_late_or_early(stage: int, way: str, tmp_path: Path) -> None:
    given = config(stage, {"device": "cpu"}, **MODES["bf16"])
    zero = given["zero_optimization"]
    if way == "zenflow":
        zero["zenflow"] = ZENFLOW
    else:
        zero["offload_optimizer"][way] = True
    whole = run_distributed(losses_and_weights, WORLD, given, 6)
    assert_equal(run_distributed(losses_and_weights, WORLD, given, 6, str(tmp_path)), whole)


def resume_with_another_home(folder: str, first: dict[str, Any], second: dict[str, Any]) -> Any:
    engine = start(first)
    train = torch.randint(64, (4, 9), generator=torch.Generator().manual_seed(3))
    engine.backward(engine(train[:, :-1], train[:, 1:]))
    engine.step()
    engine.save_checkpoint(folder)
    engine.job.close()
    engine = start(second)
    engine.load_checkpoint(folder)
    engine.backward(engine(train[:, :-1], train[:, 1:]))
    engine.step()
    weights = engine.module_state_dict()
    engine.job.close()
    return weights


def test_checkpoints_are_the_same_with_and_without_offload(tmp_path: Path) -> None:
    homes = ({"device": "none"}, {"device": "cpu"}, {"device": "cpu", "ratio": 0.4})
    answers = [
        run_distributed(
            resume_with_another_home,
            WORLD,
            str(tmp_path / str(number)),
            config(2, homes[number], **MODES["bf16"]),
            config(3, homes[(number + 1) % 3], **MODES["bf16"]),
        )
        for number in range(3)
    ]
    for answer in answers[1:]:
        for weights, expected in zip(answer, answers[0], strict=True):
            assert all(torch.equal(weights[name], value) for name, value in expected.items())


def change_the_model(given: dict[str, Any]) -> list[Any]:
    """Weights of a run in which some are frozen, thawed, and overwritten."""
    engine = start(given)
    tokens = torch.randint(64, (4, 9), generator=torch.Generator().manual_seed(3))
    frozen = next(iter(engine.module.parameters()))
    for step in range(6):
        if step in (2, 4):
            frozen.requires_grad = step == 4
            engine.rebuild()
        if step == 3:
            with drivetrain.whole(engine.module, write_rank=0), torch.no_grad():
                for parameter in engine.module.parameters():
                    parameter.mul_(0.5)
            engine.states.refresh()
        engine.backward(engine(tokens[:, :-1], tokens[:, 1:]))
        engine.step()
    weights = list(engine.module_state_dict().values())
    engine.job.close()
    return weights


@pytest.mark.parametrize(
    ("stage", "mode"),
    [
        (0, "fp32"),
        (1, "bf16"),
        (3, "bf16"),
        *(
            pytest.param(stage, mode, marks=pytest.mark.long)
            for stage, mode in [(0, "bf16"), (1, "fp32"), (2, "fp32"), (2, "bf16"), (3, "fp32")]
        ),
    ],
)
def test_freezing_and_overwriting_weights_works_as_without_offload(stage: int, mode: str) -> None:
    sections = ({"device": "none"}, {}, {"ratio": 0.5}, {"super_offload": True})
    expected, *others = (
        run_distributed(
            change_the_model, WORLD, config(stage, {"device": "cpu", **section}, **MODES[mode])
        )
        for section in sections
    )
    for found in others:
        for mine, theirs in zip(found, expected, strict=True):
            assert all(map(torch.equal, mine, theirs))


def written_by_ranks_of_different_speed(given: dict[str, Any]) -> bool:
    """Whether the fast rank reads what the slow one had to write into its shard."""
    from drivetrain_zero.gathering.handle import ShardedParameter

    engine, take_over = start(given), ShardedParameter._take_over

    def slowly(handle: ShardedParameter) -> None:
        time.sleep(0.3 * engine.job.rank)
        take_over(handle)

    parameter = next(iter(engine.module.parameters()))
    with patch.object(ShardedParameter, "_take_over", slowly):
        with drivetrain.whole(parameter, write_rank=0), torch.no_grad():
            parameter.fill_(3.0)
        with drivetrain.whole(parameter):
            found = bool((parameter == 3.0).all())
    engine.job.close()
    return found


def test_what_was_written_whole_is_there_when_the_fastest_rank_goes_on() -> None:
    given = config(3, {"device": "none"})
    assert run_distributed(written_by_ranks_of_different_speed, WORLD, given) == [True] * WORLD


def test_training_is_that_of_plain_torch() -> None:
    given = config(3, {"device": "cpu"}, gradient_accumulation_steps=2)
    assert_trains_like_reference(given, WORLD, model="gpt")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_parameters_are_offloaded_at_stage_3_alone(stage: int) -> None:
    section = {"stage": stage, "offload_param": {"device": "cpu"}}
    with pytest.raises(ConfigError, match=f"at stage 3 only, got stage {stage}"):
        Plan.build({"train_batch_size": 8, "zero_optimization": section}, world_size=1)

"""What cannot work is refused on every rank, by parameter, config path and remedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from drivetrain_zero.section import ZeroSection
from torch import nn
from zero_harness import Run, config, train_steps, whole_parameters
from zero_models import BODY, UNEVEN

import drivetrain
from drivetrain.contracts import BucketSpec, BucketView, Hyper, OptimizerPlan, StateSpec, UpdateRule
from drivetrain.errors import ConfigError
from drivetrain.plan.plan import Plan
from drivetrain.states.whole import whole
from drivetrain.testing import RanksFailedError, run_distributed

STAGES = (1, 2, 3)


def refused_on_all(function: Callable[..., object], world: int, *arguments: Any) -> list[str]:
    """The errors of every rank; each has its own, and none was waited for in vain."""
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(function, world, *arguments)
    errors = caught.value.errors
    assert sorted(errors) == list(range(world))
    return [errors[rank].error for rank in range(world)]


def plan(section: object, world: int) -> Plan:
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": section}
    return Plan.build(settings, world_size=world)


# -- the config ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"stage": 4}, ["zero_optimization.stage", "at most 3, got 4"]),
        ({"stage": -1}, ["zero_optimization.stage", "at least 0, got -1"]),
        ({"stage": "two"}, ["zero_optimization.stage"]),
        ({"stage": 1.5}, ["zero_optimization.stage"]),
        ({"stage": 1, "stagee": 2}, ["stagee"]),
        ({"stage": 1, "reduce_bucket_size": 0}, ["zero_optimization.reduce_bucket_size"]),
        ({"stage": 1, "reduce_bucket_size": -5}, ["zero_optimization.reduce_bucket_size"]),
        ({"stage": 1, "gradient_reduction": "never"}, ["zero_optimization.gradient_reduction"]),
        ({"stage": 1, "legacy_stage1": True}, ["legacy_stage1", "use stage 1"]),
        ({"stage": 2, "cpu_offload": True}, ["cpu_offload is offload_optimizer: {"]),
        ({"stage": 3, "cpu_offload_params": True}, ["cpu_offload_params is offload_param: {"]),
        ({"stage": 2, "zero_hpz_partition_size": 2}, ["zero_hpz_partition_size", "stage 3"]),
        ({"stage": 3, "mics_shard_size": 0}, ["mics_shard_size is 0", "-1 or at least 1"]),
        ({"stage": 3, "mics_shard_size": 3}, ["zero_optimization.mics_shard_size", "4"]),
        (
            {"stage": 3, "mics_shard_size": 2, "zero_hpz_partition_size": 2},
            ["mics_shard_size", "zero_hpz_partition_size"],
        ),
        ({"stage": 3, "zeropp_loco_param": {}}, ["zeropp_loco_param", "zero_quantized_gradients"]),
    ],
    ids=str,
)
def test_wrong_values_are_refused_by_their_path(section: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(section, 4)
    for words in said:
        assert words in str(caught.value)


@pytest.mark.parametrize("value", [True, False])
def test_a_bare_bool_is_stage_1_or_none(value: bool) -> None:
    assert ("zero_optimization" in plan(value, 2).hub.plugins) is value


def test_an_old_config_may_say_that_nothing_is_offloaded_and_use_an_old_name() -> None:
    old = {"cpu_offload": False, "stage3_gather_fp16_weights_on_model_save": True}
    section = plan({"stage": 3, **old}, 2).section(ZeroSection)
    assert section.stage3_gather_16bit_weights_on_model_save
    assert section == ZeroSection(stage=3, stage3_gather_16bit_weights_on_model_save=True)


@pytest.mark.parametrize("size", [2**62, 2**100])
@pytest.mark.parametrize(
    "key",
    [
        "reduce_bucket_size",
        "allgather_bucket_size",
        "stage3_prefetch_bucket_size",
        "stage3_max_live_parameters",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_max_reuse_distance",
    ],
)
def test_sizes_beyond_all_memory_are_limits_like_any_other(key: str, size: int) -> None:
    run = Run(config(3, zero={key: size, "overlap_comm": True}), BODY, steps=1)
    run_distributed(trains, 2, run)


def trains(run: Run) -> None:
    engine = run.engine()
    train_steps(run, engine, range(run.steps))
    engine.destroy()


# -- optimizers ------------------------------------------------------------------------------------


class TalkingRule(UpdateRule):
    """Communicates gradients by itself, as 1-bit optimizers do."""

    defaults: ClassVar[dict[str, Any]] = {"lr": 0.1}

    def states(self, bucket: BucketSpec) -> Sequence[StateSpec]:
        return []

    def wants_reduced(self, step: int) -> bool:
        return step < 3

    def update(self, bucket: BucketView, hyper: Hyper, scale: float | torch.Tensor) -> None:
        raise AssertionError("never reached")


def builds_with_a_rule_that_communicates(stage: int) -> None:
    from drivetrain_zero.policy import policy_of
    from drivetrain_zero.section import ZeroSection
    from drivetrain_zero.states import ZeroStates

    run = Run(config(stage), BODY)
    engine = run.engine()
    module = run.case.model()
    engine.job.parameters.register(module, reduction="data")
    groups = [{"params": list(module.parameters()), "lr": 0.1}]
    policy = policy_of(engine.job, engine.job.plan.section(ZeroSection))
    ZeroStates(engine.job, module, OptimizerPlan(TalkingRule(), groups), policy)


@pytest.mark.parametrize("stage", [1, 3])
def test_an_optimizer_that_needs_whole_gradients_is_refused(stage: int) -> None:
    for error in refused_on_all(builds_with_a_rule_that_communicates, 2, stage):
        assert "ConfigError: zero_optimization" in error
        assert "TalkingRule" in error
        assert "use stage 0, or another optimizer.type" in error


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_clients_optimizer_that_is_not_elementwise_is_refused(stage: int) -> None:
    for error in refused_on_all(trains, 2, Run(config(stage), BODY, optimizer=lbfgs)):
        assert "ConfigError" in error
        assert "LBFGS" in error


# -- parameters changed behind its back ------------------------------------------------------------


def changes_behind(run: Run, rank: int, name: str) -> None:
    engine = run.engine()
    train_steps(run, engine, range(1))
    parameter = dict(engine.module.named_parameters())[name]
    if engine.job.rank == rank:
        with torch.no_grad():
            parameter.data = torch.full(parameter.shape, 5.0)
    train_steps(run, engine, range(2))


def adds_behind(run: Run, rank: int, name: str) -> None:
    engine = run.engine()
    train_steps(run, engine, range(1))
    if engine.job.rank == rank:
        with torch.no_grad():
            dict(engine.module.named_parameters())[name].add_(1.0)
    train_steps(run, engine, range(2))


@pytest.mark.parametrize(
    ("stage", "rank", "change"),
    [(1, 0, changes_behind), (1, 1, adds_behind), (2, 1, changes_behind), (2, 0, adds_behind)],
)
def test_sanity_checks_find_changes_of_whole_parameters(
    stage: int, rank: int, change: Callable[..., None]
) -> None:
    run = Run(config(stage, zero={"enable_sanity_checks": True}), BODY)
    errors = refused_on_all(change, 2, run, rank, "head.weight")
    assert any("head.weight" in error and "whole(" in error for error in errors)


@pytest.mark.parametrize(
    ("rank", "change", "persistent", "said"),
    [
        pytest.param(0, changes_behind, 0, "parameter head.weight was changed", id="replaced"),
        pytest.param(1, adds_behind, 0, "unsupported operation", id="added to: torch refuses"),
        pytest.param(1, changes_behind, 10**6, "parameter head.weight was changed", id="kept"),
        pytest.param(0, adds_behind, 10**6, "parameter head.weight was changed", id="kept, added"),
    ],
)
def test_sanity_checks_find_changes_of_sharded_parameters(
    rank: int, change: Callable[..., None], persistent: int, said: str
) -> None:
    zero = {"enable_sanity_checks": True, "stage3_param_persistence_threshold": persistent}
    errors = refused_on_all(change, 2, Run(config(3, zero=zero), BODY), rank, "head.weight")
    assert any(said in error for error in errors)


def changes_in_forward(run: Run) -> None:
    engine = run.engine()

    def clip(module: nn.Module, _inputs: object) -> None:
        with torch.no_grad():
            module.weight.clamp_(-0.01, 0.01)

    engine.module.blocks[1].up.register_forward_pre_hook(clip)
    train_steps(run, engine, range(1))


@pytest.mark.parametrize("stage", [1, 3])
def test_sanity_checks_find_a_forward_that_changes_weights(stage: int) -> None:
    run = Run(config(stage, zero={"enable_sanity_checks": True}), BODY)
    errors = refused_on_all(changes_in_forward, 2, run)
    assert any("parameter blocks.1.up.weight was changed" in error for error in errors)


@pytest.mark.parametrize("stage", STAGES)
def test_sanity_checks_have_nothing_against_what_is_allowed(stage: int) -> None:
    run_distributed(
        changes_inside_whole, 2, Run(config(stage, zero={"enable_sanity_checks": True}), BODY)
    )


def changes_inside_whole(run: Run) -> None:
    engine = run.engine()
    train_steps(run, engine, range(2))
    with whole(engine.module.head, write_rank=0), torch.no_grad():
        engine.module.head.weight.fill_(0.25)
    engine.states.refresh()
    found = whole_parameters(engine)["head.weight"]
    assert torch.equal(found, torch.full_like(found, 0.25))
    train_steps(run, engine, range(2))
    engine.destroy()


# -- whole parameters ------------------------------------------------------------------------------


def writes_on_the_wrong_rank(run: Run, write_rank: int | None) -> None:
    engine = run.engine()
    with whole([engine.module.head.weight], write_rank=write_rank), torch.no_grad():
        if engine.job.rank == 1:
            engine.module.head.weight.zero_()
    train_steps(run, engine, range(1))


def test_a_change_on_the_wrong_rank_names_parameter_and_ranks() -> None:
    for error in refused_on_all(writes_on_the_wrong_rank, 2, Run(config(3), BODY), 0):
        assert "head.weight was changed on rank 1" in error
        assert "write_rank) is 0" in error


def test_a_change_without_a_rank_to_keep_it_is_refused() -> None:
    errors = refused_on_all(writes_on_the_wrong_rank, 2, Run(config(3), BODY), None)
    assert "head.weight was changed" in errors[1]
    assert "write_rank" in errors[1]


def resizes(run: Run) -> None:
    engine = run.engine()
    with whole([engine.module.head.weight], write_rank=0):
        engine.module.head.weight.data = torch.zeros(3, 3)


def test_a_resized_parameter_is_refused_with_both_shapes() -> None:
    for error in refused_on_all(resizes, 2, Run(config(3), BODY)):
        assert "head.weight has shape (3, 3)" in error
        assert "expected (8, 8)" in error


# -- parameters without gradients ------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 3])
def test_an_unused_parameter_is_an_error_where_that_is_asked_for(stage: int) -> None:
    run = Run(config(stage, zero={"ignore_unused_parameters": False}), UNEVEN)
    for error in refused_on_all(trains, 2, run):
        assert "parameter blocks.0.none got no gradient in this window, and 1 more" in error
        assert "zero_optimization.ignore_unused_parameters: true" in error


class OneSided(nn.Module):
    """Rank 1 does not use the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        x = self.first(x)
        return (self.second(x) if both else x).square().mean()


def uses_one_layer_on_rank_1(stage: int) -> None:
    settings = config(stage, zero={"ignore_unused_parameters": False})
    engine, *_ = drivetrain.initialize(model=OneSided(), config=settings)
    engine.backward(engine(torch.ones(2, 8), engine.job.rank == 0))
    engine.step()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_parameter_that_one_rank_does_not_use_ends_all_ranks(stage: int) -> None:
    errors = refused_on_all(uses_one_layer_on_rank_1, 2, stage)
    assert "second.weight got no gradient" in errors[1] or "second.bias" in errors[1]


# -- frozen behind its back ------------------------------------------------------------------------


def freezes_without_rebuild(run: Run) -> None:
    engine = run.engine()
    train_steps(run, engine, range(1))
    engine.module.head.weight.requires_grad_(False)
    train_steps(run, engine, range(2))


@pytest.mark.parametrize("stage", [1, 3])
def test_freezing_without_rebuild_names_the_call_that_is_missing(stage: int) -> None:
    for error in refused_on_all(freezes_without_rebuild, 2, Run(config(stage), BODY)):
        assert "head.weight was frozen" in error
        assert "engine.rebuild()" in error

"""Weights of experts in host memory, of which the device has those that were used last."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dense_experts import EXPERTS, WIDTH, Expert
from drivetrain_moe import GroupedMLP, MoE
from drivetrain_moe.cache import ModuleCache
from drivetrain_moe.exchange import _agreed
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.testing import run_distributed


def layer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    expert = GroupedMLP(EXPERTS, WIDTH, 8, bias=True) if kind == "grouped" else Expert()
    made = MoE(WIDTH, expert, EXPERTS, k=2, drop_tokens=False).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return made.eval()


def x_of(count: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)


def serving(module: nn.Module, **moe: Any) -> Any:
    job = drivetrain.Job.open(drivetrain.Plan.build({"train_batch_size": 2, "moe": moe}))
    return job, job.engine(module, parameters=())


@pytest.mark.parametrize("kind", ["modules", "grouped"])
@pytest.mark.parametrize("room", [1, 3])
def test_experts_that_take_turns_compute_what_all_of_them_do(kind: str, room: int) -> None:
    module = layer(kind)
    with torch.no_grad():
        expected = [module(x_of(count))[0] for count in (9, 1, 0)]
    job, engine = serving(module, cached_experts=room)
    assert not any("experts" in name for name, _ in engine.module.named_parameters())
    with job, torch.inference_mode():
        for count, wanted in zip((9, 1, 0), expected, strict=True):
            torch.testing.assert_close(engine(x_of(count))[0], wanted)
        cache = engine.module.cache
        assert cache.misses >= EXPERTS
        assert cache.copied_bytes == cache.misses * one_expert(kind)


def one_expert(kind: str) -> int:
    numbers = WIDTH * 8 * (3 if kind == "grouped" else 2) + 8 * (2 if kind == "grouped" else 1)
    return 8 * (numbers + WIDTH)


@pytest.mark.parametrize("kind", ["modules", "grouped"])
def test_a_model_that_is_served_again_has_all_its_experts_again(kind: str) -> None:
    module = layer(kind)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        expected = module(x_of())[0]
    for _ in range(2):
        job, engine = serving(module, cached_experts=2)
        with job, torch.inference_mode():
            torch.testing.assert_close(engine(x_of())[0], expected)
            assert engine.module.cache.misses >= EXPERTS
    assert module.cache is None
    assert module.state_dict().keys() == weights.keys()
    for name, value in module.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_what_was_used_longest_ago_gives_its_place_away() -> None:
    job, engine = serving(layer("modules"), cached_experts=2)
    with job:
        cache = engine.module.cache
        assert isinstance(cache, ModuleCache)
        run = cache.around(lambda _rows, _counts: pytest.fail("modules are called one by one"))
        for used, missed in (((0,), 1), ((1,), 2), ((0,), 2), ((2,), 3), ((0, 2), 3), ((1,), 4)):
            counts = torch.tensor([int(expert in used) for expert in range(EXPERTS)])
            run(x_of(len(used)), counts)
            assert cache.misses == missed, used
        run(x_of(EXPERTS), torch.ones(EXPERTS, dtype=torch.long))  # 1 and 2 are there
        assert (cache.hits, cache.misses) == (3 + 2, 4 + 2)


def test_weights_of_a_model_without_memory_go_to_the_host_one_part_at_a_time() -> None:
    module = layer("grouped")
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        expected = module(x_of())[0]
    empty = layer("grouped").to("meta")
    plan = drivetrain.Plan.build({"train_batch_size": 1, "moe": {"cached_experts": 2}})
    with drivetrain.Job.open(plan) as job, torch.inference_mode():
        engine = job.engine(empty, parameters=(), weights=weights)
        torch.testing.assert_close(engine(x_of())[0], expected)
        assert engine.module.experts.up.shape[0] == 2


def test_an_engine_that_trains_says_where_else_weights_may_lie() -> None:
    plan = drivetrain.Plan.build(
        {
            "train_batch_size": 1,
            "moe": {"cached_experts": 2},
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        }
    )
    with (
        drivetrain.Job.open(plan) as job,
        pytest.raises(ConfigError, match=r"moe.cached_experts is for engines that serve"),
    ):
        job.engine(layer("modules"))


def test_a_model_in_which_nothing_is_found_says_what_finds_experts() -> None:
    plan = drivetrain.Plan.build({"train_batch_size": 1, "moe": {"cached_experts": 2}})
    with (
        drivetrain.Job.open(plan) as job,
        pytest.raises(ConfigError, match=r"cached_experts is 2, .* set expert_parallel.enabled"),
    ):
        job.engine(nn.Linear(2, 2), parameters=())


# -- ranks that have the same tokens ---------------------------------------------------------------


def summed(kind: str) -> tuple[torch.Tensor, int, str]:
    module = layer(kind)
    job, engine = serving(module, cached_experts=1, ep_size=2)
    with job, torch.no_grad():
        module.way = replace(module.way, equal=True)  # as an engine that generates has it
        job.byte_log.reset()
        out = engine(x_of())[0]
        sent = job.byte_log.total(key=engine.module._name).payload_bytes
        try:
            engine(x_of() + job.rank)
            refused = ""
        except TrainingError as error:
            refused = str(error)
    plan = {"train_batch_size": 2, "moe": {"ep_size": 2}}
    with (
        drivetrain.Job.open(drivetrain.Plan.build(plan)) as again,
        pytest.raises(ConfigError, match=r"a part of its 4 experts.* over 2 ranks: build the"),
    ):
        again.engine(module, parameters=())
    return out, sent, refused


@pytest.mark.parametrize("kind", ["modules", "grouped"])
def test_ranks_with_the_same_tokens_sum_what_their_experts_compute(kind: str) -> None:
    module = layer(kind)
    with torch.no_grad():
        expected = module(x_of())[0]
    for out, sent, refused in run_distributed(summed, 2, kind):
        assert sent == 10 * WIDTH * 8  # 9 tokens, and a row that tells of them
        torch.testing.assert_close(out, expected)
        assert "have other tokens" in refused


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_tokens_that_are_not_finite_on_any_rank_are_no_others(value: float) -> None:
    axis: Any = SimpleNamespace(size=2, tag="a layer")
    x = torch.full((4, WIDTH), value)
    told = torch.zeros(1, WIDTH)
    told[0, :2] = x.sum()
    assert torch.equal(_agreed(torch.cat([x, told]), x, axis).isnan(), x.isnan())
    told[0, 1] = 0.0
    with pytest.raises(TrainingError, match="have other tokens in a layer"):
        _agreed(torch.cat([x, told]), torch.ones_like(x), axis)

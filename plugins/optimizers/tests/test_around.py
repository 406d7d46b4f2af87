"""Rules around any optimizer: an average of the weights, and Lookahead, against plain torch."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_optimizers.around import Lookahead, WeightAverage
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.engine.engine import Engine
from drivetrain.errors import TrainingError
from drivetrain.plan.registry import Registry
from drivetrain.testing import PluginConformance, run_distributed
from drivetrain.testing.sharded import ShardedStates

STEPS, DECAY, SYNC, ALPHA = 7, 0.6, 3, 0.25
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "AdamW": {"lr": 1e-2, "weight_decay": 0.1},
    # Hands biases to an Adam of its own.
    "Muon": {"lr": 0.02, "adam_lr": 1e-2},
}

Weights = dict[str, torch.Tensor]


class TestWeightAverage(PluginConformance):
    plugin = WeightAverage
    config = {"weight_average": {"decay": 0.9}}


class TestLookahead(PluginConformance):
    plugin = Lookahead
    config = {"lookahead": {"steps": 3}}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def loss_of(module: nn.Module, step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    inputs, targets = (torch.randn(4, n, generator=generator) for n in (5, 3))
    return (module(inputs.to(next(module.parameters()).dtype)).float() - targets).square().mean()


def make(optimizer: str, *, sharded: bool = False, **sections: Any) -> Engine:
    engine, *_ = drivetrain.initialize(
        model=model(),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 0.0,
            "optimizer": {"type": optimizer, "params": OPTIMIZERS[optimizer]},
            "plugins": {"sharded_states": True} if sharded else {},
            **sections,
        },
        registry=Registry.installed().with_plugins(ShardedStates),
    )
    return engine


def train(engine: Engine, steps: range) -> None:
    for step in steps:
        engine.backward(loss_of(engine, step, engine.job.rank))
        engine.step()


def weights(engine: Engine) -> Weights:
    return {n: p.detach().float().clone() for n, p in engine.module.named_parameters()}


def averaged(engine: Engine) -> Weights:
    """The averages; fails unless the weights are their own again after the block."""
    before = weights(engine)
    with engine.averaged_weights():
        found = weights(engine)
    assert all(torch.equal(value, before[name]) for name, value in weights(engine).items())
    return found


# -- functions that run on every rank --------------------------------------------------------------


def averages(optimizer: str, sharded: bool) -> tuple[Weights, Weights]:
    engine = make(optimizer, sharded=sharded, weight_average={"decay": DECAY})
    train(engine, range(4))
    averaged(engine)  # which changes nothing
    train(engine, range(4, STEPS))
    found = weights(engine), averaged(engine)
    engine.destroy()
    return found


def looked_ahead(optimizer: str, keys: dict[str, Any]) -> Weights:
    engine = make(optimizer, lookahead={"steps": SYNC, "alpha": ALPHA}, **keys)
    train(engine, range(STEPS))
    found = weights(engine)
    engine.destroy()
    return found


def both() -> tuple[Weights, Weights]:
    sections = {"lookahead": {"steps": SYNC}, "weight_average": {"decay": DECAY}}
    engine = make("SGD", **sections)
    train(engine, range(SYNC))
    found = weights(engine), averaged(engine)
    engine.destroy()
    return found


def averages_after_resuming(folder: str, save: bool, sharded: bool) -> Weights:
    engine = make("AdamW", sharded=sharded, weight_average={"decay": DECAY})
    if save:
        train(engine, range(4))
        engine.save_checkpoint(folder)
    else:
        engine.load_checkpoint(folder)
    found = averaged(engine)
    engine.destroy()
    return found


# -- references ------------------------------------------------------------------------------------


def plain(
    world: int, after: Callable[[int, nn.Module], None], optimizer: str, dtype: Any = torch.float64
) -> Weights:
    """Trained in one process; ``after`` sees the module after each update, counted from 1."""
    module = model().to(dtype)
    update = getattr(torch.optim, optimizer)(module.parameters(), **OPTIMIZERS[optimizer])
    for step in range(STEPS):
        update.zero_grad()
        sum(loss_of(module, step, rank) / world for rank in range(world)).backward()
        update.step()
        with torch.no_grad():
            after(step + 1, module)
    return {name: p.detach().float() for name, p in module.named_parameters()}


def close(found: Weights, expected: Weights) -> None:
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-6)


# -- claims ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "sharded"), [(1, False), (2, False), (3, True)])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_the_average_is_that_of_torch_and_training_is_what_it_was(
    optimizer: str, world: int, sharded: bool
) -> None:
    shadow: list[AveragedModel] = []

    def follow(step: int, module: nn.Module) -> None:
        if not shadow:
            shadow.append(AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(DECAY)))
        shadow[0].update_parameters(module)

    trained = plain(world, follow, optimizer)
    expected = {n: p.detach().float() for n, p in shadow[0].module.named_parameters()}
    for own, average in run_distributed(averages, world, optimizer, sharded):
        close(own, trained)
        close(average, expected)
    assert (expected["0.weight"] - trained["0.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_lookahead_is_the_algorithm_of_the_paper(optimizer: str) -> None:
    slow: Weights = {n: p.detach().double().clone() for n, p in model().named_parameters()}

    def sync(step: int, module: nn.Module) -> None:
        if step % SYNC == 0:
            for name, fast in module.named_parameters():
                slow[name] += ALPHA * (fast - slow[name])
                fast.copy_(slow[name])

    expected = plain(2, sync, optimizer)
    for found in run_distributed(looked_ahead, 2, optimizer, {}):
        close(found, expected)


def test_low_precision_parameters_follow_a_sync() -> None:
    bf16 = {"bf16": {"enabled": True}}
    (found,) = run_distributed(looked_ahead, 1, "SGD", bf16)
    slow: Weights = {n: p.detach().double().clone() for n, p in model().named_parameters()}

    def sync(step: int, module: nn.Module) -> None:
        if step % SYNC == 0:
            for name, fast in module.named_parameters():
                slow[name] += ALPHA * (fast - slow[name])
                fast.copy_(slow[name])

    expected = plain(1, sync, "SGD")
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name], rtol=2e-2, atol=1e-2)


def test_a_rule_that_hands_parameters_to_another_is_averaged_everywhere() -> None:
    own, average = run_distributed(averages, 1, "Muon", False)[0]
    for name, values in average.items():
        assert bool(torch.isfinite(values).all()), name
        assert not torch.equal(values, own[name]), name


def test_the_average_sees_weights_after_a_sync() -> None:
    own, average = run_distributed(both, 1)[0]
    reached: list[Weights] = []

    def sync(step: int, module: nn.Module) -> None:
        if step == SYNC:
            for name, fast in module.named_parameters():
                fast.lerp_(slow[name], 0.5)
        if step <= SYNC:
            reached.append({n: p.detach().clone() for n, p in module.named_parameters()})

    slow: Weights = {n: p.detach().double().clone() for n, p in model().named_parameters()}
    plain(1, sync, "SGD")
    expected = copy.deepcopy(reached[0])
    for later in reached[1:]:
        for name, values in expected.items():
            values.lerp_(later[name], 1 - DECAY)
    close(own, {name: values.float() for name, values in reached[-1].items()})
    close(average, {name: values.float() for name, values in expected.items()})


@pytest.mark.parametrize(("saved", "loaded"), [((3, True), (2, True)), ((2, True), (1, False))])
def test_averages_are_cut_anew_by_a_load_on_other_ranks(
    saved: tuple[int, bool], loaded: tuple[int, bool], tmp_path: Path
) -> None:
    first, *_ = run_distributed(averages_after_resuming, saved[0], str(tmp_path), True, saved[1])
    for found in run_distributed(
        averages_after_resuming, loaded[0], str(tmp_path), False, loaded[1]
    ):
        for name, values in found.items():
            assert torch.equal(values, first[name]), name


def without_an_average() -> str:
    engine = make("SGD")
    try:
        with engine.averaged_weights():
            pass
    except TrainingError as error:
        return str(error)
    finally:
        engine.destroy()
    return json.dumps(Ranks.current().rank)


def test_without_the_section_the_error_says_what_to_add() -> None:
    for message in run_distributed(without_an_average, 2):
        assert message == "there is no average: add the section weight_average to the config"

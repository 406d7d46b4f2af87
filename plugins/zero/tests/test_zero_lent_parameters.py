"""Engines read in place, and never train, what another engine keeps in shards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import drivetrain_zero
import pytest
import torch
from torch import nn
from zero_harness import IN_FORWARD, SGD, Stage, config

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.testing import run_distributed

EVERY_STAGE = pytest.mark.parametrize("stage", [1, 2, 3, IN_FORWARD])
SERVING = {"train_micro_batch_size_per_gpu": 2}


def layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)], nn.BatchNorm1d(6), nn.Linear(6, 2))


class Actor(nn.Module):
    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk, self.policy = trunk, nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.policy(self.trunk(x))
        return logits


class Critic(nn.Module):
    """Values by the trunk of an actor and layers of its own."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = self.head(self.trunk(x))
        return value


def networks() -> tuple[Actor, Critic]:
    trunk = layers()
    return Actor(trunk), Critic(trunk)


def inputs(step: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step))  # on all ranks


def engine_of(module: nn.Module, stage: Stage, **changes: Any) -> Engine:
    settings = config(stage, **{"optimizer": SGD, **changes})
    return drivetrain.initialize(model=module, config=settings)[0]


def reader_of(module: nn.Module, owner: Engine, place: str) -> Engine:
    """An engine without optimizer over what ``owner`` trains."""
    if place == "same job":
        return owner.job.engine(module, parameters=())
    zero = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    settings = {**SERVING, **(zero if place == "other job, sharded" else {})}
    return drivetrain.initialize(model=module, config=settings)[0]


@contextmanager
def closing(*engines: Engine) -> Iterator[None]:
    yield
    for engine in engines:
        engine.destroy()
    for job in dict.fromkeys(engine.job for engine in engines):
        job.close()


def train(engine: Engine, step: int) -> None:
    engine.backward(engine(inputs(step)).square().mean())
    engine.step()


def plain_step(module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    module(inputs(step)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, **SGD["params"])


def assert_same(module: nn.Module, plain: nn.Module) -> None:
    with drivetrain.whole(module):
        for (name, found), expected in zip(
            module.named_parameters(), plain.parameters(), strict=True
        ):
            torch.testing.assert_close(found, expected, msg=lambda m, name=name: f"{name}: {m}")


# -- functions that run on every rank --------------------------------------------------------------


def read_what_is_trained(stage: Stage, place: str) -> None:
    module, plain = layers(), layers()
    optimizer = sgd(plain.parameters())
    owner = engine_of(module, stage)
    before = {p: id(p) for p in module.parameters()}
    reader = reader_of(module, owner, place)
    assert reader.optimizer is None
    with closing(reader, owner):
        for step in range(3):
            train(owner, step)
            plain_step(plain, optimizer, step)
            with torch.no_grad():
                buffers = copy.deepcopy(dict(plain.named_buffers()))
                torch.testing.assert_close(reader(inputs(9)), plain(inputs(9)))
            assert [*map(str, buffers)] == [name for name, _ in module.named_buffers()]
            loss = owner(inputs(step)).square().mean()  # a forward of the reader lies between
            with torch.no_grad():
                reader(inputs(8))
            owner.backward(loss)
            owner.zero_grad()
            plain(inputs(step))
            plain(inputs(8))
        assert {p: id(p) for p in module.parameters()} == before
        assert_same(reader.module, plain)
        state = reader.module_state_dict()
        assert all(torch.isfinite(value.float()).all() for value in state.values())
        reader.destroy()
        train(owner, 3)
        plain_step(plain, optimizer, 3)
        assert_same(module, plain)


def share_a_trunk(stage: Stage, other: Stage, *, joint: bool) -> None:
    """The critic's engine trains its own layers; gradients of a trunk are its owner's."""
    actor, critic = networks()
    plain = copy.deepcopy((actor, critic))
    optimizers = sgd(plain[0].parameters()), sgd(plain[1].head.parameters())
    owner = engine_of(actor, stage)
    settings = config(other, optimizer=SGD)
    second, *_ = drivetrain.initialize(
        model=critic, model_parameters=critic.head.parameters(), config=settings
    )
    with closing(second, owner):
        for step in range(3):
            losses = [engine(inputs(step)).square().mean() for engine in (owner, second)]
            if not joint:
                losses[1] = second.head(second.trunk(inputs(step)).detach()).square().mean()
            owner.backward(losses[0])
            second.backward(losses[1])
            owner.step()
            second.step()
            of_actor, of_critic = (module(inputs(step)).square().mean() for module in plain)
            if not joint:
                with torch.no_grad():
                    features = plain[1].trunk(inputs(step))
                of_critic = plain[1].head(features).square().mean()
            (of_actor + of_critic).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert_same(actor, plain[0])
        assert_same(critic, plain[1])
        assert second.optimizer is not None
        second.optimizer.param_groups[0]["params"] += list(critic.trunk.parameters())
        with pytest.raises(ConfigError, match=r"parameter trunk\.0\.weight is kept by another"):
            second.rebuild()


def save_a_reader(folder: str) -> None:
    actor, critic = networks()
    owner = engine_of(actor, 3)
    train(owner, 0)
    second, *_ = drivetrain.initialize(
        model=critic,
        model_parameters=critic.head.parameters(),
        config=config(3, optimizer=SGD),
    )
    train(second, 1)
    owner.zero_grad()
    with closing(second, owner):
        expected = {name: value.clone() for name, value in second.module_state_dict().items()}
        second.save_checkpoint(folder)
        train(second, 2)
        train(owner, 2)
        trunk = {n: v.clone() for n, v in owner.module_state_dict().items() if "trunk" in n}
        second.load_checkpoint(folder)
        found = second.module_state_dict()
        for name, value in expected.items():
            wanted = trunk[name] if "trunk" in name else value
            torch.testing.assert_close(found[name], wanted, msg=lambda m, name=name: f"{name}: {m}")
        alone = Critic(layers(1))
        third, *_ = drivetrain.initialize(model=alone, config=SERVING)
        with closing(third):
            third.load_checkpoint(folder, load_module_only=True)
            for name, value in third.module_state_dict().items():
                torch.testing.assert_close(value, expected[name])


def destroy_the_owner_first(stage: Stage) -> None:
    module = layers()
    plan = Plan.build(config(stage, optimizer=SGD), world_size=2)
    with Job.open(plan) as job, torch.no_grad():
        owner = job.engine(module)
        reader = job.engine(module, parameters=())
        expected = layers().eval()(inputs(1))
        owner.destroy()
        reader.eval()
        if stage == 2:
            torch.testing.assert_close(reader(inputs(1)), expected)
        else:
            with pytest.raises(TrainingError, match=r"parameter 0\.weight was kept in shards"):
                reader(inputs(1))
            with pytest.raises(TrainingError, match="was kept in shards"):
                reader.states.fragments()
            with drivetrain.whole(module):
                torch.testing.assert_close(module(inputs(1)), expected)
        again = job.engine(module)  # keeps them from now on
        torch.testing.assert_close(reader(inputs(1)), expected)
        reader.destroy()
        again.destroy()


def lend_an_initialised_module() -> None:
    with drivetrain_zero.Init():
        module = layers()
    owner = engine_of(module, 3)
    reader = reader_of(module, owner, "other job, sharded")
    with closing(reader, owner), torch.no_grad():
        torch.testing.assert_close(reader(inputs(1)), layers()(inputs(1)))


def write_through_a_reader(stage: Stage) -> None:
    module, plain = layers(), layers()
    owner = engine_of(module, stage, bf16={"enabled": False})
    reader = reader_of(module, owner, "other job")
    optimizer = sgd(plain.parameters())
    with closing(reader, owner):
        reader.load_module_state_dict(layers(5).state_dict())
        plain.load_state_dict(layers(5).state_dict())
        train(owner, 0)
        plain_step(plain, optimizer, 0)
        assert_same(module, plain)


def train_twice(stage: Stage) -> str:
    module = layers()
    first = engine_of(module, stage)
    outer = nn.Sequential(nn.Linear(6, 6), module)
    with closing(first), pytest.raises(ConfigError) as refused:
        engine_of(outer, stage)
    return str(refused.value)


def share_a_parameter() -> None:
    module = layers()
    first = engine_of(module, 3)
    tied = nn.Linear(6, 6)
    tied.weight = module[0].weight
    with closing(first):
        with pytest.raises(ConfigError, match=r"parameter weight is kept in shards by another"):
            drivetrain.initialize(model=tied, config=SERVING)
        with pytest.raises(ConfigError, match=r"0\.weight is lent by .* in torch\.float32, but"):
            drivetrain.initialize(model=module, config={**SERVING, "bf16": {"enabled": True}})
        assert module[3].running_mean.dtype is torch.float32


# -- claims ----------------------------------------------------------------------------------------


@EVERY_STAGE
@pytest.mark.parametrize("place", ["same job", "other job", "other job, sharded"])
def test_an_engine_reads_what_another_trains(stage: Stage, place: str) -> None:
    run_distributed(read_what_is_trained, 2, stage, place)


@pytest.mark.parametrize(("stage", "other"), [(1, 3), (3, 1), (3, 3), (IN_FORWARD, 3)])
@pytest.mark.parametrize("joint", [False, True], ids=["detached", "joint"])
def test_an_engine_trains_its_own_layers_on_a_lent_trunk(
    stage: Stage, other: Stage, joint: bool
) -> None:
    run_distributed(_share, 2, stage, other, joint)


def _share(stage: Stage, other: Stage, joint: bool) -> None:
    share_a_trunk(stage, other, joint=joint)


def test_a_checkpoint_has_what_is_lent_and_a_load_leaves_it_alone(tmp_path: Path) -> None:
    run_distributed(save_a_reader, 2, str(tmp_path))


@pytest.mark.parametrize("stage", [2, 3])
def test_once_the_owner_is_gone_a_reader_says_what_it_cannot_read(stage: Stage) -> None:
    run_distributed(destroy_the_owner_first, 2, stage)


def test_a_module_made_in_shards_is_lent() -> None:
    run_distributed(lend_an_initialised_module, 2)


@EVERY_STAGE
def test_weights_loaded_through_a_reader_are_the_owners(stage: Stage) -> None:
    run_distributed(write_through_a_reader, 2, stage)


@pytest.mark.parametrize("stage", [1, 3])
def test_each_rank_is_told_which_parameter_another_engine_trains(stage: Stage) -> None:
    for message in run_distributed(train_twice, 2, stage):
        assert "parameter 1.0.weight is kept by another engine (number 0 of another job" in message
        assert "call destroy() on that engine first" in message


def test_what_nothing_would_gather_or_cast_is_refused_by_name() -> None:
    run_distributed(share_a_parameter, 2)

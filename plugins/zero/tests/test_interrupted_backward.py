"""A backward or forward that dies, and gradients without one: the numbers of plain torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.errors import TrainingError
from drivetrain.testing import run_distributed

WIDTH, RATE = 6, 0.1
PLANTED: dict[str, type[BaseException] | None] = {"forward": None, "backward": None}


class Tripwire(torch.autograd.Function):
    """The identity; its backward raises what is planted."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        if PLANTED["forward"] is not None:
            raise PLANTED["forward"]("planted")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        if PLANTED["backward"] is not None:
            raise PLANTED["backward"]("planted")
        return gradient


class Block(nn.Module):
    def __init__(self, trips: bool) -> None:
        super().__init__()
        self.trips = trips
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.tanh(self.a(x))
        return x + self.b(Tripwire.apply(inner) if self.trips else inner)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(number == 1) for number in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def seeded() -> nn.Module:
    torch.manual_seed(3)
    return Net()


def engine_of(stage: int, shared_memory: bool, **changes: Any) -> Engine:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": RATE}},
        "steps_per_print": 0,
        **({"cpu": {"shared_memory": shared_memory}} if find_spec("drivetrain_cpu") else {}),
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **changes,
    }
    return drivetrain.initialize(model=seeded(), config=config)[0]


def batch(step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, WIDTH, generator=generator)


def fails(place: str, error: type[BaseException], action: Callable[[], object]) -> None:
    PLANTED[place] = error
    try:
        with pytest.raises(error, match="planted"):
            action()
    finally:
        PLANTED[place] = None


def loss_of(module: nn.Module, step: int, rank: int) -> torch.Tensor:
    return module(batch(step, rank)).square().mean()


def dies(engine: Engine, place: str, error: type[BaseException], drops: bool) -> None:
    """Steps 0 and 2 go well; what is done of step 1 dies, and is dropped or not."""
    reference = seeded()
    optimizer = torch.optim.SGD(reference.parameters(), lr=RATE)
    rank, ranks = engine.job.rank, engine.job.world_size
    for step in range(3):
        if step == 1:
            fails(place, error, lambda: engine.backward(loss_of(engine, 1, rank)))
            for each in range(ranks):
                fails(
                    place, error, lambda each=each: (loss_of(reference, 1, each) / ranks).backward()
                )
            if drops:
                engine.zero_grad()
                # After a forward the last unit is kept for the backward that is to come.
                assert place == "forward" or not whole_units(engine)
                optimizer.zero_grad()
            continue
        engine.backward(loss_of(engine, step, rank))
        engine.step()
        for each in range(ranks):
            (loss_of(reference, step, each) / ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
        found = engine.module_state_dict()
        for name, wanted in reference.state_dict().items():
            torch.testing.assert_close(found[name], wanted)


def whole_units(engine: Engine) -> list[str]:
    gathering = getattr(engine.states, "_gathering", None)
    units = [] if gathering is None else gathering.units
    return [unit.name for unit in units if unit.is_whole and unit.parameters]


DEATHS: list[tuple[str, type[BaseException], bool]] = [
    ("backward", ZeroDivisionError, True),
    ("backward", KeyboardInterrupt, False),
    ("forward", ZeroDivisionError, True),
]


def dies_in_every_way(world: int) -> None:
    for shared_memory in (True, False) if world > 1 else (True,):
        for stage in (0, 1, 2, 3):
            for place, error, drops in DEATHS:
                engine = engine_of(stage, shared_memory)
                dies(engine, place, error, drops)
                engine.destroy()
                engine.job.close()


@pytest.mark.parametrize("world", [1, 2])
def test_training_goes_on_as_in_plain_torch_after_a_pass_that_died(world: int) -> None:
    run_distributed(dies_in_every_way, world, world)


def unscaled_after_a_death(way: str) -> None:
    engine = engine_of(0, True, fp16={"enabled": True, "initial_scale_power": 4})

    def loss() -> torch.Tensor:
        return engine(batch(0, 0).half()).float().square().mean()

    def backward() -> object:
        if way == "engine.backward":
            return engine.backward(loss())
        return engine.scale(loss()).backward()

    fails("backward", ZeroDivisionError, backward)
    with pytest.raises(TrainingError, match="without loss scaling"):
        loss().backward()
    engine.zero_grad()
    backward()
    with pytest.raises(TrainingError, match="without loss scaling"):
        loss().backward()  # in the same window
    engine.step()
    assert engine.was_step_applied()


@pytest.mark.parametrize("way", ["engine.backward", "engine.scale"])
def test_losses_without_scale_are_refused_after_a_pass_that_died(way: str) -> None:
    run_distributed(unscaled_after_a_death, 1, way)


# -- gradients without a backward -----------------------------------------------------------------


def assigns(engine: Engine, sets: Callable[[int, int], bool], accumulation: int) -> None:
    """``.grad`` is set, of other values on each rank, or on some ranks only."""
    reference = seeded()
    optimizer = torch.optim.SGD(reference.parameters(), lr=RATE)
    rank, ranks = engine.job.rank, engine.job.world_size

    def value(each: int, step: int, micro: int) -> float:
        return 1.0 + each + 10 * step + 3 * micro

    for step in range(3):
        optimizer.zero_grad()
        for parameter in reference.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for micro in range(accumulation):
            for parameter in engine.module.parameters() if sets(step, rank) else ():
                parameter.grad = torch.full(parameter.shape, value(rank, step, micro))
            if not sets(step, rank):
                engine.backward(loss_of(engine, step, rank))
            engine.step()
            for each in range(ranks):
                if sets(step, each):
                    for parameter in reference.parameters():
                        parameter.grad += value(each, step, micro) / ranks / accumulation
                else:
                    (loss_of(reference, step, each) / ranks / accumulation).backward()
        optimizer.step()
        found = engine.module_state_dict()
        for name, wanted in reference.state_dict().items():
            torch.testing.assert_close(found[name], wanted)
    assert all(parameter.grad is None for parameter in engine.module.parameters())


def assigns_in_every_way() -> None:
    for shared_memory in (True, False):
        for stage in (0, 1, 2, 3):
            for accumulation in (1, 2) if shared_memory else (1,):
                for sets in (lambda _step, _rank: True, lambda step, _rank: step == 1):
                    engine = engine_of(
                        stage, shared_memory, gradient_accumulation_steps=accumulation
                    )
                    assigns(engine, sets, accumulation)
                    engine.job.close()
            if stage < 3:  # there, ranks have to walk through the model alike
                engine = engine_of(stage, shared_memory)
                assigns(engine, lambda step, rank: step == 1 and rank == 1, 1)
                engine.job.close()


def test_gradients_that_are_assigned_are_terms_of_the_mean() -> None:
    run_distributed(assigns_in_every_way, 2)


def refuses_what_is_not_known() -> None:
    for stage in (0, 1, 2, 3):
        engine = engine_of(stage, True)
        engine.backward(loss_of(engine, 0, engine.job.rank))
        first = next(engine.module.parameters())
        first.grad = torch.zeros(first.shape)
        with pytest.raises(TrainingError, match=r"blocks\.0\.a\.weight was given a \.grad after"):
            engine.step()
        engine.zero_grad()
        assert first.grad is None
        engine.job.close()
    engine = engine_of(0, True, fp16={"enabled": True})
    first = next(engine.module.parameters())
    first.grad = torch.zeros(first.shape, dtype=torch.float16)
    with pytest.raises(TrainingError, match=r"given a \.grad while losses are scaled"):
        engine.step()


def test_gradients_that_are_assigned_twice_or_without_scale_are_refused_by_name() -> None:
    run_distributed(refuses_what_is_not_known, 2)

"""Engines have the methods that installed packages offer them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.plan import known
from drivetrain.plan.registry import Registry
from drivetrain.testing.models import MLP


def count_steps(engine: Engine, plus: int = 0) -> int:
    """How many there were."""
    return engine.global_steps + plus


class WithOwn(MLP):
    def own(self) -> str:
        return "the module's"


@pytest.fixture
def engine() -> Iterator[Engine]:
    registry = Registry.installed().choosing({})
    registry.add("methods", "count_steps", count_steps)
    registry.add("methods", "own", count_steps)
    registry.add("methods", "step", count_steps)
    config = {"train_batch_size": 1, "accelerator": "cpu"}
    made, *_ = drivetrain.initialize(model=WithOwn(), config=config, registry=registry)
    yield made
    made.destroy()


def test_a_function_of_a_package_is_a_method(engine: Engine) -> None:
    assert engine.count_steps() == 0
    assert engine.count_steps(plus=2) == 2
    assert engine.count_steps.__doc__ == "How many there were."


def test_what_engine_and_module_have_goes_first(engine: Engine) -> None:
    assert engine.own() == "the module's"
    assert engine.step.__func__ is Engine.step


def test_what_nobody_has_is_an_attribute_error_of_both(engine: Engine) -> None:
    assert not hasattr(engine, "no_such_thing")
    message = "neither the engine nor its module WithOwn has an attribute 'no_such_thing'$"
    with pytest.raises(AttributeError, match=message) as caught:
        engine.no_such_thing  # noqa: B018 - it is the access that raises
    assert caught.value.name == "no_such_thing"
    assert caught.value.obj is engine


def test_what_deepspeeds_engine_has_is_answered_with_what_to_use(engine: Engine) -> None:
    message = (
        "neither the engine nor its module WithOwn has an attribute 'global_rank'; "
        "in its place: engine.job.rank$"
    )
    with pytest.raises(AttributeError, match=message):
        engine.global_rank  # noqa: B018


def test_no_engine_has_what_the_table_says_that_it_lacks(engine: Engine) -> None:
    methods = set(Registry.installed().names("methods"))
    lacking = [name for name in known.ENGINE if name not in methods]
    assert lacking
    assert [name for name in lacking if hasattr(engine, name)] == []


def test_what_the_table_says_to_use_exists() -> None:
    module = MLP()
    engine, *_ = drivetrain.initialize(
        model=module,
        config={
            "train_batch_size": 1,
            "optimizer": {"type": "SGD"},
            "scheduler": {"type": "WarmupLR"},
        },
    )
    engine.backward(engine(torch.ones(1, 8), torch.ones(1, 8)))
    engine.step()
    elsewhere = {"save_16bit_model"}  # of another package, as the table says
    for text in known.ENGINE.values():
        for path in re.findall(r"engine((?:\.\w+)+)", text):
            found: object = engine
            for name in path.split(".")[1:]:
                if name not in elsewhere:
                    assert hasattr(found, name), text
                    found = getattr(found, name)
    engine.destroy()


def test_an_engine_that_is_being_made_asks_nobody() -> None:
    with pytest.raises(AttributeError, match="job"):
        Engine.__new__(Engine).job  # noqa: B018

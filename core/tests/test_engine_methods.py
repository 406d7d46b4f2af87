"""Engines have the methods that installed packages offer them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest

import drivetrain
from drivetrain.engine import Engine
from drivetrain.registry import Registry
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


def test_what_nobody_has_is_an_attribute_error(engine: Engine) -> None:
    assert not hasattr(engine, "no_such_thing")
    with pytest.raises(AttributeError, match="'WithOwn' object has no attribute 'no_such_thing'"):
        engine.no_such_thing  # noqa: B018 - it is the access that raises


def test_an_engine_that_is_being_made_asks_nobody() -> None:
    with pytest.raises(AttributeError, match="job"):
        copy.copy(Engine.__new__(Engine)).job  # noqa: B018

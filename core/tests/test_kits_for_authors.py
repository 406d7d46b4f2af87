"""The kits for optimizers and for plugins' state pass what is right, and catch what is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch

from drivetrain.contracts import (
    BucketSpec,
    BucketView,
    Hyper,
    Plugin,
    StateReader,
    StateSpec,
    StateWriter,
    UpdateRule,
    WrappedRule,
    hookimpl,
)
from drivetrain.engine.engine import Engine
from drivetrain.optimization.spans import spans
from drivetrain.optimization.torch_rule import TorchRule
from drivetrain.testing import OptimizerConformance, StateConformance

# -- update rules ----------------------------------------------------------------------------------


class Momentum(UpdateRule):
    """Gradient descent with momentum, which is right."""

    def __init__(self) -> None:
        self.defaults = {"lr": 0.1, "momentum": 0.9}

    def states(self, bucket: BucketSpec) -> list[StateSpec]:
        return [StateSpec("momentum_buffer")]

    def update(self, bucket: BucketView, hyper: Hyper, scale: Any) -> None:
        for span in spans(bucket, ["momentum_buffer"], scale, torch.float32, 10):
            momentum = span.states["momentum_buffer"]
            momentum.mul_(hyper["momentum"]).add_(span.gradient)
            span.weights.sub_(momentum, alpha=hyper["lr"])


class IgnoresTheScale(Momentum):
    def update(self, bucket: BucketView, hyper: Hyper, scale: Any) -> None:
        super().update(bucket, hyper, 1.0)


class ForgetsLowPrecision(Momentum):
    def update(self, bucket: BucketView, hyper: Hyper, scale: Any) -> None:
        bucket.out = None
        super().update(bucket, hyper, scale)


class CouplesElements(Momentum):
    def update(self, bucket: BucketView, hyper: Hyper, scale: Any) -> None:
        bucket.gradient.div_(bucket.gradient.norm())
        super().update(bucket, hyper, 1.0)


class RemembersByItself(Momentum):
    def __init__(self) -> None:
        super().__init__()
        self.updates = 0

    def update(self, bucket: BucketView, hyper: Hyper, scale: Any) -> None:
        self.updates += 1
        super().update(bucket, {**hyper, "lr": hyper["lr"] / self.updates}, scale)


class MovesPadding(Momentum):
    def update(self, bucket: BucketView, hyper: Hyper, scale: Any) -> None:
        bucket.weights.add_(1.0)


KINDS: dict[str, Callable[[], UpdateRule]] = {
    "right": Momentum,
    "wrapped": lambda: WrappedRule(Momentum()),
    "torch": lambda: TorchRule(torch.optim.AdamW, {"lr": 0.1}),
}


def failures(kit: object) -> list[str]:
    failed = []
    for name in sorted(name for name in dir(kit) if name.startswith("test_")):
        try:
            getattr(kit, name)()
        except Exception:  # noqa: BLE001 - any failure of a check is its outcome
            failed.append(name)
    return failed


def rule_kit(make: Callable[[], UpdateRule]) -> OptimizerConformance:
    return type("Kit", (OptimizerConformance,), {"rule": lambda self: make()})()


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_that_is_right_passes(kind: str) -> None:
    assert failures(rule_kit(KINDS[kind])) == []


@pytest.mark.parametrize(
    ("make", "caught_by"),
    [
        (IgnoresTheScale, "test_the_scale_is_part_of_the_gradient"),
        (ForgetsLowPrecision, "test_low_precision_parameters_are_rounded_masters"),
        (CouplesElements, "test_a_bucket_may_be_cut_anywhere"),
        (RemembersByItself, "test_an_update_changes_weights_and_declared_states_only"),
        (RemembersByItself, "test_states_and_the_step_are_all_that_a_rule_remembers"),
        (MovesPadding, "test_an_update_changes_weights_and_declared_states_only"),
    ],
)
def test_a_wrong_rule_is_caught(make: Callable[[], UpdateRule], caught_by: str) -> None:
    assert caught_by in failures(rule_kit(make))


# -- state of plugins ------------------------------------------------------------------------------

_counts: WeakKeyDictionary[Engine, dict[str, int]] = WeakKeyDictionary()


class Counting(Plugin):
    """Counts steps, and on each rank something of its own; this one is right."""

    name = "counting"

    def counts(self, engine: Engine) -> dict[str, int]:
        return _counts.setdefault(engine, {"steps": 0, "own": engine.job.rank})

    @hookimpl
    def step_end(self, engine: Engine) -> None:
        counts = self.counts(engine)
        counts["steps"] += 1
        counts["own"] += counts["steps"]

    @hookimpl
    def save_state(self, engine: Engine, writer: StateWriter) -> None:
        counts = self.counts(engine)
        writer.put("counting/steps", counts["steps"])
        writer.put("counting/own", counts["own"], per_rank=True)

    @hookimpl
    def load_state(self, engine: Engine, reader: StateReader) -> None:
        counts = self.counts(engine)
        counts["steps"] = reader.get("counting/steps", 0)
        counts["own"] = reader.get("counting/own", engine.job.rank)


class LoadsNothing(Counting):
    @hookimpl
    def load_state(self, engine: Engine, reader: StateReader) -> None:
        self.counts(engine)


class TakesItsOwnForAll(Counting):
    @hookimpl
    def save_state(self, engine: Engine, writer: StateWriter) -> None:
        writer.put("counting/steps", self.counts(engine)["steps"])
        writer.put("counting/own", self.counts(engine)["own"])


class NeedsItsState(Counting):
    @hookimpl
    def load_state(self, engine: Engine, reader: StateReader) -> None:
        super().load_state(engine, reader)
        _ = reader.get("counting/steps") + 0


class StandsStill(Counting):
    @hookimpl
    def step_end(self, engine: Engine) -> None:
        self.counts(engine)


def state_kit(plugin: type[Plugin]) -> StateConformance:
    attributes = {"plugin": plugin, "config": {"plugins": {"counting": True}}}
    return type("Kit", (StateConformance,), attributes)()


def test_a_plugin_whose_state_is_complete_passes() -> None:
    assert failures(state_kit(Counting)) == []


@pytest.mark.parametrize(
    ("plugin", "caught_by"),
    [
        (LoadsNothing, "test_a_load_brings_back_what_was_saved"),
        (TakesItsOwnForAll, "test_a_load_brings_back_what_was_saved"),
        (NeedsItsState, "test_a_checkpoint_without_the_state_loads"),
        (StandsStill, "test_training_changes_the_state"),
    ],
)
def test_state_that_would_be_lost_is_caught(plugin: type[Plugin], caught_by: str) -> None:
    with pytest.raises(Exception, match=r".") as caught:
        getattr(state_kit(plugin), caught_by)()
    assert caught.type.__name__ in ("AssertionError", "RanksFailedError")

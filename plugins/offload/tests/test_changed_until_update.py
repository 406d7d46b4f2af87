"""What clients change between reduction and update counts, whatever a home has copied by then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from drivetrain_kernels.rules import FusedAdam, FusedSGD
from drivetrain_offload.homes.host import HostHome
from drivetrain_offload.host.side import HostSide
from drivetrain_offload.zenflow_section import ZenFlow
from offload_harness import adopt, on_device, opened, place, spec_of, states, values

from drivetrain.contracts import StateHome

NOW = ZenFlow(topk_ratio=0.3, update_interval=1, full_warm_up_rounds=0)
HOMES: dict[str, tuple[str, ZenFlow | None, dict[str, Any]]] = {
    "device": ("bf16", None, {"device": "none"}),
    "away": ("bf16", None, {}),
    "away, own masters": ("fp32", None, {}),
    "split": ("bf16", None, {"ratio": 0.5}),
    "late": ("bf16", None, {"delayed_update": True}),
    "guessing": ("bf16", None, {"super_offload": True}),
    "guessing, own masters": ("fp32", None, {"super_offload": True}),
    "by importance": ("bf16", NOW, {}),
}


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let host homes do what they do for a device with memory of its own."""
    monkeypatch.setattr(HostSide, "is_near", lambda self, device: False)


def in_place(gradient: torch.Tensor) -> None:
    gradient[3:40].zero_()


def through_a_view(gradient: torch.Tensor) -> None:
    gradient.detach().reshape(-1)[3:40].zero_()


def only_the_last(gradient: torch.Tensor) -> None:
    gradient.narrow(0, gradient.numel() - 5, 5).mul_(-3.0)


CHANGES: list[Callable[[torch.Tensor], None]] = [in_place, through_a_view, only_the_last]


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize("name", HOMES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_gradient_changed_after_it_was_ready_is_the_one_that_is_used(
    name: str, change: Callable[[torch.Tensor], None]
) -> None:
    precision, zenflow, section = HOMES[name]
    rule = FusedAdam(lr=1e-2)
    spec = spec_of(rule, precision)
    other, expected = on_device(spec)
    with opened() as job:
        (home,) = place(job, [spec], zenflow, **section)
        make_lanes(home)
        parameters = adopt(home)
        for number in range(4):
            gradient = values(spec, number, spec.gradient_dtype)
            home.gradient_ready(gradient)
            wait_for_early_work(home)
            change(gradient)
            other.update(gradient.clone(), rule.defaults, 0.5)
            home.update(gradient, rule.defaults, 0.5)
            home.publish()
        mine, theirs = states(home), states(other)
        for key, value in theirs.items():
            # Rounding differs where each gradient is added up with others in float32 first.
            torch.testing.assert_close(mine[key], value, rtol=1e-5, atol=1e-6)
        if "late" not in name and zenflow is None:
            assert torch.equal(parameters, expected)


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize("name", [name for name, (dtype, *_) in HOMES.items() if dtype == "fp32"])
def test_parameters_changed_before_the_update_are_those_that_are_updated(name: str) -> None:
    precision, zenflow, section = HOMES[name]
    rule = FusedSGD(lr=1.0)
    spec = spec_of(rule, precision)
    with opened() as job:
        (home,) = place(job, [spec], zenflow, **section)
        make_lanes(home)
        parameters = adopt(home)
        for number in range(4):
            gradient = values(spec, number)
            home.gradient_ready(gradient)
            wait_for_early_work(home)
            parameters.data.mul_(0.9)  # weight decay by hand, of which no version tells
            expected = parameters - 0.5 * gradient
            home.update(gradient, rule.defaults, 0.5)
            home.publish()
            torch.testing.assert_close(parameters, expected)


def make_lanes(home: StateHome) -> None:
    """As large as for a device; on a CPU they are not made."""
    for part in (home, getattr(home, "rest", None)):
        if isinstance(part, HostHome):
            part.side.reserve(4 * part.spec.numel, 4 * part.spec.numel, 0)


def wait_for_early_work(home: StateHome) -> None:
    for part in (home, getattr(home, "rest", None)):
        if isinstance(part, HostHome):
            part.side.worker.drain()

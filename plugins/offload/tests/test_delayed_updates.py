"""Updates that are computed while the device takes the next step: one step late, and never lost."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_kernels.rules import FusedAdam, FusedSGD
from offload_harness import adopt, config, on_device, opened, place, spec_of, states, step, values
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError
from drivetrain.plan.plan import Plan
from drivetrain.testing import models, run_distributed
from drivetrain.testing.data import vectors

PLAIN = {"fused": False, "foreach": False}  # so that both sides run one kernel
STEPS = 8


class Slow(FusedSGD):
    """Waits for permission, so that what happens meanwhile can be looked at."""

    def __init__(self) -> None:
        super().__init__(lr=1.0)
        self.may_go = threading.Event()

    def update(self, bucket: Any, hyper: Any, scale: Any) -> None:
        assert self.may_go.wait(60)
        super().update(bucket, hyper, scale)


class Failing(FusedSGD):
    def update(self, bucket: Any, hyper: Any, scale: Any) -> None:
        raise ZeroDivisionError(f"step {bucket.step}")


# -- one bucket ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16 added up in fp32"])
def test_parameters_are_those_of_one_step_before(precision: str) -> None:
    rule = FusedAdam(lr=1e-2)
    spec = spec_of(rule, precision)
    other, expected = on_device(spec)
    with opened() as job:
        (home,) = place(job, [spec], delayed_update=True)
        parameters = adopt(home)
        for number in range(4):
            before = expected.clone()
            gradient = values(spec, number + 10, spec.gradient_dtype)
            hyper = {**rule.defaults, "lr": 1e-2 / (number + 1)}
            for each in (home, other):
                step(each, gradient, hyper, torch.tensor(0.5))
            assert torch.equal(parameters, before)
        assert home.step == 4
        theirs = states(other)
        assert all(torch.equal(theirs[key], value) for key, value in states(home).items())


def test_a_step_ends_before_its_update_is_computed() -> None:
    rule = Slow()
    with opened() as job:
        (home,) = place(job, [spec_of(rule)], delayed_update=True)
        adopt(home)
        gradient = torch.ones(home.spec.numel, dtype=torch.bfloat16)
        hyper = dict(rule.defaults)
        home.gradient_ready(gradient)
        home.update(gradient, hyper, 1.0)
        home.publish()
        hyper["lr"] = 100.0  # a schedule goes on
        gradient.zero_()  # the next backward begins
        rule.may_go.set()
        home.flush()
        (master,) = (flat for (name, kind), flat in states(home).items() if name == "b0.p0")
        expected = values(home.spec, 1)[:35].view(5, 7) - 1
        assert torch.equal(master, expected)


@pytest.mark.parametrize("surface", ["update", "flush", "fragments", "refresh"])
def test_an_error_surfaces_where_the_bucket_is_touched_next(surface: str) -> None:
    rule = Failing(lr=1.0)
    with opened() as job:
        (home,) = place(job, [spec_of(rule)], delayed_update=True)
        adopt(home)
        gradient = values(home.spec, 2, torch.bfloat16)
        step(home, gradient, rule.defaults)
        arguments = (gradient, rule.defaults, 1.0) if surface == "update" else ()
        with pytest.raises(ZeroDivisionError, match="step 1"):
            getattr(home, surface)(*arguments)
        home.flush()  # raised once


def test_closing_a_job_does_not_wait_for_what_is_queued() -> None:
    rule = Slow()
    with opened() as job:
        homes = place(job, [spec_of(rule, key=key) for key in "abc"], delayed_update=True)
        for home in homes:
            adopt(home)
            step(home, values(home.spec, 2, torch.bfloat16), rule.defaults)
        rule.may_go.set()
    assert not [t for t in threading.enumerate() if t.name == "drivetrain-offload"]


def test_a_dropped_step_leaves_no_trace() -> None:
    rule = FusedAdam(lr=1e-2)
    spec = spec_of(rule)
    other, _ = on_device(spec)
    with opened() as job:
        (home,) = place(job, [spec], delayed_update=True)
        adopt(home)
        for number in range(5):
            gradient = values(spec, number, torch.bfloat16)
            if number in (1, 3):
                home.gradient_ready(gradient * float("inf"))
                continue
            step(home, gradient, rule.defaults)
            step(other, gradient, rule.defaults)
        theirs = states(other)
        assert all(torch.equal(theirs[key], value) for key, value in states(home).items())


def test_of_two_gradients_of_a_step_the_later_one_counts() -> None:
    rule = FusedSGD(lr=1.0)
    with opened() as job:
        (home,) = place(job, [spec_of(rule)], delayed_update=True)
        adopt(home)
        gradient = torch.ones(home.spec.numel, dtype=torch.bfloat16)
        home.gradient_ready(gradient)
        gradient += 1
        step(home, gradient, rule.defaults)
        master = states(home)["b0.p1", "master"]
        assert torch.equal(master, values(home.spec, 1)[35:46] - 2)


def test_masters_that_are_written_are_shown_by_the_next_step() -> None:
    rule = FusedSGD(lr=1.0)
    with opened() as job:
        (home,) = place(job, [spec_of(rule)], delayed_update=True)
        parameters = adopt(home)
        step(home, values(home.spec, 2, torch.bfloat16), rule.defaults)
        for fragment in home.fragments():
            fragment.write(torch.full_like(fragment.read(), 3.0))
        step(home, values(home.spec, 3, torch.bfloat16), rule.defaults)
        assert parameters[:70].tolist() == [3.0] * 70


def test_refreshed_masters_are_the_parameters() -> None:
    rule = FusedSGD(lr=1.0)
    with opened() as job:
        (home,) = place(job, [spec_of(rule)], delayed_update=True)
        parameters = adopt(home)
        step(home, values(home.spec, 2, torch.bfloat16), rule.defaults)
        parameters.fill_(5.0)
        home.refresh()
        step(home, torch.ones(home.spec.numel, dtype=torch.bfloat16), rule.defaults)
        assert parameters.tolist() == [5.0] * home.spec.numel
        assert states(home)["b0.p1", "master"].tolist() == [4.0] * 11


# -- training --------------------------------------------------------------------------------------


def plain_losses(delay: bool, clipping: float) -> list[float]:
    """bf16 parameters with fp32 masters and SGD in nothing but torch."""
    masters = models.mlp()
    worker = copy.deepcopy(masters).bfloat16()
    optimizer = torch.optim.SGD(masters.parameters(), lr=0.05, momentum=0.9, **PLAIN)
    inputs, targets = vectors(8 * STEPS)
    losses = []
    for number in range(STEPS):
        rows = slice(8 * number, 8 * number + 8)
        loss = worker(inputs[rows].bfloat16(), targets[rows])
        worker.zero_grad()
        loss.backward()
        losses.append(loss.item())
        shown = copy.deepcopy(masters)
        pairs = list(zip(masters.parameters(), worker.parameters(), strict=True))
        for master, work in pairs:
            assert work.grad is not None
            master.grad = work.grad.float()
        if clipping:
            nn.utils.clip_grad_norm_(masters.parameters(), clipping)
        optimizer.step()
        source = shown if delay else masters
        with torch.no_grad():
            for value, work in zip(source.parameters(), worker.parameters(), strict=True):
                work.copy_(value)
    return losses


def settings(**more: Any) -> dict[str, Any]:
    return {
        **config(delayed_update=True),
        "bf16": {"enabled": True},
        "optimizer": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9, **PLAIN}},
        **more,
    }


def engine_losses(given: dict[str, Any], folder: str | None = None) -> list[float]:
    """With a folder, the job is saved after half of the steps, and a new one goes on."""
    engine = start(given)
    inputs, targets = vectors(8 * STEPS)
    losses = []
    for number in range(STEPS):
        if folder is not None and number == STEPS // 2:
            engine.save_checkpoint(folder)
            engine.job.close()
            engine = start(given)
            engine.load_checkpoint(folder)
        rows = slice(8 * number, 8 * number + 8)
        loss = engine(inputs[rows].bfloat16(), targets[rows])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.job.close()
    return losses


def start(given: dict[str, Any]) -> Any:
    module = models.mlp()
    engine, *_ = drivetrain.initialize(
        model=module, model_parameters=list(module.parameters()), config=given
    )
    return engine


def test_training_is_that_of_plain_torch_with_updates_one_step_late() -> None:
    (found,) = run_distributed(engine_losses, 1, settings())
    assert found == plain_losses(delay=True, clipping=0.0)
    assert found != plain_losses(delay=False, clipping=0.0)


def test_clipping_is_that_of_the_gradient_which_is_applied() -> None:
    (found,) = run_distributed(engine_losses, 1, settings(gradient_clipping=0.05))
    assert found == pytest.approx(plain_losses(delay=True, clipping=0.05), rel=5e-3)


def test_a_resumed_run_is_bitwise_one_that_was_not_stopped(tmp_path: Path) -> None:
    (whole,) = run_distributed(engine_losses, 1, settings())
    (resumed,) = run_distributed(engine_losses, 1, settings(), str(tmp_path))
    assert resumed == whole


# -- what cannot be ------------------------------------------------------------------------------


def test_parameters_that_are_their_own_masters_are_refused() -> None:
    with opened() as job, pytest.raises(ConfigError, match="are their own masters") as caught:
        place(job, [spec_of(FusedAdam(), "fp32")], delayed_update=True)
    assert "zero_optimization.offload_optimizer.delayed_update" in str(caught.value)


@pytest.mark.parametrize("key", ["delayed_update", "super_offload"])
def test_both_need_host_memory(key: str, tmp_path: Path) -> None:
    given = config(**{"device": "nvme", "nvme_path": str(tmp_path), key: True})
    with pytest.raises(ConfigError, match=f"{key}: needs offload_optimizer.device cpu, got nvme"):
        Plan.build(given, world_size=1)


def test_an_update_is_either_late_or_early() -> None:
    given = config(delayed_update=True, super_offload=True)
    with pytest.raises(ConfigError, match="delayed_update: cannot be combined with"):
        Plan.build(given, world_size=1)

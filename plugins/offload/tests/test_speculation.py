"""Updates that begin on a guess: never a bit of difference, whatever the guess was."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from drivetrain_kernels.rules import FusedAdam, FusedLamb, FusedSGD
from offload_harness import (
    PRECISIONS,
    adopt,
    assert_same,
    config,
    on_device,
    opened,
    place,
    spec_of,
    states,
    step,
    values,
)

import drivetrain
from drivetrain.testing import models, run_distributed
from drivetrain.testing.data import tokens


class Counting(FusedAdam):
    """Counts updates that ran on the worker's thread, and those of them that fail."""

    def __init__(self) -> None:
        super().__init__(lr=1e-2)
        self.runs: list[int] = []
        self.fail_in = 0

    def update(self, bucket: Any, hyper: Any, scale: Any) -> None:
        if threading.current_thread().name == "drivetrain-offload":
            self.runs.append(bucket.step)
            super().update(bucket, hyper, scale)
            if len(self.runs) == self.fail_in:
                raise ZeroDivisionError("planted")
        else:
            super().update(bucket, hyper, scale)


class Overwriting(FusedAdam):
    """Uses the gradient's memory for something else, as a rule may."""

    def update(self, bucket: Any, hyper: Any, scale: Any) -> None:
        super().update(bucket, hyper, scale)
        bucket.gradient.fill_(float("nan"))


@pytest.mark.parametrize("scalar", [float, torch.tensor])
def test_from_the_second_step_on_updates_are_done_when_they_are_asked_for(scalar) -> None:
    rule = Counting()
    with opened() as job:
        (home,) = place(job, [spec_of(rule)], super_offload=True)
        adopt(home)
        group = dict(rule.defaults)
        for number in range(4):
            gradient = values(home.spec, number, torch.bfloat16)
            group["lr"] = 1.0 / (1 + number)  # as a schedule does, between two steps
            home.gradient_ready(gradient)
            job_thread_is_idle(home)
            ahead = len(rule.runs)
            home.update(gradient, group, scalar(0.25))
            home.publish()
            assert ahead == (number + 1 if number else 0)
        assert rule.runs == [1, 2, 3, 4]


def job_thread_is_idle(home: Any) -> None:
    home.side.worker.drain()


@pytest.mark.parametrize("change", ["lr", "scale", "kind of scale"])
def test_a_wrong_guess_is_run_again(change: str) -> None:
    rule = Counting()
    spec = spec_of(rule)
    other, expected = on_device(spec)
    with opened() as job:
        (home,) = place(job, [spec], super_offload=True)
        parameters = adopt(home)
        group = dict(rule.defaults)
        for number in range(3):
            gradient, scale = values(spec, number, torch.bfloat16), 0.5
            home.gradient_ready(gradient)
            if number == 2 and change == "lr":
                group["lr"] = 0.3
            elif number == 2:
                scale = 0.4 if change == "scale" else torch.tensor(0.5)
            other.update(gradient.clone(), group, scale)
            home.update(gradient, group, scale)
            home.publish()
        assert rule.runs == [1, 2, 3, 3]
        assert_same(home, parameters, other, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", [FusedAdam, FusedLamb, FusedSGD])
@pytest.mark.parametrize("seed", range(3))
def test_any_run_of_events_ends_as_without_guesses(kind, precision: str, seed: int) -> None:
    """Schedules, clipping, dropped steps, late gradients, and reads at any moment."""
    chance, rule = random.Random(seed), kind(lr=1e-2)
    specs = [spec_of(rule, precision, key=key) for key in ("b0", "b1", "b2", "b3", "b4")]
    others, expected = zip(*map(on_device, specs), strict=True)
    with opened() as job:
        homes = place(job, specs, super_offload=True)
        parameters = [adopt(home) for home in homes]
        group = dict(rule.defaults)
        for number in range(12):
            gradients = [values(spec, chance.randrange(99), spec.gradient_dtype) for spec in specs]
            group["lr"] *= chance.choice([1, 1, 0.9])
            for home, gradient in zip(homes, gradients, strict=True):
                make_ready(home, gradient, chance)
            if chance.random() < 0.2:
                continue  # dropped
            group["lr"] *= chance.choice([1, 1, 1, 0.9])
            scale = chance.choice([0.5, 0.5, 0.5, 0.4])
            for home, other, gradient in zip(homes, others, gradients, strict=True):
                other.update(gradient.clone(), group, scale)
                home.update(gradient, group, scale)
            for home in homes:
                home.publish()
            if number % 3 == 2:
                for each in zip(homes, parameters, others, expected, strict=True):
                    assert_same(*each)
        for each in zip(homes, parameters, others, expected, strict=True):
            assert_same(*each)


def make_ready(home: Any, gradient: torch.Tensor, chance: random.Random) -> None:
    """Once or, with a late gradient, twice; now and then someone looks at the states."""
    home.gradient_ready(gradient)
    if chance.random() < 0.2:
        gradient += 1
        home.gradient_ready(gradient)
    if chance.random() < 0.1:
        states(home)


def test_a_guess_does_not_touch_the_gradient_that_the_norm_is_taken_of() -> None:
    rule = Overwriting(lr=1e-2)
    spec = spec_of(rule)
    other, expected = on_device(spec)
    with opened() as job:
        (home,) = place(job, [spec], super_offload=True)
        parameters = adopt(home)
        for number in range(3):
            gradient = values(spec, number, torch.bfloat16)
            home.gradient_ready(gradient)
            job_thread_is_idle(home)
            assert torch.equal(gradient, values(spec, number, torch.bfloat16))
            scale = 0.5 if number < 2 else 0.4  # the last guess is wrong
            home.update(gradient, rule.defaults, scale)
            home.publish()
            other.update(values(spec, number, torch.bfloat16), rule.defaults, scale)
        assert_same(home, parameters, other, expected)


def test_a_guess_does_not_touch_the_parameters() -> None:
    rule = Counting()
    with opened() as job:
        (home,) = place(job, [spec_of(rule)], super_offload=True)
        parameters = adopt(home)
        step(home, values(home.spec, 0, torch.bfloat16), rule.defaults)
        before = parameters.clone()
        home.gradient_ready(values(home.spec, 1, torch.bfloat16))
        job_thread_is_idle(home)
        assert rule.runs == [1, 2]
        assert torch.equal(parameters, before)


def test_a_guess_that_fails_is_not_held_against_the_update() -> None:
    rule = Counting()
    spec = spec_of(rule)
    other, expected = on_device(spec)
    with opened() as job:
        (home,) = place(job, [spec], super_offload=True)
        parameters = adopt(home)
        rule.fail_in = 2
        for number in range(3):
            gradient = values(spec, number, torch.bfloat16)
            step(home, gradient, rule.defaults)
            step(other, gradient, rule.defaults)
        assert rule.runs == [1, 2, 2, 3]
        assert_same(home, parameters, other, expected)


def test_an_update_that_fails_raises_from_publish() -> None:
    rule = Counting()
    with opened() as job:
        (home,) = place(job, [spec_of(rule)], super_offload=True)
        adopt(home)
        rule.fail_in = 1
        with pytest.raises(ZeroDivisionError, match="planted"):
            step(home, values(home.spec, 2, torch.bfloat16), rule.defaults)


# -- training --------------------------------------------------------------------------------------


def losses_and_weights(
    given: dict[str, Any], skipped: int
) -> tuple[list[float], int, list[torch.Tensor]]:
    module = models.tiny_gpt()
    engine, *_ = drivetrain.initialize(
        model=module, model_parameters=list(module.parameters()), config=given
    )
    inputs, targets = tokens(4 * 12)
    losses = []
    for number in range(12):
        rows = slice(4 * number, 4 * number + 4)
        loss = engine(inputs[rows], targets[rows])
        engine.backward(loss)
        if number == skipped:
            engine.skip_step()
        else:
            engine.step()
        losses.append(loss.item())
    weights = [parameter.detach().clone() for parameter in module.parameters()]
    engine.job.close()
    return losses, engine.skipped_steps, weights


SCHEDULE = {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 1e-2}}
MODES: dict[str, dict[str, Any]] = {
    "clipping bites now and then": {"gradient_clipping": 1.8},
    "a schedule": {"scheduler": SCHEDULE},
    "bf16": {"bf16": {"enabled": True}, "gradient_clipping": 1.8},
    "overflows": {"fp16": {"enabled": True, "initial_scale_power": 22, "loss_scale_window": 3}},
}


@pytest.mark.parametrize("mode", MODES)
def test_training_is_bitwise_that_without_guesses(mode: str) -> None:
    answers = []
    for offload in ({"super_offload": True}, {"device": "none"}):
        given = {**config(**offload), **MODES[mode]}
        given |= {"train_batch_size": 8, "gradient_accumulation_steps": 1}
        answers.append(run_distributed(losses_and_weights, 2, given, 5))
    for (losses, dropped, weights), (other, others_dropped, others) in zip(*answers, strict=True):
        assert losses == other
        assert dropped == others_dropped > (1 if mode == "overflows" else 0)
        assert all(map(torch.equal, weights, others))

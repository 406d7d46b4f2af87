"""Important columns at once, the others every few steps: held to the algorithm, written plainly.

The reference keeps every number in one place, and a mask that says who is important.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_kernels.rules import FusedAdam, FusedLamb, FusedSGD
from drivetrain_offload.homes.importance import important
from drivetrain_offload.homes.split import part_of
from drivetrain_offload.zenflow_section import ZenFlow
from offload_harness import adopt, config, opened, place, spec_of, states, step, values

import drivetrain
from drivetrain.contracts import BucketSpec
from drivetrain.errors import ConfigError
from drivetrain.plan.plan import Plan
from drivetrain.testing import models, run_distributed
from drivetrain.testing.data import tokens

LR, BETAS, EPS, DECAY, MOMENTUM = 0.05, (0.9, 0.99), 1e-8, 0.1, 0.9


class Reference:
    """ZenFlow over one bucket in float64."""

    def __init__(self, spec: BucketSpec, section: ZenFlow, rule: str) -> None:
        self.spec, self.section, self.rule = spec, section, rule
        self.weights = values(spec, 1).double()
        self.first = torch.zeros(spec.numel, dtype=torch.float64)
        self.second = torch.zeros(spec.numel, dtype=torch.float64)
        self.sum = torch.zeros(spec.numel, dtype=torch.float64)
        self.mask = torch.zeros(spec.numel, dtype=torch.bool)
        self.steps = self.slow_steps = self.selected = 0
        self.shown = self.weights.clone()
        self.late = self.weights.clone()

    def step(self, gradient: torch.Tensor, lr: float, scale: float) -> None:
        section = self.section
        self.steps += 1
        gradient = gradient.double()
        if self.steps <= section.full_warm_up_rounds:
            self.apply(gradient * scale, torch.ones_like(self.mask), self.steps, lr)
            self.shown = self.weights.clone()
            self.late = self.weights.clone()
            return
        place = (self.steps - section.full_warm_up_rounds - 1) % section.update_interval
        passed = self.steps - self.selected
        if not self.selected or (place == 0 and passed >= section.select_interval):
            self.select(gradient)
        self.apply(gradient * scale, self.mask, self.steps, lr)
        self.sum += gradient * scale
        if place == section.update_interval - 1:
            if section.overlap_step:
                self.shown = self.late.clone()
            self.slow_steps += 1
            mean = self.sum / section.update_interval
            number = section.full_warm_up_rounds + self.slow_steps
            self.apply(mean, ~self.mask, number, lr)
            self.sum.zero_()
            self.late = self.weights.clone()
            if not section.overlap_step:
                self.shown = self.weights.clone()
        self.shown = torch.where(self.mask, self.weights, self.shown)

    def select(self, gradient: torch.Tensor) -> None:
        # what was important until now is shown as it is, also by what the host has computed
        self.late = torch.where(self.mask, self.weights, self.late)
        self.selected = self.steps
        self.mask = torch.zeros_like(self.mask)
        for segment in self.spec.segments:
            width = math.prod(segment.shape[1:])
            sums: dict[int, float] = {}
            columns = []
            for element in range(segment.numel):
                column = (segment.start + element) % width
                columns.append(column)
                size = abs(float(gradient[segment.offset + element]))
                sums[column] = sums.get(column, 0.0) + size
            ranked = sorted(range(width), key=lambda column: -sums.get(column, 0.0))
            chosen = set(ranked[: math.ceil(self.section.topk_ratio * width)])
            if len(segment.shape) == 1:
                chosen = set(columns)
            for element, column in enumerate(columns):
                self.mask[segment.offset + element] = column in chosen

    def apply(self, gradient: torch.Tensor, where: torch.Tensor, number: int, lr: float) -> None:
        if self.rule == "sgd":
            first, second = MOMENTUM * self.first + gradient, self.second
            weights = self.weights - lr * first
        else:
            first = BETAS[0] * self.first + (1 - BETAS[0]) * gradient
            second = BETAS[1] * self.second + (1 - BETAS[1]) * gradient**2
            size = (second / (1 - BETAS[1] ** number)).sqrt() + EPS
            weights = self.weights * (1 - lr * DECAY)
            weights = weights - lr * first / (1 - BETAS[0] ** number) / size
        self.first = torch.where(where, first, self.first)
        self.second = torch.where(where, second, self.second)
        self.weights = torch.where(where, weights, self.weights)


RULES = {
    "sgd": lambda: FusedSGD(lr=LR, momentum=MOMENTUM),
    "adam": lambda: FusedAdam(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY),
}
SECTIONS = [
    ZenFlow(topk_ratio=0.3, update_interval=3, select_interval=6),
    ZenFlow(topk_ratio=0.3, update_interval=3, select_interval=6, overlap_step=True),
    ZenFlow(topk_ratio=0.2, update_interval=2, select_interval=3, full_warm_up_rounds=3),
    ZenFlow(topk_ratio=0.5, update_interval=1, select_interval=1, overlap_step=True),
    ZenFlow(topk_ratio=1.0),
]


def gradients(spec: BucketSpec, count: int) -> Iterator[tuple[torch.Tensor, float, float]]:
    """Gradients whose columns differ in size, other ones later; rate and scale of each step."""
    for number in range(count):
        sizes = values(spec, 100 + number // 5).exp()
        yield (values(spec, number) * sizes).bfloat16(), LR / (1 + number), 0.5 + number % 2


@pytest.mark.parametrize("section", SECTIONS, ids=range(len(SECTIONS)))
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("looks", [False, True])
def test_every_number_is_that_of_the_plain_algorithm(rule: str, section, looks: bool) -> None:
    made = RULES[rule]()
    spec = spec_of(made)
    reference = Reference(spec, section, rule)
    real = slice(0, spec.numel - 3)
    with opened() as job:
        (home,) = place(job, [spec], section)
        parameters = adopt(home)
        for number, (gradient, lr, scale) in enumerate(gradients(spec, 14)):
            step(home, gradient, {**made.defaults, "lr": lr}, torch.tensor(scale))
            reference.step(gradient, lr, scale)
            shown = reference.shown[real]
            assert torch.allclose(parameters[real].double(), shown, rtol=2**-7, atol=1e-5), number
            if looks or number == 13:
                found = states(home)
                for segment in spec.segments:
                    expected = segment.of(reference.weights)
                    master = found[segment.name, "master"].double()
                    assert torch.allclose(master, expected, rtol=1e-4, atol=1e-5), number


def test_elements_that_are_not_important_stay_until_the_interval_ends() -> None:
    rule = RULES["sgd"]()
    section = ZenFlow(topk_ratio=0.2, update_interval=4)
    with opened() as job:
        (home,) = place(job, [spec_of(rule)], section)
        parameters = adopt(home)
        shown = [parameters.clone()]
        for gradient, lr, scale in gradients(home.spec, 8):
            step(home, gradient, {**rule.defaults, "lr": lr}, scale)
            shown.append(parameters.clone())
    changed = [int((before != after).sum()) for before, after in pairwise(shown)]
    few = 11 + 10 + 6  # the vector, 2 of 7 columns of 5, and 2 of 8 columns of 3
    assert [number <= few for number in changed] == [True, True, True, False] * 2


class Slow(FusedSGD):
    """Waits for permission where it runs on the host's thread."""

    def __init__(self) -> None:
        super().__init__(lr=0.5)
        self.may_go = threading.Event()

    def update(self, bucket: Any, hyper: Any, scale: Any) -> None:
        if threading.current_thread().name == "drivetrain-offload":
            assert self.may_go.wait(60)
        super().update(bucket, hyper, scale)


def test_overlapping_the_device_does_not_wait_for_the_host() -> None:
    rule = Slow()
    section = ZenFlow(topk_ratio=0.2, update_interval=2, overlap_step=True)
    with opened() as job:
        (home,) = place(job, [spec_of(rule)], section)
        parameters = adopt(home)
        before = parameters.clone()
        for number in range(2):
            step(home, values(home.spec, number, torch.bfloat16), rule.defaults)
        assert not torch.equal(parameters, before)
        rule.may_go.set()
        home.flush()


def test_looking_changes_nothing() -> None:
    answers = []
    for looks in (False, True):
        rule = RULES["adam"]()
        section = ZenFlow(topk_ratio=0.3, update_interval=3, select_interval=3, overlap_step=True)
        with opened() as job:
            (home,) = place(job, [spec_of(rule)], section)
            parameters = adopt(home)
            for gradient, lr, scale in gradients(home.spec, 10):
                step(home, gradient, {**rule.defaults, "lr": lr}, scale)
                if looks:
                    states(home)
            answers.append((parameters, states(home)))
    (parameters, found), (others, expected) = answers
    assert torch.equal(parameters, others)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_written_masters_reach_both_sides() -> None:
    rule = FusedSGD(lr=0.0)
    with opened() as job:
        (home,) = place(job, [spec_of(rule)], ZenFlow(update_interval=2))
        parameters = adopt(home)
        gradient = values(home.spec, 2, torch.bfloat16)
        step(home, gradient, rule.defaults)
        for fragment in home.fragments():
            if fragment.kind == "master":
                fragment.write(torch.full_like(fragment.read(), 3.0))
        step(home, gradient, rule.defaults)
        assert parameters[:70].tolist() == [3.0] * 70


def test_both_sides_begin_anew_from_parameters_that_someone_changed() -> None:
    rule = FusedSGD(lr=0.0)
    with opened() as job:
        (home,) = place(job, [spec_of(rule)], ZenFlow(update_interval=2))
        parameters = adopt(home)
        for number in range(6):
            if number == 3:
                parameters.fill_(5.0)
                home.refresh()
            step(home, values(home.spec, number, torch.bfloat16), rule.defaults)
        assert parameters.tolist() == [5.0] * home.spec.numel
        assert states(home)["b0.p0", "master"].unique().tolist() == [5.0]


# -- importance --------------------------------------------------------------------------------


def test_columns_are_told_wherever_a_shard_begins() -> None:
    spec = spec_of(FusedAdam())  # tensors of (5, 7), 11, (3, 2, 4)
    gradient = torch.zeros(spec.numel)
    gradient[torch.arange(5) * 7 + 3] = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    whole = important(gradient, spec.segments, 0.1)
    assert whole[:35].view(5, 7).any(0).tolist() == [False] * 3 + [True] + [False] * 3
    assert whole[:35].view(5, 7).all(0)[3]
    for start in range(34):
        part = part_of(spec, start, spec.numel)
        found = important(gradient[start:], part.segments, 0.1)
        if start < 32:  # there is one of the column in the part
            assert torch.equal(found[: 35 - start], whole[start:35]), start


def test_vectors_are_important_and_padding_is_not() -> None:
    spec = spec_of(FusedAdam())
    found = important(torch.ones(spec.numel), spec.segments, 0.1)
    assert found[35:46].all()
    assert not found[-3:].any()
    # one of seven columns of five, one of eight columns of three
    assert int(found.sum()) == 5 + 11 + 3


# -- training --------------------------------------------------------------------------------------


def settings(section: dict[str, Any], **more: Any) -> dict[str, Any]:
    given = {**config(), "bf16": {"enabled": True}, "gradient_clipping": 0.5, **more}
    given["zero_optimization"]["zenflow"] = section
    return given


def losses(given: dict[str, Any], steps: int, folder: str | None = None) -> list[float]:
    """With a folder, the job is saved after seven steps, and a new one goes on."""
    engine = start(given)
    inputs, targets = tokens(4 * steps)
    found = []
    for number in range(steps):
        if folder is not None and number == 7:
            engine.save_checkpoint(folder)
            engine.job.close()
            engine = start(given)
            engine.load_checkpoint(folder)
        rows = slice(4 * number, 4 * number + 4)
        loss = engine(inputs[rows], targets[rows])
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    assert engine.gradient_accumulation_steps() == given.get("gradient_accumulation_steps", 1)
    engine.job.close()
    return found


def start(given: dict[str, Any]) -> Any:
    module = models.tiny_gpt()
    engine, *_ = drivetrain.initialize(
        model=module, model_parameters=list(module.parameters()), config=given
    )
    return engine


@pytest.mark.parametrize("overlap", [False, True])
def test_a_resumed_run_is_bitwise_one_that_was_not_stopped(overlap: bool, tmp_path: Path) -> None:
    section = {"topk_ratio": 0.2, "update_interval": 3, "select_interval": 3}
    given = settings({**section, "overlap_step": overlap})
    whole = run_distributed(losses, 2, given, 14)
    assert run_distributed(losses, 2, given, 14, str(tmp_path)) == whole


def test_with_all_columns_important_training_is_that_without_zenflow() -> None:
    plain = {**settings({}), "zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    given = settings({"topk_ratio": 1.0})
    assert run_distributed(losses, 1, given, 8) == run_distributed(losses, 1, plain, 8)


def test_with_every_step_a_warm_up_training_is_that_without_zenflow() -> None:
    plain = {**settings({}), "zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    given = settings({"full_warm_up_rounds": 8})
    assert run_distributed(losses, 1, given, 8) == run_distributed(losses, 1, plain, 8)


# -- what cannot be ------------------------------------------------------------------------------


def test_states_that_are_written_are_not_overwritten_by_what_the_device_had() -> None:
    rule = RULES["adam"]()
    with opened() as job:
        (home,) = place(job, [spec_of(rule)], ZenFlow(topk_ratio=0.3, update_interval=2))
        adopt(home)
        for number in range(2):
            step(home, values(home.spec, number, torch.bfloat16), rule.defaults)
        for fragment in home.fragments():
            if fragment.kind == "exp_avg":
                fragment.write(torch.full_like(fragment.read(), 7.0))
        moments = [flat for (_, kind), flat in states(home).items() if kind == "exp_avg"]
        assert all(bool((flat == 7.0).all()) for flat in moments)


def test_it_needs_offload_to_the_host() -> None:
    given = {"train_batch_size": 8, "zero_optimization": {"zenflow": {}}}
    with pytest.raises(
        ConfigError, match=r"zenflow: needs offload_optimizer\.device cpu, got none"
    ):
        Plan.build(given, world_size=1)


@pytest.mark.parametrize("key", ["delayed_update", "super_offload"])
def test_it_is_one_of_three_ways_to_update(key: str) -> None:
    given = config(**{key: True})
    given["zero_optimization"]["zenflow"] = {}
    with pytest.raises(ConfigError, match=f"{key}: cannot be combined with zero_optimization.zen"):
        Plan.build(given, world_size=1)


def test_it_needs_parameters_on_the_device() -> None:
    given = config()
    given["zero_optimization"] |= {"zenflow": {}, "offload_param": {"device": "cpu"}}
    with pytest.raises(ConfigError, match="zenflow updates columns on the device"):
        Plan.build(given, world_size=1)


def test_rules_over_whole_tensors_are_refused() -> None:
    with opened() as job, pytest.raises(ConfigError, match="FusedLamb does not work element by"):
        place(job, [spec_of(FusedLamb())], ZenFlow())


def test_parameters_that_are_their_own_masters_are_refused() -> None:
    with opened() as job, pytest.raises(ConfigError, match=r"zenflow: .* are their own masters"):
        place(job, [spec_of(FusedAdam(), "fp32")], ZenFlow())


def test_epochs_need_a_length() -> None:
    with pytest.raises(ValueError, match="needs steps_per_epoch"):
        ZenFlow(select_strategy="epoch")
    section = ZenFlow(select_strategy="epoch", select_interval=2, steps_per_epoch=10)
    assert section.steps_selected == 20

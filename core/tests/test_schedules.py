"""Schedules against their closed formulas, with every parameter."""

from __future__ import annotations

import itertools
import math
import warnings
from fractions import Fraction
from functools import partial

import pytest
import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain.optimization.schedule_choice import adopt_schedule, make_schedule
from drivetrain.optimization.schedules import (
    LRRangeTest,
    OneCycle,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
)
from drivetrain.plan.registry import Registry


def adamw(*rates):
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates or (0.5,)]
    return torch.optim.AdamW(groups)


def curve(schedule, steps):
    """Rates of the first group used by the updates 0, 1, 2, ...; update n follows n steps."""
    rates = []
    for _ in range(steps):
        rates.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.step()
    return rates


def approx(values):
    return pytest.approx(values, rel=1e-12, abs=1e-15)


# Update n is made at iteration n - 1, counted from 0 for the first step of the schedule.


def test_range_test_grows_without_end():
    schedule = LRRangeTest(adamw(), 0.01, lr_range_test_step_size=5, lr_range_test_step_rate=2.0)
    assert curve(schedule, 23) == approx([0.01 * (1 + 2 * n / 5) for n in range(23)])


def test_range_test_stairs_grow_at_the_end_of_an_interval():
    schedule = LRRangeTest(adamw(), 0.01, lr_range_test_step_size=5, lr_range_test_staircase=True)
    assert curve(schedule, 23) == approx([0.01 * (1 + n // 5) for n in range(23)])


def test_one_cycle_goes_up_down_and_decays():
    schedule = OneCycle(
        adamw(),
        cycle_min_lr=0.1,
        cycle_max_lr=1.1,
        cycle_first_step_size=4,
        cycle_second_step_size=8,
        decay_step_size=3,
        decay_lr_rate=0.5,
    )
    up = [0.1 + n / 4 for n in range(5)]
    down = [0.1 + (12 - n) / 8 for n in range(5, 13)]
    decay = [0.1 / (1 + 0.5 * (n - 12) / 3) for n in range(13, 30)]
    assert curve(schedule, 30) == approx(up + down + decay)


def test_one_cycle_without_decay_stays_at_the_end():
    schedule = OneCycle(adamw(), 0.1, 1.1, decay_lr_rate=0.5, cycle_first_step_size=2)
    assert curve(schedule, 8) == approx([0.1, 0.6, 1.1, 0.6, 0.1, 0.1, 0.1, 0.1])


def test_one_cycle_stairs_discretise_the_ramps():
    schedule = OneCycle(
        adamw(),
        0.0,
        1.0,
        cycle_first_step_size=6,
        cycle_second_step_size=4,
        cycle_first_stair_count=3,
        cycle_second_stair_count=2,
    )
    expected = [0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1, 0.5, 0.5, 0, 0]
    assert curve(schedule, 12) == approx(expected)
    same = OneCycle(adamw(), 0.0, 1.0, cycle_first_step_size=4, cycle_first_stair_count=2)
    assert curve(same, 9) == approx([0, 0, 0.5, 0.5, 1, 1, 0.5, 0.5, 0])


def exact_one_cycle(update, up, down, up_stairs, down_stairs, low, high):
    """The rate in exact arithmetic, from the definition: a stair is reached at its border."""
    if update <= up:
        share, stairs = Fraction(update, up), up_stairs
    else:
        share, stairs = min(Fraction(update - up, down), Fraction(1)), down_stairs
    if stairs:
        share = Fraction(math.floor(share * stairs), stairs)
    height = share if update <= up else 1 - share
    return low + (high - low) * height


def test_one_cycle_is_exact_at_every_border_of_its_stairs():
    low, high = Fraction(1, 10), Fraction(7, 10)  # in floats 0.1 + (0.7 - 0.1) is not 0.7
    for up, down, stairs in itertools.product(
        (1, 3, 49, 98, 100), (7, 93, 100), (0, 1, 3, 49, 100)
    ):
        schedule = OneCycle(
            adamw(),
            0.1,
            0.7,
            cycle_first_step_size=up,
            cycle_second_step_size=down,
            cycle_first_stair_count=stairs,
            cycle_second_stair_count=stairs,
        )
        for update, rate in enumerate(curve(schedule, up + down + 3)):
            exact = exact_one_cycle(update, up, down, stairs, stairs, low, high)
            assert rate == pytest.approx(float(exact), rel=1e-14), (up, down, stairs, update)


def test_every_schedule_reaches_its_ends_exactly():
    for low, high in ((0.1, 0.7), (1e-9, 3e-4), (0.3, 0.9), (0.7, 0.1)):
        cycle = OneCycle(adamw(), low, high, cycle_first_step_size=3, cycle_min_mom=0.3)
        assert [cycle.rates(n)[0] for n in (-1, 2, 5, 6)] == [low, high, low, low]
        assert [cycle.momenta(n) for n in (-1, 2, 5)] == [[0.9], [0.3], [0.9]]
        for kind, steps in itertools.product(("log", "linear"), (2, 3, 7, 49, 1000)):
            warm = WarmupLR(adamw(), low, high, steps, kind)
            assert [warm.rates(n)[0] for n in (-1, 0, steps, steps + 1)] == [low, low, high, high]
            line = WarmupDecayLR(adamw(), low, high, steps, kind, total_num_steps=steps + 9)
            assert [line.rates(n)[0] for n in (steps, steps + 9, steps + 20)] == [high, low, low]
            cosine = WarmupCosineLR(adamw(1.0), steps + 9, low, steps, high, kind)
            assert cosine.rates(0) == [low]
            assert [cosine.rates(n)[0] for n in (steps + 8, steps + 20)] == [high, high]
    for size in (1, 3, 49, 98):
        stairs = LRRangeTest(adamw(), 0.25, size, 1.0, lr_range_test_staircase=True)
        found = [stairs.rates(n)[0] for n in range(-1, 4 * size)]
        assert found == [0.25 * (1 + n // size) for n in range(4 * size + 1)]


def test_one_cycle_moves_the_momentum_against_the_rate():
    optimizer = adamw()
    schedule = OneCycle(
        optimizer,
        0.1,
        1.1,
        cycle_first_step_size=4,
        cycle_min_mom=0.5,
        cycle_max_mom=0.9,
        decay_step_size=2,
        decay_mom_rate=0.01,
    )
    seen = []
    for _ in range(12):
        seen.append(optimizer.param_groups[0]["betas"])
        schedule.step()
    ramp = [0.9 - 0.1 * min(n, 8 - n) for n in range(9)]
    growth = [0.9 * (1 + 0.01 * (n - 8) / 2) for n in range(9, 12)]
    assert [first for first, _ in seen] == approx(ramp + growth)
    assert {second for _, second in seen} == {0.99}


def test_one_cycle_takes_momenta_for_each_group_and_may_have_no_way_down():
    groups = [{"params": [torch.zeros(1)]} for _ in range(2)]
    optimizer = torch.optim.Adam(groups, lr=1.0)
    steps = {"cycle_first_step_size": 2, "cycle_second_step_size": 0}
    momenta = {"cycle_min_mom": [0.2, 0.4], "cycle_max_mom": [0.6, 0.8]}
    cycle = OneCycle(optimizer, [0.1, 0.2], [1.0, 2.0], **steps, **momenta)
    assert cycle.get_mom() == [(0.6, 0.99), (0.8, 0.99)]
    cycle.step(1)
    assert [group["betas"][0] for group in optimizer.param_groups] == [0.2, 0.4]
    assert cycle.get_lr() == [1.0, 2.0]
    cycle.step()
    assert cycle.get_lr() == [0.1, 0.2]
    with pytest.raises(ValueError, match="cycle_min_mom has 3 values for 2 groups"):
        OneCycle(optimizer, 0.1, 1.0, cycle_min_mom=[0.1, 0.2, 0.3])


@pytest.mark.parametrize("steps", [None, -5])
def test_a_warm_up_needs_a_number_of_steps(steps):
    with pytest.raises(ValueError, match=f"warmup_num_steps must be at least 0, got {steps}"):
        WarmupLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), warmup_num_steps=steps)


def test_one_cycle_leaves_momentum_alone_where_it_is_told_to_or_there_is_none():
    optimizer = adamw()
    OneCycle(optimizer, 0.1, 1.1, cycle_momentum=False).step()
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], momentum=0.7)
    OneCycle(sgd, 0.1, 1.1).step()
    assert sgd.param_groups[0]["momentum"] == 0.7


@pytest.mark.parametrize("kind", ["log", "linear"])
def test_warm_up_then_constant(kind):
    schedule = WarmupLR(adamw(), 0.1, 0.9, warmup_num_steps=6, warmup_type=kind)
    share = [math.log(it + 1) / math.log(6) if kind == "log" else it / 6 for it in range(6)] + [
        1.0
    ] * 4
    # The first update and the second (iteration 0) both use the lowest rate.
    assert curve(schedule, 11) == approx([0.1, *(0.1 + 0.8 * s for s in share)])


def test_warm_up_ends_at_each_groups_own_rate_by_default():
    optimizer = adamw(0.5, 0.25)
    schedule = WarmupLR(optimizer, warmup_num_steps=3, warmup_type="linear")
    for _ in range(5):
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert schedule.get_last_lr() == schedule.get_lr() == [0.5, 0.25]


@pytest.mark.parametrize("schedule", [WarmupLR, partial(WarmupCosineLR, total_num_steps=9)])
def test_an_unknown_kind_of_warm_up_is_log_with_a_warning(schedule, caplog):
    given = schedule(adamw(0.9), warmup_num_steps=6, warmup_type="cubic")
    assert "'cubic' is unknown" in caplog.text
    assert given.warmup_type == "log"
    assert curve(given, 7) == approx(
        [0.0, *(0.9 * math.log(it + 1) / math.log(6) for it in range(6))]
    )


def test_a_warm_up_takes_at_least_two_steps():
    schedule = WarmupLR(adamw(), 0.0, 1.0, warmup_num_steps=0, warmup_type="linear")
    assert curve(schedule, 5) == approx([0, 0, 0.5, 1, 1])


def test_rates_may_be_given_for_each_group():
    optimizer = adamw(1.0, 1.0)
    WarmupLR(optimizer, [0.1, 0.2], [0.3, 0.4], warmup_num_steps=2).step(7)
    assert [group["lr"] for group in optimizer.param_groups] == approx([0.3, 0.4])


@pytest.mark.parametrize("kind", ["log", "linear"])
def test_warm_up_then_straight_down(kind):
    schedule = WarmupDecayLR(
        adamw(),
        total_num_steps=12,
        warmup_min_lr=0.1,
        warmup_max_lr=0.9,
        warmup_num_steps=4,
        warmup_type=kind,
    )
    share = [math.log(it + 1) / math.log(4) if kind == "log" else it / 4 for it in range(4)]
    share += [max(0.0, (12 - it) / 8) for it in range(4, 15)]
    assert curve(schedule, 16) == approx([0.1, *(0.1 + 0.8 * s for s in share)])


@pytest.mark.parametrize("kind", ["log", "linear"])
def test_warm_up_then_half_a_cosine(kind):
    optimizer = adamw(0.5, 2.0)
    schedule = WarmupCosineLR(
        optimizer,
        total_num_steps=12,
        warmup_min_ratio=0.2,
        warmup_num_steps=4,
        cos_min_ratio=0.1,
        warmup_type=kind,
    )
    ratio = [
        0.2 + 0.8 * (math.log(it + 1) / math.log(4) if kind == "log" else it / 4) for it in range(4)
    ]
    for it in range(4, 15):
        progress = min((it - 3) / 8, 1)
        ratio.append(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
    assert curve(schedule, 16) == approx([0.1, *(0.5 * r for r in ratio)])
    assert optimizer.param_groups[1]["lr"] == approx(2.0 * 0.1)


MAKERS = {
    "LRRangeTest": lambda o: LRRangeTest(o, 0.01, 3),
    "OneCycle": lambda o: OneCycle(o, 0.1, 1.1, 0.5, 4, decay_step_size=2),
    "WarmupLR": lambda o: WarmupLR(o, 0.1, 0.9, 5),
    "WarmupDecayLR": lambda o: WarmupDecayLR(o, 0.1, 0.9, 5, total_num_steps=9),
    "WarmupCosineLR": lambda o: WarmupCosineLR(o, 9, 0.1, 5),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_continues_where_it_was_saved(name):
    whole = curve(MAKERS[name](adamw()), 14)
    for cut in range(1, 14):
        first = MAKERS[name](adamw())
        curve(first, cut)
        state = first.state_dict()
        assert state == {"last_batch_iteration": cut - 1}
        second = MAKERS[name](adamw())
        second.load_state_dict(state)
        assert curve(second, 14 - cut) == whole[cut:]


@pytest.mark.parametrize("name", MAKERS)
def test_a_schedule_can_be_put_to_any_iteration(name):
    whole = curve(MAKERS[name](adamw()), 14)
    schedule = MAKERS[name](adamw())
    for iteration in (12, 3, 0, 7):
        schedule.step(iteration)
        assert schedule.get_last_lr()[0] == whole[iteration + 1]


def test_a_schedule_over_a_resumed_optimizer_knows_the_original_rate():
    optimizer = adamw(0.5)
    optimizer.param_groups[0].update(lr=0.01, initial_lr=0.5)
    schedule = WarmupCosineLR(optimizer, 10, warmup_num_steps=2, warmup_type="linear")
    schedule.step(1)
    assert optimizer.param_groups[0]["lr"] == approx(0.25)


def test_a_tensor_rate_is_written_in_place():
    rate = torch.tensor(0.5)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=rate)
    WarmupLR(optimizer, 0.0, 1.0, 4, "linear").step(2)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5


def test_a_total_that_ends_inside_the_warm_up_is_logged(caplog):
    WarmupDecayLR(adamw(), total_num_steps=5, warmup_num_steps=10)
    assert "total_num_steps 5 ends before warmup_num_steps 10" in caplog.text


def config(name, params, optimizer=None):
    return make_schedule(name, params, optimizer or adamw(), Registry.installed())


def test_config_names_compare_without_case_and_take_lists():
    schedule = config("warmuplr", {"warmup_min_lr": [0.1], "warmup_max_lr": 0.3})
    assert isinstance(schedule, WarmupLR)


def test_any_torch_schedule_is_found_by_its_name():
    optimizer = adamw()
    schedule = config("CosineAnnealingLR", {"T_max": 10, "eta_min": 0.1}, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the engine steps, torch must not complain
        schedule.step()
    expected = 0.1 + 0.4 * (1 + math.cos(math.pi / 10)) / 2
    assert optimizer.param_groups[0]["lr"] == approx(expected)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("WarmupLr2", {}, r"scheduler.type: no scheduler is named 'WarmupLr2'; did you mean"),
        ("types", {}, "scheduler.type: no scheduler is named 'types'"),
        (
            "WarmupLR",
            {"warmup_num_step": 3},
            "scheduler.params.warmup_num_step: unknown key; did you mean 'warmup_num_steps'",
        ),
        ("WarmupDecayLR", {}, "scheduler.params.total_num_steps: required, but not given"),
        (
            "WarmupLR",
            {"warmup_type": "cubic"},
            "scheduler.params.warmup_type: expected 'log' or 'linear', got \"cubic\"",
        ),
        (
            "WarmupLR",
            {"warmup_num_steps": "many"},
            'scheduler.params.warmup_num_steps: expected a number, got "many"',
        ),
        (
            "WarmupLR",
            {"warmup_min_lr": [0.1, 0.2]},
            "scheduler.params.warmup_min_lr: .*2 values for 1 groups",
        ),
        (
            "WarmupLR",
            {"warmup_max_lr": -1},
            "scheduler.params.warmup_max_lr: .*at least 0 .*got -1",
        ),
        (
            "WarmupDecayLR",
            {"total_num_steps": 0},
            "scheduler.params.total_num_steps: expected a number above 0, got 0",
        ),
        (
            "OneCycle",
            {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0, "cycle_first_step_size": 0},
            "scheduler.params.cycle_first_step_size: expected a number above 0, got 0",
        ),
        (
            "LRRangeTest",
            {"lr_range_test_step_size": 0},
            "lr_range_test_step_size: expected a number above 0",
        ),
        ("LRRangeTest", {"lr_range_test_staircase": 1}, "expected true or false, got 1"),
        ("LambdaLR", {}, "scheduler.params.lr_lambda: LambdaLR needs it"),
    ],
)
def test_a_wrong_scheduler_section_names_the_path(name, params, message):
    with pytest.raises(ConfigError, match=message):
        config(name, params)


def test_all_wrong_parameters_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        config("WarmupDecayLR", {"steps": 3, "warmup_type": "log", "warmup_num_steps": True})
    assert len(caught.value.problems) == 3


def test_a_plugins_schedule_is_called_like_torchs():
    class Halving:
        def __init__(self, optimizer, factor=0.5):
            self.optimizer, self.factor = optimizer, factor

        def step(self):
            for group in self.optimizer.param_groups:
                group["lr"] *= self.factor

    registry = Registry.installed()
    registry.add("schedulers", "Halving", Halving)
    optimizer = adamw()
    make_schedule("halving", {"factor": 0.25}, optimizer, registry).step()
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_a_clients_schedule_is_taken_as_it_is_or_made_by_a_callable():
    optimizer = adamw()
    own = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert adopt_schedule(own, optimizer) is own
    made = adopt_schedule(lambda o: torch.optim.lr_scheduler.StepLR(o, 1), optimizer)
    assert made.optimizer is optimizer


def test_a_clients_schedule_over_shared_groups_is_its_own_optimizers():
    client = adamw()
    facade = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    facade.param_groups = client.param_groups
    adopt_schedule(torch.optim.lr_scheduler.StepLR(client, 1), facade)


def test_a_clients_schedule_of_another_optimizer_is_refused():
    with pytest.raises(ConfigError, match="StepLR was made for an optimizer that is not trained"):
        adopt_schedule(torch.optim.lr_scheduler.StepLR(adamw(), 1), adamw())


@pytest.mark.parametrize("client", [3, lambda optimizer: None])
def test_what_is_no_schedule_is_refused(client):
    with pytest.raises(ConfigError, match="lr_scheduler must have a method step"):
        adopt_schedule(client, adamw())

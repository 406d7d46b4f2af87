"""States in host memory, where that is the device's memory too: the same numbers, nothing more."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from drivetrain_kernels.rules import FusedAdam, FusedLamb, FusedLion, FusedSGD
from drivetrain_offload.homes.delayed import Delayed
from drivetrain_offload.homes.host import HostHome
from drivetrain_offload.homes.speculative import Speculative
from drivetrain_offload.homes.split import SplitHome, cuts, part_of
from drivetrain_offload.homes.zenflow import ByImportance
from drivetrain_offload.host.side import HostSide
from drivetrain_offload.specs import refuse_communicating, state_bytes
from drivetrain_offload.zenflow_section import ZenFlow
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

from drivetrain.contracts import Segment, WrappedRule
from drivetrain.errors import ConfigError
from drivetrain.optimization.torch_rule import TorchRule
from drivetrain.states.device_home import DeviceHome, FlatStates
from drivetrain.testing import assert_trains_like_reference, run_distributed

RULES = {
    "torch Adam": lambda: TorchRule(torch.optim.AdamW, {"lr": 1e-2}),
    "torch NAdam": lambda: TorchRule(torch.optim.NAdam, {"lr": 1e-2}),
    "Adam": lambda: FusedAdam(lr=1e-2, weight_decay=0.1),
    "Adam, rounding stochastically": lambda: FusedAdam(
        lr=1e-2, state_dtype="bf16", stochastic_rounding=True
    ),
    "Lion": lambda: FusedLion(lr=1e-3),
    "SGD": lambda: FusedSGD(lr=0.1, momentum=0.9),
    "Lamb": lambda: FusedLamb(lr=1e-2),
}


STOCHASTIC = "Adam, rounding stochastically"  # knows no float16, and cuts change its numbers
CASES = [
    (rule, precision, ratio)
    for rule, precision, ratio in product(RULES, PRECISIONS, (1.0, 0.5))
    if rule != STOCHASTIC or (precision != "fp16" and ratio == 1.0)
]


@pytest.mark.parametrize(("rule", "precision", "ratio"), CASES)
def test_numbers_are_those_of_the_device(rule: str, precision: str, ratio: float) -> None:
    made = RULES[rule]()
    spec = spec_of(made, precision, padding=130)  # 200 elements
    with opened() as job:
        (home,) = place(job, [spec], ratio=ratio)
        parameters = adopt(home)
        other, expected = on_device(spec)
        for number in range(4):
            gradient = values(spec, number + 10, spec.gradient_dtype)
            for each in (home, other):
                step(each, gradient, {**made.defaults, "lr": 1e-2 / (number + 1)}, 0.5)
        assert_same(home, parameters, other, expected)


def test_nothing_runs_beside_the_rank_where_memory_is_one() -> None:
    rule = FusedAdam()
    with opened() as job:
        before = set(threading.enumerate())
        (home,) = place(job, [spec_of(rule)])
        adopt(home)
        step(home, values(home.spec, 2, torch.bfloat16), rule.defaults)
        assert set(threading.enumerate()) <= before


def test_frozen_buckets_stay_on_the_device() -> None:
    with opened() as job:
        frozen, trained = place(job, [spec_of(None, key="b0"), spec_of(FusedAdam(), key="b1")])
    assert type(frozen) is DeviceHome
    assert type(trained) is HostHome


def test_states_say_that_they_are_in_host_memory() -> None:
    with opened() as job:
        (home,) = place(job, [spec_of(FusedAdam())])
        adopt(home)
        assert {fragment.home for fragment in home.fragments()} == {"host"}


def test_a_fragment_that_is_written_is_what_the_next_update_begins_from() -> None:
    rule = FusedSGD(lr=1.0)
    with opened() as job:
        (home,) = place(job, [spec_of(rule)])
        parameters = adopt(home)
        for fragment in home.fragments():
            fragment.write(torch.full_like(fragment.read(), 3.0))
        step(home, torch.ones(home.spec.numel, dtype=torch.bfloat16), rule.defaults)
        assert parameters[:70].tolist() == [2.0] * 70


# -- twin flow -------------------------------------------------------------------------------------


def test_the_first_share_of_all_elements_stays_on_the_device() -> None:
    rule = FusedAdam()
    specs = [spec_of(rule, key=f"b{number}", padding=30) for number in range(3)]  # of 100 each
    assert cuts(specs, 1.0) == [0, 0, 0]
    assert cuts(specs, 0.0) == [100, 100, 100]
    assert cuts(specs, 0.5) == [100, 0, 0]
    assert cuts(specs, 0.2) == [100, 100, 0]
    assert cuts(specs, 0.75) == [64, 0, 0]  # of 75


def test_frozen_buckets_do_not_count_in_the_ratio() -> None:
    specs = [spec_of(None, padding=130), spec_of(FusedAdam(), padding=130)]
    assert cuts(specs, 0.65) == [0, 64]  # of 70


def test_whole_tensors_are_not_cut() -> None:
    specs = [spec_of(FusedLamb(), padding=30)]  # of 35, 11 and 24 elements
    assert cuts(specs, 0.66) == [0]
    assert cuts(specs, 0.65) == [35]
    assert cuts(specs, 0.31) == [46]
    assert cuts(specs, 0.0) == [100]


def test_at_most_one_bucket_is_in_two_homes() -> None:
    specs = [spec_of(FusedAdam(), key=f"b{number}", padding=130) for number in range(3)]
    with opened() as job:
        homes = place(job, specs, ratio=0.5)
    assert [type(home) for home in homes] == [DeviceHome, SplitHome, HostHome]


def test_parts_of_a_bucket_hold_parts_of_its_tensors() -> None:
    spec = spec_of(FusedAdam())
    rest = part_of(spec, 40, spec.numel)
    found = [(s.name, s.start, s.numel, s.offset) for s in rest.segments]
    assert found == [("b0.p1", 5, 6, 0), ("b0.p2", 0, 24, 6)]
    assert rest.numel == spec.numel - 40
    assert rest.key != spec.key


def test_the_rest_may_be_in_files(tmp_path: Path) -> None:
    rule = FusedAdam(lr=1e-2)
    spec = spec_of(rule, padding=130)
    with opened() as job:
        (home,) = place(job, [spec], ratio=0.5, device="nvme", nvme_path=str(tmp_path))
        assert type(home) is SplitHome
        parameters = adopt(home)
        other, expected = on_device(spec)
        for number in range(3):
            for each in (home, other):
                step(each, values(spec, number, torch.bfloat16), rule.defaults)
        assert_same(home, parameters, other, expected)


@pytest.mark.parametrize("dims", [(20, 10), (200,)])
def test_a_tensor_in_two_homes_is_one_fragment_of_each_kind(dims: tuple[int, ...]) -> None:
    rule = FusedAdam()
    spec = spec_of(rule, padding=130)
    whole = replace(spec, segments=(Segment("w", dims, 0, 200, 0),))
    with opened() as job:
        (home,) = place(job, [whole], ratio=0.5)
        assert type(home) is SplitHome
        adopt(home)
        master = next(f for f in home.fragments() if f.kind == "master")
        assert [f.kind for f in home.fragments()].count("master") == 1
        assert sum(box.numel for box in master.boxes) == 200
        assert torch.equal(states(home)["w", "master"].flatten(), values(whole, 1)[:200])
        master.write(torch.arange(200.0))
        assert torch.equal(states(home)["w", "master"].flatten(), torch.arange(200.0))


def test_a_split_bucket_counts_one_step() -> None:
    rule = FusedAdam()
    with opened() as job:
        (home,) = place(job, [spec_of(rule, padding=130)], ratio=0.5)
        assert type(home) is SplitHome
        adopt(home)
        step(home, values(home.spec, 3, torch.bfloat16), rule.defaults)
        assert home.step == 1
        home.step = 7
        step(home, values(home.spec, 3, torch.bfloat16), rule.defaults)
        assert home.step == 8
        kinds = {kind for _, kind in states(home)}
        assert kinds == {"master", "exp_avg", "exp_avg_sq"}


# -- memory ----------------------------------------------------------------------------------------


def test_states_are_counted_with_their_dtypes() -> None:
    spec = spec_of(FusedAdam(state_dtype="bf16"))
    assert state_bytes(spec) == spec.numel * (4 + 2 + 2)
    assert state_bytes(spec_of(FusedSGD(), "fp32")) == 0


WAYS = {
    "plain": ({}, None, 12),
    "late": ({"delayed_update": True}, None, 12 + 6),
    "guessing": ({"super_offload": True}, None, 12 + 14),
    "by importance": ({}, ZenFlow(), 12 + 11),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_home_takes_the_bytes_a_parameter_that_are_checked_and_documented(way: str) -> None:
    section, zenflow, expected = WAYS[way]
    spec = spec_of(FusedAdam())
    with opened() as job:
        (home,) = place(job, [spec], zenflow, **section)
        parameters = adopt(home)
        sizes = {tensor.data_ptr(): tensor.nbytes for tensor in tensors_of(home)}
        del sizes[parameters.data_ptr()]
        counts = 16 if zenflow is not None else 0  # two integers
        assert sum(sizes.values()) == expected * spec.numel + counts
    extra = {
        "plain": 0,
        "late": Delayed.extra_bytes(spec),
        "guessing": Speculative.extra_bytes(spec, state_bytes(spec)),
        "by importance": ByImportance.extra_bytes(spec),
    }
    assert state_bytes(spec) + extra[way] == expected * spec.numel


def tensors_of(part: object) -> Iterator[torch.Tensor]:
    """Those that a home and its parts hold, without what homes share."""
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, HostSide):
        return
    elif isinstance(part, dict | list):
        for inner in part.values() if isinstance(part, dict) else part:
            yield from tensors_of(inner)
    elif type(part).__module__.startswith(("drivetrain_offload.homes", FlatStates.__module__)):
        yield from tensors_of(vars(part))


class Communicating(FusedSGD):
    def wants_reduced(self, step: int) -> bool:
        return step > 3


def test_a_rule_that_communicates_is_refused_also_inside_another_and_no_other_one() -> None:
    refuse_communicating([spec_of(WrappedRule(FusedAdam()))])
    for rule in (Communicating(lr=1.0), WrappedRule(Communicating(lr=1.0))):
        with pytest.raises(ConfigError, match="communicates gradients by itself"):
            refuse_communicating([spec_of(rule)])


def test_too_little_memory_is_an_error_before_any_is_taken(monkeypatch) -> None:
    spec = spec_of(FusedAdam())
    monkeypatch.setattr("drivetrain_offload.host.memory.available_bytes", lambda: 12 * 73 - 1)
    with opened() as job, pytest.raises(ConfigError, match="needs 876 bytes of masters") as caught:
        place(job, [spec])
    assert "zero_optimization.offload_optimizer" in str(caught.value)
    assert "offload_optimizer.ratio" in str(caught.value)


def test_exactly_enough_memory_is_enough(monkeypatch) -> None:
    monkeypatch.setattr("drivetrain_offload.host.memory.available_bytes", lambda: 12 * 73)
    with opened() as job:
        place(job, [spec_of(FusedAdam())])


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("section", [{}, {"ratio": 0.3}], ids=str)
def test_training_is_that_of_plain_torch(world: int, section: dict[str, float]) -> None:
    assert_trains_like_reference(config(**section), world, model="gpt")


def test_training_in_bf16_is_that_of_plain_torch() -> None:
    settings = {**config(), "bf16": {"enabled": True}}
    assert_trains_like_reference(settings, 2, rtol=2e-2)


def refuse_on_one_rank() -> str:
    import drivetrain_offload.host.memory as memory

    import drivetrain
    from drivetrain.testing.models import mlp

    before, memory.available_bytes = memory.available_bytes, lambda: 1
    try:
        drivetrain.initialize(model=mlp(), config=config())
    except ConfigError as error:
        return str(error)
    finally:
        memory.available_bytes = before
    return ""


def test_too_little_memory_ends_initialize_with_the_arithmetic() -> None:
    for answer in run_distributed(refuse_on_one_rank, 2):
        assert "of host memory for this rank, but only 0 MiB are available" in answer

"""States in host memory beside a device that is not the host, at every stage of ZeRO.

The device is the one in C++ that torch lacks. Its copies end at once, so those of offload are also
carried out as late as they may be: when someone waits for them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain.testing import RanksFailedError, run_distributed
from drivetrain.testing.distributed import start_anew

sys.path.insert(0, str(Path(__file__).parent / "private_use"))

import host_offload
from warp_accelerator import library

STEPS = 4
PRECISIONS: Mapping[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
}


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """Ranks find the device in the cache; they are new ones, see the tests of the device."""
    library().ensure_built()
    start_anew()


def config(stage: int, precision: str, offload: dict[str, Any], **more: Any) -> dict[str, Any]:
    zero: dict[str, Any] = {"offload_optimizer": {"device": "cpu", **offload}}
    if stage:
        zero |= {"stage": stage, "stage3_param_persistence_threshold": 100}
    return {
        # not fused, so that the device and the host run one and the same kernel
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "fused": False, "foreach": False}},
        "steps_per_print": 0,
        "gradient_clipping": 0.1,  # bites
        "zero_optimization": zero,
        **PRECISIONS[precision],
        **more,
    }


@cache
def without(stage: int, precision: str, world: int, accumulation: int = 1) -> list[Any]:
    given = config(stage, precision, {"device": "none"}, gradient_accumulation_steps=accumulation)
    return run_distributed(host_offload.losses_and_weights, world, given, STEPS)


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    for (losses, weights), (other_losses, other_weights) in zip(found, expected, strict=True):
        assert losses == other_losses
        for name, value in other_weights.items():
            assert torch.equal(weights[name], value), name


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_is_bitwise_that_without_offload(stage: int, precision: str, late: bool) -> None:
    given = config(stage, precision, {})
    found = run_distributed(_train, 2, given, STEPS, late)
    assert_equal(found, without(stage, precision, 2))


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_a_share_that_stays_changes_nothing(stage: int, ratio: float) -> None:
    found = run_distributed(_train, 2, config(stage, "bf16", {"ratio": ratio}), STEPS, True)
    assert_equal(found, without(stage, "bf16", 2))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("section", [{}, {"super_offload": True}], ids=str)
def test_accumulated_gradients_come_down_in_the_last_backward(
    stage: int, precision: str, section: dict[str, Any]
) -> None:
    given = config(stage, precision, section, gradient_accumulation_steps=2)
    found = run_distributed(_train, 2, given, STEPS, True)
    assert_equal(found, without(stage, precision, 2, 2))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_guesses_change_nothing(stage: int, precision: str) -> None:
    given = config(stage, precision, {"super_offload": True})
    found = run_distributed(_train, 2, given, STEPS, True)
    assert_equal(found, without(stage, precision, 2))


@pytest.mark.parametrize(
    "section", [{}, {"ratio": 0.5}, {"delayed_update": True}, {"super_offload": True}], ids=str
)
def test_parameters_may_wait_in_host_memory_too(section: dict[str, Any]) -> None:
    given = config(3, "bf16", section)
    expected = run_distributed(_train, 2, given, STEPS, False)
    given["zero_optimization"]["offload_param"] = {"device": "cpu"}
    assert_equal(run_distributed(_train, 2, given, STEPS, True), expected)


@pytest.mark.parametrize("name", ["Muon", "Lamb", "Lion", "Adagrad"])
@pytest.mark.parametrize("stage", [0, 2])
def test_other_optimizers_are_run_on_the_host(stage: int, name: str) -> None:
    optimizer = {"optimizer": {"type": name, "params": {"lr": 1e-2}}}
    found, expected = (
        run_distributed(_train, 2, config(stage, "bf16", offload, **optimizer), STEPS, True)
        for offload in ({}, {"device": "none"})
    )
    for (losses, _), (others, _) in zip(found, expected, strict=True):
        assert losses == pytest.approx(others, rel=1e-3)  # kernels of two devices


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_columns_may_be_updated_on_the_device(stage: int, overlap: bool) -> None:
    given = config(stage, "bf16", {})
    given["zero_optimization"]["zenflow"] = {
        "topk_ratio": 0.2,
        "update_interval": 2,
        "select_interval": 2,
        "overlap_step": overlap,
    }
    early, late = (run_distributed(_train, 2, given, 8, late) for late in (False, True))
    assert_equal(late, early)
    (seen,) = run_distributed(host_offload.where_rules_run, 1, given)
    assert {(device, thread) for device, thread, _ in seen} == {
        ("cpu", "drivetrain-offload"),
        ("warp", "MainThread"),
    }


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_late_updates_are_the_same_however_late_copies_are(stage: int) -> None:
    given = config(stage, "bf16", {"delayed_update": True})
    early, late = (run_distributed(_train, 2, given, STEPS, late) for late in (False, True))
    assert_equal(late, early)
    losses = [losses for losses, _ in early]
    others = [losses for losses, _ in without(stage, "bf16", 2)]
    assert [each[0] for each in losses] == [each[0] for each in others]
    assert losses != others


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_clipping_by_an_infinite_norm_leaves_weights_and_states_finite(stage: int) -> None:
    """The device is not waited for, so the step after it tells."""
    modes: list[dict[str, Any]] = [
        {"device": "none"},
        {},
        {"ratio": 0.5},
        {"delayed_update": True},
        {"super_offload": True},
    ]
    unchecked = {"bf16": {"enabled": True, "check_grad_overflow": False}}
    given = [config(stage, "fp32", {"device": "none"})]
    given += [config(stage, "fp32", mode, **unchecked) for mode in modes]
    zenflow = config(stage, "fp32", {}, **unchecked)
    zenflow["zero_optimization"]["zenflow"] = {"topk_ratio": 0.2, "update_interval": 2}
    found = run_distributed(_after_infinite_gradients, 2, [*given, zenflow])
    for rank in found:
        for wrong, refused in rank:
            assert wrong == []
            assert re.match("the gradient norm of step 3 was (inf|nan), so parameters", refused)


@pytest.mark.parametrize("mode", [{}, {"super_offload": True}], ids=str)
def test_small_buckets_take_turns_in_the_lanes(mode: dict[str, Any]) -> None:
    buckets = {"data_parallel": {"bucket_bytes": 2000, "first_bucket_bytes": 500}}
    expected, found = (
        run_distributed(_train, 1, config(0, "fp32", offload, **buckets), STEPS, True)
        for offload in ({"device": "none"}, mode)
    )
    assert_equal(found, expected)


def test_masters_and_states_leave_the_device() -> None:
    with_states, without_states = (_device_bytes(offload) for offload in ({"device": "none"}, {}))
    numel = sum(p.numel() for p in _model().parameters())
    assert with_states - without_states == pytest.approx(12 * numel, rel=0.05)


def test_rules_run_on_one_thread_over_host_memory() -> None:
    (seen,) = run_distributed(host_offload.where_rules_run, 1, config(0, "bf16", {}))
    assert seen == {("cpu", "drivetrain-offload", False)}


def test_with_a_ratio_both_sides_update() -> None:
    given = config(0, "bf16", {"ratio": 0.5})
    (seen,) = run_distributed(host_offload.where_rules_run, 1, given)
    assert {(device, thread) for device, thread, _ in seen} == {
        ("cpu", "drivetrain-offload"),
        ("warp", "MainThread"),
    }


def test_an_error_of_the_rule_is_raised_by_the_step_and_by_that_alone() -> None:
    (found,) = run_distributed(host_offload.fails_in_the_worker, 1, config(0, "bf16", {}))
    assert found == ["ZeroDivisionError: planted"]


@pytest.mark.parametrize("section", [{}, {"delayed_update": True}], ids=str)
def test_ranks_that_wait_for_one_whose_update_failed_end_with_its_error(
    section: dict[str, Any],
) -> None:
    given = config(2, "bf16", section)
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(host_offload.fails_on_rank_1, 2, given)
    assert caught.value.errors[1].error == "ZeroDivisionError: planted"
    assert "rank 1 failed: ZeroDivisionError: planted" in caught.value.errors[0].error


# -- pinned memory ---------------------------------------------------------------------------------


def test_only_the_lanes_are_locked() -> None:
    (answer,) = run_distributed(_pinning, 1, config(0, "bf16", {}), False)
    locked, messages, _ = answer
    numel = sum(p.numel() for p in _model().parameters())
    assert messages == []
    # three lanes for gradients and parameters of the largest bucket, here the model
    assert locked == 3 * 2 * 2 * numel


def test_a_budget_is_kept_and_said_once() -> None:
    offload = {"pinned_memory_budget": 10_000}
    (answer,) = run_distributed(_pinning, 1, config(0, "bf16", offload), False)
    locked, messages, losses = answer
    assert locked <= 10_000
    assert len(messages) == 1
    assert "pinned_memory_budget (10,000)" in messages[0]
    assert losses == without(0, "bf16", 1)[0][0][:2]


def test_training_goes_on_where_pages_cannot_be_locked() -> None:
    (answer,) = run_distributed(_pinning, 1, config(0, "bf16", {}), True)
    locked, messages, losses = answer
    assert locked == 0
    assert len(messages) == 1
    assert "cannot lock pages" in messages[0]
    assert "RLIMIT_MEMLOCK" in messages[0]
    assert losses == without(0, "bf16", 1)[0][0][:2]


def test_nothing_is_locked_where_that_is_not_wanted() -> None:
    given = config(0, "bf16", {"pin_memory": False})
    (answer,) = run_distributed(_pinning, 1, given, False)
    assert answer[:2] == (0, [])


def _device_bytes(offload: dict[str, Any]) -> int:
    start_anew()  # a thread of autograd may still hold on to the model of the call before
    (found,) = run_distributed(host_offload.device_bytes, 1, config(0, "bf16", offload))
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("section", [{}, {"super_offload": True}, {"ratio": 0.5}], ids=str)
def test_what_changes_between_backward_and_step_counts(
    precision: str, section: dict[str, Any]
) -> None:
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}, "gradient_clipping": 0.0}
    given = config(1, precision, section, **sgd)
    run_distributed(host_offload.changed_between_backward_and_step, 2, given, (1, 2, 3))


def _train(given: dict[str, Any], steps: int, late: bool) -> Any:
    return host_offload.losses_and_weights(given, steps, late=late)


def _pinning(given: dict[str, Any], fails: bool) -> Any:
    return host_offload.pinning(given, fails=fails)


def _model() -> torch.nn.Module:
    from drivetrain.testing.models import tiny_gpt

    return tiny_gpt()


def _after_infinite_gradients(configs: list[dict[str, Any]]) -> list[tuple[list[str], str]]:
    return [host_offload.after_an_infinite_gradient(config) for config in configs]

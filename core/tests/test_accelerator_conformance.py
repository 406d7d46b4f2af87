"""The kit for accelerators passes a sound one, and each flaw fails the one check made for it."""

from __future__ import annotations

from unittest import SkipTest

import broken_accelerators as broken
import pytest
from eager_accelerator import Eager

from drivetrain.job.accelerator_choice import HostAccelerator
from drivetrain.plan.registry import Entry, Registry, core_entries
from drivetrain.testing import AcceleratorConformance

CHECKS = AcceleratorConformance.checks()


class TestHost(AcceleratorConformance):
    accelerator = HostAccelerator


class TestStreams(AcceleratorConformance):
    accelerator = broken.Waits


def kit(kind, **attributes) -> AcceleratorConformance:
    return type("Kit", (AcceleratorConformance,), {"accelerator": kind, **attributes})()


def outcomes(kit: AcceleratorConformance) -> tuple[dict[str, str], dict[str, str]]:
    """What failed and what was skipped: check -> message."""
    failed, skipped = {}, {}
    for name in CHECKS:
        try:
            getattr(kit, name)()
        except SkipTest as skip:
            skipped[name] = str(skip)
        except AssertionError as error:
            failed[name] = str(error)
    return failed, skipped


@pytest.mark.parametrize(
    ("kind", "check", "words"),
    [
        (broken.NoBackend, "test_every_member_is_there", "communication_backend"),
        (broken.Nameless, "test_every_member_is_there", "Nameless.name, found ''"),
        (Eager, "test_the_module_imports_without_torch", "do so inside functions"),
        (broken.ProbeRaises, "test_the_probe_answers", "OSError: libbroken.so"),
        (broken.ProbeSaysTrue, "test_the_probe_answers", "found True; return None"),
        (broken.UnknownDeviceType, "test_torch_knows_the_device_type", "found 'warp'"),
        (broken.NoDevices, "test_every_rank_gets_a_device", "1 or more, found 0"),
        (broken.WrongIndex, "test_every_rank_gets_a_device", "found cpu:1; check"),
        (broken.OtherDevice, "test_every_rank_gets_a_device", "found meta; check"),
        (broken.SetsDefaultDtype, "test_start_leaves_torch_alone", "default dtype at torch.float"),
        (broken.Seeds, "test_start_leaves_torch_alone", "random state"),
        (broken.DoesNotWait, "test_synchronize_waits", "wait for every stream"),
        (broken.NegativeMemory, "test_memory_figures_fit", "found -1; count bytes"),
        (broken.PeakFalls, "test_memory_figures_fit", "not to fall until it is reset"),
        (broken.MebibytesOfMemory, "test_memory_figures_fit", "bytes in use"),
        (broken.LiesAboutBfloat16, "test_claimed_dtypes_work", "in torch.bfloat16 within 8"),
        (broken.ClaimsFloat4, "test_claimed_dtypes_work", "torch.float4_e2m1fn_x2 to work"),
        (broken.PinsGarbage, "test_pinned_memory_holds_its_values", "pin_memory() to keep values"),
        (broken.RangeSwallows, "test_ranges_nest", "return nothing in __exit__"),
        (broken.RangeSeeds, "test_random_state_is_left_alone", "range() to leave the random"),
        (broken.NoSuchBackend, "test_collectives_of_two_ranks", "warp-link"),
        (broken.SilentBackend, "test_collectives_of_two_ranks", "which says 'fake'"),
        (broken.ForgetsRandomStreams, "test_random_streams_go_on", "a restored stream to give"),
        (broken.CountsTwice, "test_update_rules_are_right", "weights updated by SGD"),
        (broken.ScalesInputs, "test_one_rank_learns_what_plain_torch_learns", "at step 0"),
        (
            broken.ScalesInputsOfSecondRank,
            "test_two_ranks_learn_what_plain_torch_learns",
            "the loss of two ranks at step 0",
        ),
        (broken.IgnoresAutocast, "test_autocast_follows_float32", "found torch.float32"),
        (broken.LosesWeights, "test_training_continues_from_a_checkpoint", "after loading"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_each_flaw_fails_the_check_that_is_made_for_it_and_no_other(kind, check, words):
    failed, _ = outcomes(kit(kind))
    assert list(failed) == [check]
    assert failed[check].startswith(f"{check}: expected ")
    assert words in failed[check]


def test_where_the_device_is_absent_its_checks_are_skipped_with_what_the_probe_says():
    failed, skipped = outcomes(kit(broken.Absent))
    assert not failed
    assert set(CHECKS) - set(skipped) == set(CHECKS[:4])
    assert "no such device on this machine" in skipped["test_the_device_is_present"]
    assert skipped["test_claimed_dtypes_work"].endswith("test_synchronize_waits does not pass")


def test_a_class_that_is_installed_under_another_name_is_not_found_by_its_own(monkeypatch):
    entry = Entry("accelerators", "other", "acme", "1.0", "broken_accelerators:Host")
    installed = Registry([*core_entries(), entry])
    monkeypatch.setattr(Registry, "installed", classmethod(lambda cls: installed))
    with pytest.raises(AssertionError, match=r"named 'broken' for .*:Host, found 'other'; give"):
        kit(broken.Host).test_a_config_finds_it_by_its_name()


def test_every_check_has_a_flaw_that_fails_it():
    marks = test_each_flaw_fails_the_check_that_is_made_for_it_and_no_other.pytestmark
    caught = {check for mark in marks for _, check, _ in mark.args[1]}
    elsewhere = {
        "test_expected_failures_name_checks",
        "test_the_device_is_present",
        "test_a_config_finds_it_by_its_name",
        "test_collectives_of_one_rank",
    }
    assert set(CHECKS) - caught == elsewhere


# -- expected failures ---------------------------------------------------------------------------


def test_a_declared_failure_is_skipped_with_its_reason():
    reasons = {"test_pinned_memory_holds_its_values": "the driver cannot"}
    failed, skipped = outcomes(kit(broken.PinsGarbage, expected_failures=reasons))
    assert not failed
    assert skipped["test_pinned_memory_holds_its_values"] == "fails as declared: the driver cannot"


def test_a_declared_failure_that_passes_is_an_error():
    failed, _ = outcomes(kit(broken.Host, expected_failures={"test_ranges_nest": "not yet"}))
    assert list(failed) == ["test_ranges_nest"]
    assert "delete it from expected_failures" in failed["test_ranges_nest"]


def test_a_declared_failure_that_names_no_check_is_an_error():
    wrong = kit(broken.Host, expected_failures={"test_range_nest": "a slip"})
    with pytest.raises(AssertionError, match="found test_range_nest; there are test_expected"):
        wrong.test_expected_failures_name_checks()

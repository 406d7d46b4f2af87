"""Which implementation wins, who is refused, and what a failed build leads to."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from drivetrain_kernels import Example, Op, Provider, Registry
from drivetrain_kernels.checks import Checker
from drivetrain_kernels.native import NativeLibrary

from drivetrain.errors import BuildError, PluginError
from drivetrain.job.accelerator_choice import HostAccelerator, active, active_accelerator


def reference(values):
    return values + 1


def make_op(name="plus"):
    return Op(
        name,
        "(Tensor values) -> Tensor",
        reference,
        check=lambda values: Checker(name).floating(values, "values"),
        examples=lambda device: iter([Example("one", (torch.ones(1, device=device),))]),
        refusals=lambda device: iter([]),
        fake=torch.empty_like,
    )


def provider(name, accelerator=None, answer=10.0, device_type="cpu"):
    made = Provider(name, "1.0", device_type, accelerator)
    made.implement("plus", lambda values: values + answer)
    return made


@pytest.fixture
def make_registry(request, monkeypatch):
    monkeypatch.delenv("DRIVETRAIN_ACCELERATOR", raising=False)
    monkeypatch.delenv("DRIVETRAIN_REQUIRE_NATIVE", raising=False)

    def make(*providers, active=None):
        library = torch.library.Library("drivetrain", "FRAGMENT")
        request.addfinalizer(library._destroy)
        asked = []

        def find(device_type):
            asked.append(device_type)
            return [each for each in providers if each.device_type == device_type]

        registry = Registry(find, lambda: ["cpu"], library, active or (lambda: registry.active))
        registry.define(make_op())
        registry.asked, registry.active = asked, None
        return registry

    return make


def result(registry):
    (plus,) = registry.ops()
    return float(plus.call(torch.zeros(())))


def test_the_reference_runs_where_nobody_implements(make_registry):
    registry = make_registry()
    assert result(registry) == 1.0
    (found,) = registry.implementations()
    assert (found.provider, found.device_type) == ("reference", "cpu")
    assert found.reason == "no installed package implements it for cpu"


def test_the_devices_own_provider_beats_the_reference(make_registry):
    registry = make_registry(provider("acme"))
    assert result(registry) == 10.0
    assert registry.implementations()[0].provider == "acme 1.0"


def test_the_active_accelerators_provider_beats_the_devices_own(make_registry):
    registry = make_registry(provider("own"), provider("fast", "turbo", answer=20.0))
    assert result(registry) == 10.0
    registry.active = "turbo"
    assert result(registry) == 20.0
    assert registry.implementations()[0].reason.startswith("the active accelerator's")
    registry.active = None
    assert result(registry) == 10.0


class Turbo(HostAccelerator):
    name = "turbo"


def test_an_accelerators_provider_counts_while_a_job_on_it_is_open(make_registry):
    fast = provider("fast", "turbo", answer=20.0)
    registry = make_registry(provider("own"), fast, active=active_accelerator)
    with active(Turbo()):  # which every open job is in
        assert result(registry) == 20.0
        with active(HostAccelerator()):
            assert result(registry) == 10.0
        assert result(registry) == 20.0
    assert result(registry) == 10.0


def test_the_environment_may_name_the_active_accelerator(make_registry, monkeypatch):
    monkeypatch.setenv("DRIVETRAIN_ACCELERATOR", "turbo")
    registry = make_registry(provider("own"), provider("fast", "turbo", answer=20.0))
    assert result(registry) == 20.0


def test_two_of_equal_rank_are_refused_by_name(make_registry):
    registry = make_registry(provider("acme"), provider("zenith"))
    with pytest.raises(PluginError, match=r"acme 1.0 and zenith 1.0 both implement drivetrain::p"):
        result(registry)


def test_native_modules_are_asked_for_at_the_first_dispatch_only(make_registry):
    registry = make_registry(provider("acme"))
    assert registry.asked == []
    result(registry)
    result(registry)
    assert registry.asked == ["cpu"]


def test_other_devices_get_their_own_choice(make_registry):
    registry = make_registry(provider("acme", device_type="cuda"))
    assert result(registry) == 1.0
    assert registry.implementations(["cuda"])[0].provider == "acme 1.0"


def test_an_op_is_declared_once(make_registry):
    registry = make_registry()
    with pytest.raises(PluginError, match="drivetrain::plus is declared twice"):
        registry.define(make_op())


def test_a_provider_implements_an_op_once():
    with pytest.raises(PluginError, match=r"acme 1.0 implements drivetrain::plus twice for cpu"):
        provider("acme").implement("plus", reference)


@pytest.fixture
def broken(tmp_path, monkeypatch):
    monkeypatch.setenv("DRIVETRAIN_CACHE", str(tmp_path / "cache"))
    source = Path(tmp_path / "plus.cpp")
    source.write_text("this is not C++\n")
    made = Provider("acme", "1.0", "cpu")
    made.implement_native("plus", NativeLibrary("acme", [source]), lambda library: library.plus)
    return made


def test_a_failed_build_falls_back_to_the_reference_and_says_so_once(make_registry, broken, caplog):
    registry = make_registry(broken)
    with caplog.at_level(logging.WARNING, logger="drivetrain.kernels"):
        assert result(registry) == 1.0
        registry.active = "another"
        assert result(registry) == 1.0
    (record,) = caplog.records
    assert "drivetrain::plus on cpu runs the slower PyTorch reference" in record.message
    assert "error" in record.message
    found = registry.implementations()[0]
    assert found.provider == "reference"
    assert found.reason.startswith("acme 1.0 cannot be built: cannot build acme")


def test_native_kernels_can_be_required(make_registry, broken, monkeypatch):
    monkeypatch.setenv("DRIVETRAIN_REQUIRE_NATIVE", "1")
    with pytest.raises(BuildError, match=r"drivetrain::plus on cpu: cannot build acme: .*plus.cpp"):
        result(make_registry(broken))


def test_arguments_are_checked_before_any_implementation(make_registry):
    registry = make_registry(provider("acme"))
    with pytest.raises(ValueError, match=r"drivetrain::plus: values is int64; expected float32"):
        registry.ops()[0].call(torch.zeros((), dtype=torch.int64))


def with_second_choice(broken, make):
    made = Provider("acme", "1.0", "cpu")
    library = broken.offers["plus"].library
    made.implement_native("plus", library, lambda loaded: loaded.plus, otherwise=make)
    return made


def test_a_second_choice_runs_where_native_kernels_cannot_be_built(make_registry, broken, caplog):
    registry = make_registry(with_second_choice(broken, lambda: lambda values: values + 5))
    with caplog.at_level(logging.WARNING, logger="drivetrain.kernels"):
        assert result(registry) == 5.0
    assert caplog.records == []
    found = registry.implementations()[0]
    assert found.provider == "acme 1.0"
    assert "python, as the native kernels cannot be built: cannot build acme" in found.reason


def test_without_either_choice_the_reference_runs_and_both_reasons_are_told(make_registry, broken):
    def make():
        raise BuildError("triton is not installed")

    registry = make_registry(with_second_choice(broken, make))
    assert result(registry) == 1.0
    reason = registry.implementations()[0].reason
    assert "cannot build acme" in reason
    assert reason.endswith("; triton is not installed")


def test_a_second_choice_does_not_pass_for_native(make_registry, broken, monkeypatch):
    monkeypatch.setenv("DRIVETRAIN_REQUIRE_NATIVE", "1")
    registry = make_registry(with_second_choice(broken, lambda: lambda values: values + 5))
    with pytest.raises(BuildError, match="cannot build acme"):
        result(registry)


def test_what_is_made_later_is_made_at_the_first_call(make_registry):
    made, calls = Provider("acme", "1.0", "cpu"), []

    def make():
        calls.append(1)
        return lambda values: values + 7

    made.implement_later("plus", make)
    registry = make_registry(made)
    assert calls == []
    assert [result(registry), result(registry)] == [7.0, 7.0]
    assert calls == [1]

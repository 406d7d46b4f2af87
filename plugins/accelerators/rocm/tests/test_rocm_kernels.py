"""The HIP kernels compile, and are offered where they can run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from drivetrain_kernels import Provider, ops
from drivetrain_kernels.gpu import BINDINGS, Kernels, gpu_library
from drivetrain_kernels.native import Toolchain
from drivetrain_rocm import kernels
from drivetrain_rocm.kernels import hipcc, kernel_library, names_of

OLDEST = "gfx90a"
"""An architecture that every hipcc knows which is still in use."""


@pytest.mark.skipif(not hipcc().found(), reason="hipcc is not installed")
def test_the_sources_compile_and_hold_every_entry_that_the_calls_need():
    flags = ["-O1" if flag == "-O3" else flag for flag in kernels.flags_for([OLDEST])]
    library = gpu_library("drivetrain_rocm_compile_test", toolchain=hipcc(), flags=flags).load()
    for bind in BINDINGS.values():
        bind(Kernels(library, streams=None))


def registered(monkeypatch, compiler):
    monkeypatch.setattr(kernels, "hipcc", lambda: compiler)
    kernel_library.cache_clear()
    provider = Provider("drivetrain-rocm", "0", "cuda")
    kernels.register(provider)
    kernel_library.cache_clear()
    return provider


NO_COMPILER = Toolchain("HIP", "DRIVETRAIN_TEST_NO_COMPILER", ("no-such-compiler",))


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    device = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)


def test_it_offers_every_op_for_the_devices_present(a_gpu, monkeypatch):
    provider = registered(monkeypatch, NO_COMPILER)
    assert set(provider.offers) == {op.name for op in (*ops("training"), *ops("attention"))}
    assert [library.name for library in provider.libraries] == ["drivetrain_rocm_gfx942"]
    assert provider.offers["adam"].otherwise is not None


def test_cuda_gets_nothing_from_here(a_gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    assert registered(monkeypatch, NO_COMPILER).offers == {}


def test_architectures_are_built_ahead_of_time_where_there_is_hipcc(monkeypatch):
    compiler = SimpleNamespace(found=lambda: True, role="HIP")
    names = [library.name for library in registered(monkeypatch, compiler).libraries]
    assert names == ["drivetrain_rocm_gfx90a", "drivetrain_rocm_gfx942"]
    assert registered(monkeypatch, NO_COMPILER).libraries == []


def test_features_are_no_part_of_an_architecture():
    assert names_of(["gfx942:sramecc+:xnack-", "gfx90a", "gfx942"]) == ("gfx90a", "gfx942")


def test_hipcc_compiles_for_amd_where_there_is_nvcc_too(tmp_path):
    fake = tmp_path / "hipcc"
    fake.write_text('#!/bin/sh\necho "$HIP_PLATFORM"\n')
    fake.chmod(0o755)
    compiler = Toolchain("HIP", "DRIVETRAIN_TEST_HIPCXX", (str(fake),), hipcc().environment)
    assert compiler.identity().endswith("amd\n")

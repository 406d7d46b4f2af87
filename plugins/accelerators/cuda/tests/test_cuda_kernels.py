"""The CUDA kernels compile for every architecture promised, and are offered where they can run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from drivetrain_cuda import kernels
from drivetrain_cuda.kernels import AHEAD_OF_TIME, kernel_library, names_of, nvcc
from drivetrain_kernels import Provider, ops
from drivetrain_kernels.gpu import BINDINGS, Kernels, gpu_library
from drivetrain_kernels.native import Toolchain

needs_nvcc = pytest.mark.skipif(not nvcc().found(), reason="nvcc is not installed")


@pytest.fixture(scope="module")
def compiled():
    """One library for all architectures, hardly optimised: that would take most of the time."""
    quick = ("-O1", "-Xcicc=-O1", "-Xptxas=-O0")
    flags = [flag for flag in kernels.flags_for(AHEAD_OF_TIME) if flag != "-O3"]
    name = "drivetrain_cuda_compile_test"
    return gpu_library(name, toolchain=nvcc(), flags=[*flags, *quick]).load()


def test_the_architectures_promised_are_those_of_a100_h100_and_b200():
    assert AHEAD_OF_TIME == ("80", "90", "100")
    assert names_of([(8, 0), (9, 0), (12, 1)]) == ("80", "90", "121")


@needs_nvcc
def test_every_entry_that_the_calls_need_is_there(compiled):
    for bind in BINDINGS.values():
        bind(Kernels(compiled, streams=None))


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_device_a_call_is_an_error_and_no_crash(compiled):
    class Stream:
        def __init__(self, device):
            pass

        def __enter__(self):
            return 0

        def __exit__(self, *error):
            pass

    quantize = BINDINGS["quantize"](Kernels(compiled, Stream))
    with pytest.raises(RuntimeError, match=r"dt_quantize could not be queued on cpu: .*CUDA"):
        quantize(torch.ones(8), "int8", 8, True)


def registered(monkeypatch, compiler):
    monkeypatch.setattr(kernels, "nvcc", lambda: compiler)
    kernel_library.cache_clear()
    provider = Provider("drivetrain-cuda", "0", "cuda")
    kernels.register(provider)
    kernel_library.cache_clear()
    return provider


NO_COMPILER = Toolchain("CUDA C++", "DRIVETRAIN_TEST_NO_COMPILER", ("no-such-compiler",))


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    capabilities = [(9, 0), (8, 6), (9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])


def test_it_offers_every_op_for_the_devices_present(a_gpu, monkeypatch):
    provider = registered(monkeypatch, NO_COMPILER)
    assert set(provider.offers) == {op.name for op in (*ops("training"), *ops("attention"))}
    assert [library.name for library in provider.libraries] == ["drivetrain_cuda_sm_86_90"]


def test_all_architectures_are_built_ahead_of_time_where_there_is_nvcc(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    compiler = SimpleNamespace(found=lambda: True, role="CUDA C++")
    names = [library.name for library in registered(monkeypatch, compiler).libraries]
    assert names == ["drivetrain_cuda_sm_80", "drivetrain_cuda_sm_90", "drivetrain_cuda_sm_100"]
    assert registered(monkeypatch, NO_COMPILER).libraries == []


def test_rocm_calls_its_devices_cuda_and_gets_nothing_from_here(a_gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert registered(monkeypatch, NO_COMPILER).offers == {}


def test_triton_serves_where_nvcc_is_missing(a_gpu, monkeypatch):
    offers = registered(monkeypatch, NO_COMPILER).offers
    assert offers["adam"].otherwise is not None
    assert offers["flatten"].otherwise is None


def test_the_compiler_is_searched_in_cuda_home(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    nvcc.cache_clear()
    assert nvcc().candidates == ("nvcc", f"{tmp_path}/bin/nvcc")
    nvcc.cache_clear()

"""All instruction-set paths of the CPU kernels return the same bits, whatever the threads."""

from __future__ import annotations

import copy

import pytest
import torch
from drivetrain_cpu import instruction_sets
from drivetrain_cpu.instruction_sets import compilable, runnable, selected
from drivetrain_cpu.kernels import kernel_library, register
from drivetrain_kernels import Provider, ops

from drivetrain.errors import ConfigError

CPU = torch.device("cpu")
# torch's float32 square root is off in the last place, and sums may be added in any order.
NOT_BIT_EQUAL_TO_TORCH = {"adam", "adagrad", "lamb", "norm_squared"}


PATHS = [
    pytest.param(each.name, marks=pytest.mark.long if place > 1 else ())
    for place, each in enumerate(runnable())
]
"""The best two here, each some twenty seconds of a compiler; others are long."""


def functions_of(path, monkeypatch):
    monkeypatch.setenv(instruction_sets.VARIABLE, path)
    provider = Provider("drivetrain-cpu", "0", "cpu")
    register(provider)
    return {name: offer.bind(offer.library.load()) for name, offer in provider.offers.items()}


def outcome(op, function, example):
    arguments = copy.deepcopy(example.arguments)
    with torch.no_grad():
        returned = function(*arguments)
    written = [arguments[position] for position in op.mutated]
    return list(tensors([returned, *written]))


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors(each)


def assert_same(first, second, message):
    for one, other in zip(first, second, strict=True):
        assert one.dtype == other.dtype, message
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=message)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_returns_the_bits_of_the_generic_path_and_of_the_reference(path, monkeypatch):
    functions, generic = functions_of(path, monkeypatch), functions_of("generic", monkeypatch)
    assert set(functions) == {op.name for op in ops()}
    # Those for serving use fused multiply-add where there is one; the conformance kit holds them.
    for op in ops("training"):
        for example in op.examples(CPU):
            message = f"{op.name}({example.label}) on {path}"
            found = outcome(op, functions[op.name], example)
            if op.name != "norm_squared":
                assert_same(found, outcome(op, generic[op.name], example), message)
            if op.name not in NOT_BIT_EQUAL_TO_TORCH:
                assert_same(found, outcome(op, op.reference, example), message)


def special_values():
    """Infinities, NaN of several kinds, zeros, subnormals, ties, and what rounds to infinity."""
    words = [0x7F800000, 0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0, 1, 0x007FFFFF, 0x00008000]
    words += [0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF]
    words += [word | 0x80000000 for word in words]
    values = torch.tensor([word - 2**32 if word >= 2**31 else word for word in words])
    # Every value at every place of a vector, and in what is left over.
    return values.to(torch.int32).view(torch.float32).repeat(17)[:-3]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("seed", [None, 7])
def test_special_values_are_rounded_as_the_reference_rounds_them(path, seed, monkeypatch):
    native, values = functions_of(path, monkeypatch)["sgd"], special_values()
    (op,) = (op for op in ops() if op.name == "sgd")
    zero = torch.zeros_like(values)
    # Steps without a gradient: only the stores change bits.
    hyper = (0.0, 1.0, 0.0, 0.0, False, False)
    for stored in (torch.float32, torch.bfloat16):
        written = []
        for function in (native, torch.no_grad()(op.reference)):
            weights = values.to(stored, copy=True)
            out = torch.ones_like(values, dtype=torch.bfloat16)
            function(weights, zero, None, out, None, 1.0, seed, *hyper)
            ordinary, buffer = zero.to(stored, copy=True), values.bfloat16()
            function(ordinary, zero, buffer, None, None, 1.0, seed, *hyper)
            written.append([weights, out, buffer])
        assert_same(*written, f"{stored} on {path}")


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch):
    functions = functions_of(selected().name, monkeypatch)
    by_name = {op.name: op for op in ops()}
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(300_001, generator=generator) for _ in range(3)]
    values.append(values[0].abs())
    update = (*values, None, None, 1.0, 5)
    calls = {
        "adam": (*update, 1e-3, 0.9, 0.999, 1e-8, 0.1, True, True, 3),
        "lamb": (*update, 1e-3, 0.9, 0.999, 1e-8, 0.1, 0.0, 10.0, True, 3, [0, 70_001, 300_001]),
        "norm_squared": (values,),
        "cast_copy": (torch.empty(300_001, dtype=torch.bfloat16), values[0], None, 0.5, 3),
        "flatten": (torch.empty(600_002, dtype=torch.float16), values[:2]),
        "quantize": (values[0], "int4", 128, False),
    }
    before = torch.get_num_threads()
    try:
        for name, arguments in calls.items():
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                mine = copy.deepcopy(arguments)
                returned = functions[name](*mine)
                found.append(list(tensors([returned, *(mine[at] for at in by_name[name].mutated)])))
            assert_same(found[0], found[1], name)
            assert_same(found[0], found[2], name)
    finally:
        torch.set_num_threads(before)


def test_the_environment_chooses_a_path(monkeypatch):
    monkeypatch.setenv(instruction_sets.VARIABLE, "generic")
    assert selected().name == "generic"
    monkeypatch.delenv(instruction_sets.VARIABLE)
    assert selected() == runnable()[0]


def test_a_path_that_does_not_run_here_is_refused_by_name(monkeypatch):
    monkeypatch.setenv(instruction_sets.VARIABLE, "sve9")
    with pytest.raises(ConfigError, match=r"DRIVETRAIN_CPU_PATH='sve9' does not run here; choose"):
        selected()


def test_a_processor_without_features_runs_the_generic_path(monkeypatch):
    monkeypatch.setattr(instruction_sets, "processor_features", frozenset)
    monkeypatch.setattr(instruction_sets.platform, "machine", lambda: "x86_64")
    assert [path.name for path in runnable()] == ["generic"]
    names = [path.name for path in compilable()]
    assert names == ["amx", "avx512bf16", "avx512", "avx2", "generic"]


def test_every_arm_processor_runs_neon(monkeypatch):
    monkeypatch.setattr(instruction_sets.platform, "machine", lambda: "aarch64")
    assert [path.name for path in runnable()] == ["neon", "generic"]


@pytest.mark.long
def test_every_path_that_compiles_here_builds():
    for path in compilable():
        assert kernel_library(path).ensure_built().exists()

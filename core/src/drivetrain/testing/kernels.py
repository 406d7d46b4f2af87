"""Conformance kit for operators: any implementation against a float64 reference.

A package that implements operators subclasses :class:`KernelConformance` in its own tests::

    from drivetrain_kernels import ops

    class TestAcmeKernels(KernelConformance):
        ops = ops()
        device = "acme"
        provider = "acme-kernels"
        expected_failures = {"lamb::test_repeats_itself": "sums in any order"}

Expected failures are strict: one that passes fails the suite, and so does one that names no check.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import pytest
import torch

OPCHECK_EXAMPLES = 6
"""Examples per op that ``torch.library.opcheck`` is run on, spread over all of them; it is slow."""


class Tolerance(Protocol):
    """How far from the float64 reference a result may be; see ``drivetrain_kernels.Tolerance``."""

    @property
    def relative(self) -> Mapping[torch.dtype, float]:
        """Per dtype, the allowed share of the expected magnitude."""

    @property
    def absolute(self) -> Mapping[torch.dtype, float]:
        """Per dtype, the allowed difference besides."""

    @property
    def mismatched(self) -> float:
        """Share of the elements of integer results that may differ."""


class Example(Protocol):
    """One call."""

    @property
    def label(self) -> str:
        """For messages."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Arguments in schema order."""

    @property
    def tolerance(self) -> Tolerance | None:
        """Instead of the op's tolerance, where this call cannot be that near."""


class Refusal(Protocol):
    """One call that must be refused."""

    @property
    def label(self) -> str:
        """For messages."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Arguments in schema order."""

    @property
    def argument(self) -> str:
        """The argument that the message must name."""


class KernelOp(Protocol):
    """What the kit needs of an operator; ``drivetrain_kernels.Op`` is one."""

    @property
    def name(self) -> str:
        """Name of the op."""

    @property
    def call(self) -> torch._ops.OpOverload[..., Any]:
        """The overload to test."""

    @property
    def reference(self) -> Callable[..., Any]:
        """PyTorch implementation, which computes in float64 when given float64."""

    @property
    def mutated(self) -> Sequence[int]:
        """Positions of arguments that the op writes."""

    @property
    def tolerance(self) -> Tolerance:
        """How near the reference an implementation must come."""

    def examples(self, device: torch.device, /) -> Iterable[Example]:
        """Calls to get right."""

    def refusals(self, device: torch.device, /) -> Iterable[Refusal]:
        """Calls to refuse."""

    def provider(self, device_type: str, /) -> str:
        """Who implements the op on that device type now."""


class KernelConformance:
    """Inherit, set ``ops`` and ``device``, and pytest runs every check on every op.

    Attributes:
        ops: the operators to test.
        device: torch device to test on.
        provider: distribution whose implementations are meant, so that a silent fallback to the
            reference fails instead of passing; ``None`` to test whatever is in use.
        expected_failures: ``"op::check"`` -> why it fails.
    """

    ops: ClassVar[Sequence[KernelOp]] = ()
    device: ClassVar[str] = "cpu"
    provider: ClassVar[str | None] = None
    expected_failures: ClassVar[Mapping[str, str]] = {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per op, with the declared expected failures marked strictly."""
        if "op" not in metafunc.fixturenames:
            return
        check = metafunc.function.__name__
        parameters = []
        for op in self.ops:
            reason = self.expected_failures.get(f"{op.name}::{check}")
            marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
            parameters.append(pytest.param(op, id=op.name, marks=marks))
        metafunc.parametrize("op", parameters)

    def test_expected_failures_name_checks(self) -> None:
        """A declared failure that no check answers to would excuse nothing."""
        checks = [name for name in dir(type(self)) if name.startswith("test_")]
        known = {f"{op.name}::{check}" for op in self.ops for check in checks}
        unknown = sorted(set(self.expected_failures) - known)
        assert not unknown, f"expected failures that name no op and check: {', '.join(unknown)}"

    def test_is_in_use(self, op: KernelOp) -> None:
        """The implementation under test is the one that calls reach."""
        if self.provider is not None:
            found = op.provider(torch.device(self.device).type)
            assert found.split()[0] == self.provider, f"{op.name} is implemented by {found}"

    def test_matches_the_float64_reference(self, op: KernelOp) -> None:
        """Results and written arguments are within the op's tolerance, on every example."""
        for example in self._examples(op):
            wide = _widened(example.arguments)
            with torch.no_grad():
                expected = _results(op, op.reference(*wide), wide)
            arguments = copy.deepcopy(example.arguments)
            actual = _results(op, op.call(*arguments), arguments)
            assert len(actual) == len(expected), f"{op.name}({example.label}): number of results"
            for (name, value), (_, wanted) in zip(actual, expected, strict=True):
                problem = difference(value, wanted, example.tolerance or op.tolerance)
                assert not problem, f"{op.name}({example.label}): {name} {problem}"

    def test_repeats_itself(self, op: KernelOp) -> None:
        """The same call gives the same bits."""
        for example in self._examples(op):
            runs = []
            for _ in range(2):
                arguments = copy.deepcopy(example.arguments)
                runs.append(_results(op, op.call(*arguments), arguments))
            for (name, first), (_, second) in zip(*runs, strict=True):
                assert _same(first, second), f"{op.name}({example.label}): {name} differs"

    def test_leaves_inputs_alone(self, op: KernelOp) -> None:
        """Arguments that the schema does not declare as written keep their values."""
        for example in self._examples(op):
            arguments = copy.deepcopy(example.arguments)
            op.call(*arguments)
            for position, (now, before) in enumerate(
                zip(arguments, example.arguments, strict=True)
            ):
                if position not in op.mutated:
                    kept = all(
                        _same(a, b) for a, b in zip(_tensors(now), _tensors(before), strict=True)
                    )
                    assert kept, f"{op.name}({example.label}): argument {position} was changed"

    def test_bumps_versions(self, op: KernelOp) -> None:
        """Autograd notices every written tensor."""
        for example in self._examples(op):
            arguments = copy.deepcopy(example.arguments)
            written = [t for position in op.mutated for t in _tensors(arguments[position])]
            versions = [tensor._version for tensor in written]
            op.call(*arguments)
            bumped = [t._version > v for t, v in zip(written, versions, strict=True)]
            assert all(bumped), f"{op.name}({example.label}): a version counter did not move"

    def test_passes_opcheck(self, op: KernelOp) -> None:
        """Schema, fake implementation and tracing agree with the op, as torch checks it."""
        examples = list(self._examples(op))
        for example in examples[:: max(1, len(examples) // OPCHECK_EXAMPLES)]:
            torch.library.opcheck(op.call, copy.deepcopy(example.arguments))

    def test_refuses_bad_arguments(self, op: KernelOp) -> None:
        """Bad calls raise an error that names the op and the argument, never crash."""
        for refusal in op.refusals(torch.device(self.device)):
            with pytest.raises((ValueError, TypeError)) as caught:
                op.call(*refusal.arguments)
            message = str(caught.value)
            named = op.name in message and refusal.argument in message
            assert named, f"{op.name}({refusal.label}): {message!r} does not name the argument"

    def _examples(self, op: KernelOp) -> Iterator[Example]:
        yield from op.examples(torch.device(self.device))


def difference(actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> str:
    """Why ``actual`` is not near enough to ``expected``; empty when it is.

    Args:
        actual: a result, in the dtype that the op stores.
        expected: the float64 reference's, or codes.
        tolerance: how near is near enough.
    """
    if actual.shape != expected.shape:
        return f"has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.cpu(), expected.cpu()
    if not actual.is_floating_point():
        return _mismatch(actual, expected, tolerance.mismatched)
    wanted = expected.to(actual.dtype).double()
    value = actual.double()
    allowed = tolerance.absolute[actual.dtype] + tolerance.relative[actual.dtype] * wanted.abs()
    near = (value - wanted).abs() <= allowed
    near |= (value == wanted) | (value.isnan() & wanted.isnan())
    if bool(near.all()):
        return ""
    index = int((~near).reshape(-1).nonzero()[0])
    was, should = float(value.reshape(-1)[index]), float(wanted.reshape(-1)[index])
    return f"is {was!r} at {index}, expected {should!r} ({int((~near).sum())} elements are off)"


def _mismatch(actual: torch.Tensor, expected: torch.Tensor, allowed: float) -> str:
    if actual.dtype != expected.dtype:
        return f"is {actual.dtype}, expected {expected.dtype}"
    wrong = int((actual != expected).sum())
    limit = max(1, int(allowed * actual.numel())) if allowed else 0
    return f"differs in {wrong} of {actual.numel()} elements" if wrong > limit else ""


def _results(
    op: KernelOp, returned: Any, arguments: Sequence[Any]
) -> list[tuple[str, torch.Tensor]]:
    """What a call produced: returned tensors and written arguments."""
    found = [(f"result {index}", tensor) for index, tensor in enumerate(_tensors(returned))]
    for position in op.mutated:
        found += [(f"argument {position}", tensor) for tensor in _tensors(arguments[position])]
    return found


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for each in value for t in _tensors(each)] if isinstance(value, (list, tuple)) else []


def _widened(value: Any) -> Any:
    """A copy with every float tensor in float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return type(value)(map(_widened, value)) if isinstance(value, (list, tuple)) else value


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal element by element, NaN equal to NaN."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    equal = first == second
    if first.is_floating_point():
        equal |= first.isnan() & second.isnan()
    return bool(equal.all())

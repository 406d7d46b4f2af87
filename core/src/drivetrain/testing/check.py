"""Checks of a conformance kit: one failure per cause, and declared failures that are strict."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar
from unittest import SkipTest

from drivetrain.testing.distributed import RanksFailedError

KitT = TypeVar("KitT", bound="Kit")


class CheckFailedError(AssertionError):
    """What is, and not what was expected; see :func:`expect`."""


class Kit:
    """The base of classes of checks; any test runner can run them.

    A check is run once per class and process. It is skipped while a check that it needs does not
    pass, so that what is broken in one place fails in one place.

    Class attributes:
        expected_failures: name of a check -> why it is known to fail. It is skipped then, and fails
            once it passes.
    """

    expected_failures: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def checks(cls) -> list[str]:
        """Names of all checks, in the order in which they are best read."""
        names = [name for kind in reversed(cls.__mro__) for name in vars(kind)]
        return [name for name in dict.fromkeys(names) if name.startswith("test_")]

    def test_expected_failures_name_checks(self) -> None:
        """A declared failure that no check answers to would excuse nothing."""
        unknown = sorted(set(self.expected_failures) - set(self.checks()))
        assert not unknown, (
            f"expected_failures: expected names of checks, found {', '.join(unknown)}; "
            f"there are {', '.join(self.checks())}"
        )


def check(*needs: str) -> Callable[[Callable[[KitT], None]], Callable[[KitT], None]]:
    """Make a method a check of its :class:`Kit`.

    Args:
        needs: names of checks that must pass before this one says anything.
    """

    def decorate(method: Callable[[KitT], None]) -> Callable[[KitT], None]:
        @functools.wraps(method)
        def run(self: KitT) -> None:
            error = _outcome(type(self), method.__name__)
            if error is not None:
                raise error

        run.needs, run.method = needs, method  # type: ignore[attr-defined]
        return run

    return decorate


def expect(holds: object, expected: str, found: object, advice: str) -> None:
    """Fail a check, whose name is put before the message.

    Args:
        holds: whether all is well.
        expected: what should be.
        found: what is.
        advice: what to do about it.

    Raises:
        CheckFailedError: ``holds`` is false.
    """
    if not holds:
        raise CheckFailedError(f"expected {expected}, found {found}; {advice}")


_outcomes: dict[tuple[type[Kit], str], Exception | None] = {}


def _outcome(kit: type[Kit], name: str) -> Exception | None:
    """Nothing if the check passes, else what it raises; found out once."""
    if (kit, name) not in _outcomes:
        _outcomes[kit, name] = _find_out(kit, name)
    return _outcomes[kit, name]


def _find_out(kit: type[Kit], name: str) -> Exception | None:
    entry: Any = getattr(kit, name)
    for need in entry.needs:
        if _outcome(kit, need) is not None:
            return SkipTest(f"says nothing while {need} does not pass")
    reason = kit.expected_failures.get(name)
    try:
        entry.method(kit())
    except SkipTest as skip:
        return skip
    except Exception as error:  # noqa: BLE001 - any failure of a check is its outcome
        return SkipTest(f"fails as declared: {reason}") if reason else _named(name, error)
    if reason:
        passes = f"it passes, but is declared to fail ({reason})"
        return AssertionError(f"{name}: {passes}; delete it from expected_failures")
    return None


def _named(name: str, error: Exception) -> AssertionError:
    """A failure whose message begins with the check's name; the error itself is its cause."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, RanksFailedError):
        text = next(iter(error.errors.values())).error
    said = text.removeprefix(f"{CheckFailedError.__name__}: ")
    if said == text:  # nobody has said what was expected
        said = f"expected no error, found {text}; the error's own traceback says where"
    failure = AssertionError(f"{name}: {said}")
    failure.__cause__ = error
    return failure

"""Lets a provider serve a device type for some tests, in place of the installed ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from drivetrain_kernels import Provider, registry


@contextmanager
def in_place(provider: Provider) -> Iterator[None]:
    """Calls on the provider's device type reach its kernels, or fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DRIVETRAIN_REQUIRE_NATIVE", "1")
        patch.setitem(registry._providers, provider.device_type, [provider])
        _forget()
        yield
    _forget()


def _forget() -> None:
    registry._chosen.clear()
    for table in registry._in_use.values():
        table.clear()

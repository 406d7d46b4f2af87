"""Who implements operators for a kind of device: the modules behind ``drivetrain.kernels``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from drivetrain.errors import PluginError
from drivetrain.plan.registry import Entry, Registry
from drivetrain_kernels.native.library import NativeLibrary

GROUP = "drivetrain.kernels"
"""Entry-point group of native modules; an entry point's name is the device type that it serves."""

Bind = Callable[[ctypes.CDLL], Callable[..., Any]]
Make = Callable[[], Callable[..., Any]]


@dataclass(frozen=True)
class Offer:
    """One provider's implementation of one op.

    Args:
        bind: makes the function, given the loaded library (or ``None`` where there is none); may
            raise ``BuildError``.
        library: the native library to build or find first.
        otherwise: makes another function, where the first cannot be made; may raise
            ``BuildError`` too.
    """

    bind: Callable[[Any], Callable[..., Any]]
    library: NativeLibrary | None
    otherwise: Make | None = None


class Provider:
    """What one native module offers for one device type.

    The module's ``register(provider)`` is called once, before the first dispatch to the device; it
    fills the provider and must neither build nor load anything.

    Args:
        distribution: name of the distribution that the module belongs to.
        version: its version.
        device_type: torch device type served, e.g. ``"cpu"``.
        accelerator: the accelerator that the kernels belong to. One named like its device type is
            the device's own; another one counts only while that accelerator is active.
    """

    def __init__(
        self, distribution: str, version: str, device_type: str, accelerator: str | None = None
    ) -> None:
        self.distribution = distribution
        self.version = version
        self.device_type = device_type
        self.accelerator = accelerator or device_type
        self.offers: dict[str, Offer] = {}
        self.libraries: list[NativeLibrary] = []
        self.used: list[NativeLibrary] = []

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"

    def implement(self, op: str, function: Callable[..., Any]) -> None:
        """Offer ``function``, which takes the op's arguments in schema order."""
        self._offer(op, Offer(bind=lambda _: function, library=None))

    def implement_later(self, op: str, make: Make) -> None:
        """Offer what ``make()`` answers at the first use; it may raise ``BuildError``."""
        self._offer(op, Offer(bind=lambda _: make(), library=None))

    def implement_native(
        self, op: str, library: NativeLibrary, bind: Bind, *, otherwise: Make | None = None
    ) -> None:
        """Offer a function made by ``bind(library)``, after the library was found or built.

        Where it cannot be built, ``otherwise()`` makes the function instead.
        """
        self.uses(library)
        self._offer(op, Offer(bind, library, otherwise))

    def uses(self, library: NativeLibrary) -> None:
        """Name a library that the package uses on this machine, be it for no op at all."""
        for known in (self.used, self.libraries):
            if library not in known:
                known.append(library)

    def also_builds(self, libraries: Sequence[NativeLibrary]) -> None:
        """Name further libraries that ``drivetrain build`` makes ahead of time."""
        self.libraries.extend(library for library in libraries if library not in self.libraries)

    def rank(self, active_accelerator: str | None) -> int | None:
        """0 for the active accelerator's, 1 for the device's own, ``None`` for anybody else's."""
        if self.accelerator == active_accelerator:
            return 0
        return 1 if self.accelerator == self.device_type else None

    def _offer(self, op: str, offer: Offer) -> None:
        if op in self.offers:
            raise PluginError(f"{self} implements drivetrain::{op} twice for {self.device_type}")
        self.offers[op] = offer


def served_device_types() -> list[str]:
    """Device types that an installed distribution has kernels for; imports none of them."""
    return Registry.installed().names("kernels")


def load_providers(device_type: str) -> list[Provider]:
    """Import and register every native module for ``device_type``, in order of distribution.

    Raises:
        PluginError: a module that cannot be imported or has no ``register``; names distribution,
            version and what to do.
    """
    entries = Registry.installed().entries("kernels")
    return [_load(entry) for entry in entries if entry.name == device_type]


def _load(entry: Entry) -> Provider:
    module = entry.load()
    register = getattr(module, "register", None)
    if not isinstance(module, ModuleType) or not callable(register):
        raise PluginError(
            f"{entry.value!r}, named by {entry.distribution} {entry.version} in {GROUP}, must be a "
            "module with a function register(provider)"
        )
    accelerator = getattr(module, "accelerator", None)
    provider = Provider(entry.distribution, entry.version, entry.name, accelerator)
    register(provider)
    return provider


def device_type_of(arguments: Sequence[Any], tensors: Sequence[int]) -> str:
    """Device type of the first tensor among ``arguments``; ``cpu`` when there is none."""
    for position in tensors:
        value = arguments[position]
        if isinstance(value, (list, tuple)):
            value = value[0] if value else None
        if isinstance(value, torch.Tensor):
            return value.device.type
    return "cpu"

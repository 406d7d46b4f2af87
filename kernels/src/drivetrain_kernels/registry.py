"""The operators of ``torch.ops.drivetrain`` and which implementation each device uses.

An op is defined once, as a composite kernel that every device dispatches to; that kernel picks the
implementation for the tensor's device: the active accelerator's, then the device's own, then the
PyTorch reference. The pick is made at the first call on a device under an accelerator, and kept.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from drivetrain.errors import BuildError, PluginError
from drivetrain.job.accelerator_choice import VARIABLE, active_accelerator
from drivetrain_kernels.checks import check_overlap
from drivetrain_kernels.op import NAMESPACE, Op
from drivetrain_kernels.provider import (
    Offer,
    Provider,
    device_type_of,
    load_providers,
    served_device_types,
)

logger = logging.getLogger("drivetrain.kernels")

REFERENCE = "reference"

Place = tuple[str | None, str]
"""The active accelerator, if there is one, and a device type."""


@dataclass(frozen=True)
class Implementation:
    """Which implementation one op uses on one device type.

    Args:
        op: name of the op.
        device_type: torch device type.
        provider: ``"reference"``, or distribution and version of the native provider.
        reason: why this one, in words.
    """

    op: str
    device_type: str
    provider: str
    reason: str


class Registry:
    """Defines ops and resolves their implementations; the process has one, :data:`registry`.

    Args:
        find: answers the providers of a device type.
        device_types: answers the device types that have providers.
        library: where the ops are defined.
        active: answers the accelerator of the open job; where there is none, it is the one that the
            environment names.
    """

    def __init__(
        self,
        find: Callable[[str], list[Provider]] = load_providers,
        device_types: Callable[[], list[str]] = served_device_types,
        library: torch.library.Library | None = None,
        active: Callable[[], str | None] = active_accelerator,
    ) -> None:
        self._find = find
        self._device_types = device_types
        self._library = library or torch.library.Library(  # type: ignore[no-untyped-call]
            NAMESPACE, "FRAGMENT"
        )
        self._ops: dict[str, Op] = {}
        self._providers: dict[str, list[Provider]] = {}
        self._in_use: dict[str, dict[Place, Callable[..., Any]]] = {}
        self._chosen: dict[tuple[str, Place], Implementation] = {}
        self._active = active
        self._asked_for = os.environ.get(VARIABLE)
        self._lock = threading.RLock()
        self._told: set[str] = set()

    # -- ops ----------------------------------------------------------------------------------

    def define(self, op: Op) -> Op:
        """Define ``op`` in ``torch.ops`` with its reference and fake; returns it.

        Raises:
            PluginError: an op of this name exists.
        """
        if op.name in self._ops:
            raise PluginError(f"the operator {op.qualified_name} is declared twice")
        self._ops[op.name] = op
        self._in_use[op.name] = {}
        self._library.define(f"{op.name}{op.signature}")  # type: ignore[no-untyped-call]
        self._library.impl(  # type: ignore[no-untyped-call]
            op.name, self._dispatcher(op), "CompositeExplicitAutograd"
        )
        torch.library.register_fake(op.qualified_name, _fake(op), lib=self._library)
        return op

    def ops(self) -> tuple[Op, ...]:
        """All declared ops, by name."""
        return tuple(self._ops[name] for name in sorted(self._ops))

    # -- implementations ------------------------------------------------------------------------

    def implementations(self, device_types: Iterable[str] | None = None) -> list[Implementation]:
        """What each op uses on each device type, and why.

        Makes the choice where no call has made it yet, so it may build native libraries.

        Args:
            device_types: which ones; every one that has a provider, and ``cpu``, by default.
        """
        chosen = sorted({"cpu", *self._device_types()}) if device_types is None else device_types
        return [self.implementation(op.name, device) for device in chosen for op in self.ops()]

    def implementation(self, op: str, device_type: str) -> Implementation:
        """What one op uses on one device type; see :meth:`implementations`."""
        return self._resolved(self._ops[op], (self._active(), device_type))[1]

    def function(self, op: str, device_type: str) -> Callable[..., Any]:
        """What :meth:`implementation` tells of, to be called directly."""
        return self._resolved(self._ops[op], (self._active(), device_type))[0]

    def providers(self, device_type: str) -> list[Provider]:
        """The native providers of ``device_type``, imported at the first call."""
        with self._lock:
            if device_type not in self._providers:
                self._providers[device_type] = self._find(device_type)
            return self._providers[device_type]

    # -- dispatch ---------------------------------------------------------------------------------

    def _dispatcher(self, op: Op) -> Callable[..., Any]:
        table = self._in_use[op.name]
        tensors, mutated, check, active = op.tensors, op.mutated, op.check, self._active

        def dispatch(*arguments: Any) -> Any:
            check(*arguments)
            if mutated:
                check_overlap(op, arguments)
            place = active(), device_type_of(arguments, tensors)
            function = table.get(place) or self._resolved(op, place)[0]
            result = function(*arguments)
            for position in mutated:
                value = arguments[position]
                if value is not None:
                    torch.autograd.graph.increment_version(value)
            return result

        return dispatch

    def _resolved(self, op: Op, place: Place) -> tuple[Callable[..., Any], Implementation]:
        with self._lock:
            table, key = self._in_use[op.name], (op.name, place)
            if place not in table:
                table[place], self._chosen[key] = self._choose(op, place)
            return table[place], self._chosen[key]

    def _choose(self, op: Op, place: Place) -> tuple[Callable[..., Any], Implementation]:
        device_type = place[1]
        provider, rank = self._best(op, *place)
        if provider is None:
            reason = f"no installed package implements it for {device_type}"
            return self._reference(op, device_type, reason)
        try:
            function, how = self._bind(provider.offers[op.name])
        except BuildError as error:
            if os.environ.get("DRIVETRAIN_REQUIRE_NATIVE") == "1":
                raise BuildError(f"{op.qualified_name} on {device_type}: {error}") from error
            self._tell(provider, device_type, op, str(error))
            return self._reference(op, device_type, f"{provider} cannot be built: {error}")
        whose = "the active accelerator's" if rank == 0 else "the device's own"
        return function, Implementation(op.name, device_type, str(provider), f"{whose}, {how}")

    def _best(
        self, op: Op, accelerator: str | None, device_type: str
    ) -> tuple[Provider | None, int]:
        ranked: dict[int, list[Provider]] = {}
        for provider in self.providers(device_type):
            rank = provider.rank(accelerator or self._asked_for)
            if rank is not None and op.name in provider.offers:
                ranked.setdefault(rank, []).append(provider)
        if not ranked:
            return None, -1
        rank = min(ranked)
        if len(ranked[rank]) > 1:
            names = " and ".join(str(provider) for provider in ranked[rank])
            raise PluginError(
                f"{names} both implement {op.qualified_name} for {device_type} with equal right; "
                "uninstall one, or let one belong to an accelerator of its own"
            )
        return ranked[rank][0], rank

    @staticmethod
    def _bind(offer: Offer) -> tuple[Callable[..., Any], str]:
        """The function of an offer, or its second choice, and how it came about."""
        if offer.library is None:
            return offer.bind(None), "python"
        try:
            return offer.bind(offer.library.load()), offer.library.origin
        except BuildError as error:
            if offer.otherwise is None or os.environ.get("DRIVETRAIN_REQUIRE_NATIVE") == "1":
                raise
            try:
                return offer.otherwise(), f"python, as the native kernels cannot be built: {error}"
            except BuildError as another:
                raise BuildError(f"{error}; {another}") from another

    @staticmethod
    def _reference(
        op: Op, device_type: str, reason: str
    ) -> tuple[Callable[..., Any], Implementation]:
        # Parameters that require gradients are legal arguments; the ops are not differentiable.
        function = torch.no_grad()(op.reference)
        return function, Implementation(op.name, device_type, REFERENCE, reason)

    def _tell(self, provider: Provider, device_type: str, op: Op, error: str) -> None:
        """Say once per provider that its native kernels are not used."""
        if str(provider) not in self._told:
            self._told.add(str(provider))
            logger.warning(
                "%s on %s runs the slower PyTorch reference, as do the other kernels of %s: %s",
                op.qualified_name,
                device_type,
                provider,
                error,
            )


def _fake(op: Op) -> Callable[..., Any]:
    def fake(*arguments: Any) -> Any:
        op.check(*arguments)
        return op.fake(*arguments) if op.fake is not None else None

    return fake


registry = Registry()
"""The registry of this process."""


def ops(group: str | None = None) -> Sequence[Op]:
    """All declared ops, or those of one group, by name."""
    return tuple(op for op in registry.ops() if group in (None, op.group))


def implementations(device_types: Iterable[str] | None = None) -> list[Implementation]:
    """See :meth:`Registry.implementations`."""
    return registry.implementations(device_types)

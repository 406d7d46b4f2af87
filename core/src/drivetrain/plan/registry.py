"""Which plugins, accelerators, optimizers, schedules and commands exist, without importing any.

Entry points are read as metadata. An entry is imported when :meth:`Entry.load` is called, which
happens only for what a config names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import import_module, metadata
from typing import Any, Literal, NoReturn, cast, get_args

from drivetrain.errors import PluginError
from drivetrain.plan.core_entries import ENTRIES
from drivetrain.plan.known import OWNERS, PLANNED
from drivetrain.version import __version__
from drivetrain.wording import did_you_mean

Group = Literal[
    "plugins",
    "accelerators",
    "kernels",
    "optimizers",
    "schedulers",
    "optimizer_params",
    "scheduler_params",
    "storages",
    "commands",
    "bench",
    "explain",
    "reports",
    "methods",
    "deepspeed",
    "weight_formats",
    "model_folders",
    "engines",
]
"""An entry point group of ours, without the prefix ``drivetrain.``."""

ALLOW_VARIABLE = "DRIVETRAIN_PLUGINS"
DISABLE_VARIABLE = "DRIVETRAIN_DISABLE_PLUGINS"

CORE = "drivetrain"
IN_PROCESS = "in-process"

_CASE_INSENSITIVE = ("optimizers", "schedulers", "optimizer_params", "scheduler_params")
_CORE_IS_ASKED_LAST = ("optimizers",)


@dataclass(frozen=True)
class Entry:
    """One thing that a distribution offers under a name.

    Args:
        group: what kind of thing.
        name: the config path; the accelerator's, optimizer's, schedule's, command's or benchmark's
            name; the title of a table in ``drivetrain report`` or ``explain``; how an engine calls
            a method; a file that marks a folder with a model; or the name under which scripts for
            DeepSpeed import it, without ``deepspeed.``.
        distribution: who offers it; for objects added in this process, their module.
        version: the distribution's version, or ``"in-process"``.
        value: ``"module:attribute"``, or ``"module"``.
        requires: the distribution's requirements, as its metadata states them.
        hidden: why an installed entry is switched off, or the empty string.
        target: the object itself, for entries that were added in this process.
    """

    group: Group
    name: str
    distribution: str
    version: str
    value: str
    requires: tuple[str, ...] = ()
    hidden: str = ""
    target: Any = field(default=None, compare=False, repr=False)

    @property
    def label(self) -> str:
        """How messages call it, e.g. ``plugin 'moe' (drivetrain-moe 0.1.0)``."""
        return f"{self.group.removesuffix('s')} {self.name!r} ({self.distribution} {self.version})"

    def load(self) -> Any:
        """Import the object.

        Raises:
            PluginError: the import fails, or the distribution needs another version of core.
        """
        if self.target is not None:
            return self.target
        self._check_requirements()
        module, _, attribute = self.value.partition(":")
        try:
            found: Any = import_module(module)
            for part in attribute.split(".") if attribute else ():
                found = getattr(found, part)
        except Exception as error:
            raise PluginError(
                f"{self.label} could not be loaded from {self.value!r}: "
                f"{type(error).__name__}: {error}; "
                f"to run without it, set {DISABLE_VARIABLE}={self.name}"
            ) from error
        if self.group == "plugins":
            self._check_hookspecs(found)
        return found

    def _check_requirements(self) -> None:
        # pip lets an environment drift away from what a distribution asked for.
        if not self.requires:
            return
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name

        for requirement in map(Requirement, self.requires):
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            fits = requirement.specifier.contains(__version__, prereleases=True)
            if canonicalize_name(requirement.name) == CORE and applies and not fits:
                self._refuse(f"needs {requirement}", f"drivetrain {__version__} is running")

    def _check_hookspecs(self, found: Any) -> None:
        from drivetrain.contracts.plugin.hookspecs import HOOKSPEC_VERSION as OURS

        version = getattr(found, "hookspec_version", OURS)
        if version != OURS:
            built = f"is built for version {version} of the hook specifications"
            self._refuse(built, f"drivetrain {__version__} has version {OURS}")

    def _refuse(self, wanted: str, found: str) -> NoReturn:
        raise PluginError(
            f"{self.label} {wanted}, but {found}; "
            f"install a matching version, or set {DISABLE_VARIABLE}={self.name}"
        )


class Registry:
    """The entries that one plan may use. Changing one registry changes no other.

    Args:
        entries: everything that exists.
        choices: which distribution serves a name that several claim, as in the config's
            ``plugins`` section: the name, for other groups than plugins ``"<group>.<name>"``.
    """

    def __init__(self, entries: Iterable[Entry], choices: Mapping[str, str] | None = None) -> None:
        self._entries = list(entries)
        self._choices = dict(choices or {})

    @classmethod
    def installed(cls) -> Registry:
        """Core's own entries and those of every installed distribution.

        ``DRIVETRAIN_PLUGINS`` (an allow-list) and ``DRIVETRAIN_DISABLE_PLUGINS``, both with names
        of entries or distributions separated by commas, are for debugging.
        """
        allowed, disabled = _names(ALLOW_VARIABLE), _names(DISABLE_VARIABLE)
        found = []
        for entry in _scan(tuple(sys.path)):
            names = {entry.name.lower(), entry.distribution.lower()}
            if entry.distribution != CORE and disabled & names:
                entry = replace(entry, hidden=f"switched off by {DISABLE_VARIABLE}")
            elif entry.distribution != CORE and allowed and not allowed & names:
                entry = replace(entry, hidden=f"not in {ALLOW_VARIABLE}")
            found.append(entry)
        return cls([*core_entries(), *found])

    def with_plugins(self, *plugins: type) -> Registry:
        """A copy that also has these plugin classes, under their name and every path they own."""
        copy = self.choosing({})
        for plugin in plugins:
            for path in dict.fromkeys([plugin.name, *plugin.sections]):  # type: ignore[attr-defined]
                copy.add("plugins", path, plugin)
        return copy

    def choosing(self, choices: Mapping[str, str]) -> Registry:
        """A copy in which these distributions serve these names."""
        return Registry(self._entries, {**self._choices, **choices})

    def add(self, group: Group, name: str, target: Any) -> None:
        """Offer ``target`` under ``name`` in this registry; it goes before an installed one.

        Raises:
            PluginError: another object was added under the same name.
        """
        origin = str(getattr(target, "__module__", type(target).__module__))
        value = f"{origin}:{getattr(target, '__qualname__', type(target).__qualname__)}"
        entry = Entry(group, name, origin, IN_PROCESS, value, target=target)
        for other in self._matching(group, name):
            if other.version == IN_PROCESS:
                raise PluginError(f"{other.label} and {entry.label} were added under one name")
        self._entries.append(entry)

    def entries(self, group: Group) -> Sequence[Entry]:
        """The usable entries of a group, sorted by name and distribution."""
        found = (entry for entry in self._entries if entry.group == group and not entry.hidden)
        return sorted(found, key=lambda entry: (entry.name, entry.distribution))

    def names(self, group: Group, *, hidden: bool = False) -> list[str]:
        """The usable names of a group, sorted, each once; on demand also those switched off."""
        found = (e for e in self._entries if e.group == group and (hidden or not e.hidden))
        return sorted({entry.name for entry in found})

    def find(self, group: Group, name: str) -> Entry | None:
        """The entry that serves ``name``, or ``None``.

        Raises:
            PluginError: several distributions claim the name and the config chooses none of them.
        """
        claimants = self._matching(group, name)
        key = name if group == "plugins" else f"{group}.{name}"
        if (choice := self._choices.get(key)) is not None:
            for entry in claimants:
                if entry.distribution == choice:
                    return entry
            offered = ", ".join(entry.distribution for entry in claimants) or "nobody"
            raise PluginError(f"{choice!r} does not offer {key}, which is offered by {offered}")
        if added := [entry for entry in claimants if entry.version == IN_PROCESS]:
            return added[0]
        if group in _CORE_IS_ASKED_LAST and len(claimants) > 1:
            claimants = [entry for entry in claimants if entry.distribution != CORE]
        if len(claimants) > 1:
            raise PluginError(
                f"{' and '.join(entry.label for entry in claimants)} claim the same name; choose "
                f'one in the config, "plugins": {{"{key}": "{claimants[0].distribution}"}}, '
                "or uninstall the other"
            )
        return claimants[0] if claimants else None

    def check_choices(self) -> list[str]:
        """One sentence per choice that cannot be followed, whether or not its name is used."""
        problems = []
        for key in self._choices:
            prefix, _, rest = key.partition(".")
            named = prefix in get_args(Group) and bool(rest)
            try:
                self.find(cast("Group", prefix) if named else "plugins", rest if named else key)
            except PluginError as error:
                problems.append(f"plugins.{key}: {error}")
        return problems

    def load(self, group: Group, name: str) -> Any:
        """Import what serves ``name``.

        Raises:
            PluginError: nothing serves it (with a suggestion), several do, or it does not load.
        """
        entry = self.find(group, name)
        if entry is None:
            reason, kind = self.missing(group, name), group.removesuffix("s")
            unknown = f"no {kind} is named {name!r}{did_you_mean(name, self.names(group))}"
            raise PluginError(f"{kind} {name!r} is {reason}" if reason else unknown)
        return entry.load()

    def missing(self, group: Group, name: str) -> str | None:
        """Why a name that has an owner cannot be used; ``None`` where none is known.

        The owner is switched off, or a first-party distribution that is not installed.
        """
        for entry in self._entries:
            if entry.hidden and entry.group == group and _same(group, entry.name, name):
                return f"served by {entry.distribution}, which is {entry.hidden}"
        for known, owner in OWNERS.get(group, {}).items():
            if _same(group, known, name):
                how = f"not installed: pip install {owner}"
                how = "not released yet" if owner in PLANNED else how
                return f"served by {owner}, which is {how}"
        return None

    def _matching(self, group: Group, name: str) -> list[Entry]:
        return [entry for entry in self.entries(group) if _same(group, entry.name, name)]


def _same(group: Group, one: str, other: str) -> bool:
    return one.lower() == other.lower() if group in _CASE_INSENSITIVE else one == other


def _names(variable: str) -> set[str]:
    return {name.strip().lower() for name in os.environ.get(variable, "").split(",")} - {""}


def core_entries() -> list[Entry]:
    """What core itself offers, in the order in which its plugins are registered."""
    return [
        Entry(cast("Group", group), name, CORE, __version__, value)
        for group, values in ENTRIES.items()
        for name, value in values.items()
    ]


@lru_cache(maxsize=1)
def _scan(path: tuple[str, ...]) -> tuple[Entry, ...]:
    """Every entry point of ours that is installed on ``path``, which is ``sys.path``."""
    found: dict[tuple[str, str, str], Entry] = {}
    for distribution in metadata.distributions(path=list(path)):
        for point in distribution.entry_points:
            prefix, _, group = point.group.partition(".")
            if prefix != "drivetrain" or group not in get_args(Group):
                continue
            entry = Entry(
                group=cast("Group", group),
                name=point.name,
                distribution=distribution.name,
                version=distribution.version,
                value=f"{point.module}:{point.attr}" if point.attr else point.module,
                requires=tuple(distribution.requires or ()),
            )
            # A distribution that lies on the path twice is imported from the first place.
            found.setdefault((entry.group, entry.name, entry.distribution), entry)
    return tuple(found.values())

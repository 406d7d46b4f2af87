"""What a plugin is: a class that owns config sections and implements hooks.

A plugin class is found through the ``drivetrain.plugins`` entry points, whose names are the config
paths that it owns. Its module must be light: it may import pydantic and
``drivetrain.contracts.plugin.plugin``, but torch only inside functions, so that ``drivetrain config
check`` stays fast and works anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import pluggy
from pydantic import BaseModel

from drivetrain.contracts.plugin.section import NO_EFFECT, Section

hookimpl = pluggy.HookimplMarker("drivetrain")

SectionT = TypeVar("SectionT", bound=BaseModel)

Sections = Mapping[str, type[BaseModel]]
"""Config path -> model of the section at that path."""


@dataclass(frozen=True)
class Problem:
    """One finding of a plugin's ``configure`` hook.

    Args:
        path: dotted config path that the finding is about.
        message: what is wrong and what to do, one lower-case sentence.
    """

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


@dataclass(frozen=True)
class Conflict:
    """A feature value of this plugin that another plugin's feature value excludes.

    Args:
        feature: this plugin's feature path, e.g. ``"zero_optimization.stage"``.
        value: the value of ``feature`` that is meant, or ``None`` for every value.
        other: the other feature's path.
        other_value: the value of ``other`` that is excluded, or ``None`` for every value.
        reason: why the two cannot be combined, shown to the user.
    """

    feature: str
    value: object
    other: str
    other_value: object
    reason: str


class Plugin:
    """Base class of every plugin; hook implementations are methods marked with ``@hookimpl``.

    A plugin object knows its config sections and nothing of a job: the state of a job lives in the
    objects that its hooks return. Objects are created once per plan.

    Class attributes:
        name: unique short name, by convention the first config path.
        sections: config path -> model of that section. Several entry points may name one class;
            it is then instantiated once, with those of its sections that the config contains.
        after: names of plugins whose hooks must run before this one's inside one phase. Core's own
            defaults always run last.
        hookspec_version: may be set to the ``HOOKSPEC_VERSION`` that the plugin was built for; a
            core of another version then refuses it by name.
    """

    name: ClassVar[str]
    sections: ClassVar[Sections] = {}
    after: ClassVar[tuple[str, ...]] = ()

    def __init__(self, sections: Mapping[str, BaseModel]) -> None:
        self._sections = dict(sections)

    def section(self, model: type[SectionT]) -> SectionT:
        """The section validated by ``model``; its defaults when the config does not contain it."""
        for value in self._sections.values():
            if isinstance(value, model):
                return value
        return model()

    def enabled(self) -> bool:
        """Whether the sections switch the plugin on; not asked of core's own defaults."""
        flags = [s.enabled for s in self._sections.values() if hasattr(s, "enabled")]
        return any(flags) if flags else True

    def features(self) -> Mapping[str, object]:
        """Feature path -> value now active, for conflict checks, pairwise tests and docs."""
        return {}

    def feature_values(self) -> Mapping[str, Sequence[Any]]:
        """Feature path -> the values worth combining in the pairwise test, whatever is active."""
        return {}

    def conflicts(self) -> Sequence[Conflict]:
        """Feature combinations that this plugin refuses, each with its reason."""
        return ()

    def notes(self) -> Sequence[str]:
        """Remarks for ``drivetrain explain``: keys given by another name, and without effect."""
        found = []
        for path, section in self._sections.items():
            others = section.other_names if isinstance(section, Section) else {}
            found += [f"{path}.{old}: {outcome}" for old, outcome in others.items()]
            found += [
                f"{path}.{name}: no effect, {field.description.removeprefix(NO_EFFECT).rstrip('.')}"
                for name, field in type(section).model_fields.items()
                if name in section.model_fields_set
                and field.description is not None
                and field.description.startswith(NO_EFFECT)
            ]
        return found

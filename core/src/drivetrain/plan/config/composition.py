"""Which plugin owns which part of a config; every problem of a config in one error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, RootModel, ValidationError

from drivetrain.contracts.plugin.plugin import Plugin
from drivetrain.errors import ConfigError, PluginError
from drivetrain.plan.config.limits import plain
from drivetrain.plan.config.problems import MOST, describe, without_autos
from drivetrain.plan.known import SECTIONS
from drivetrain.plan.registry import CORE, Entry, Registry
from drivetrain.wording import as_json, did_you_mean

PLUGINS_KEY = "plugins"
"""Core's own key: path -> distribution that serves it, or ``true`` to activate a plugin."""


@dataclass(frozen=True)
class Member:
    """One plugin object of a plan.

    Args:
        plugin: the object.
        entry: the entry that named its class first.
        reason: why it is part of the plan.
        active: whether its hooks take part; a section may switch its plugin off.
    """

    plugin: Plugin
    entry: Entry
    reason: str
    active: bool

    @property
    def label(self) -> str:
        """Plugin, distribution and version, for messages."""
        return _label(type(self.plugin), self.entry)

    @property
    def is_core(self) -> bool:
        """Whether this is one of core's own defaults."""
        return self.entry.distribution == CORE


@dataclass(frozen=True)
class Composition:
    """The plugins that a config calls for.

    Args:
        members: core's defaults first, the rest by name.
        autos: config paths that said ``"auto"``, so that the default applies.
        registry: the registry with the config's choices among distributions.
        notes: sections that are accepted although nothing installed serves them.
    """

    members: tuple[Member, ...]
    autos: tuple[str, ...]
    registry: Registry
    notes: tuple[str, ...] = ()


def compose(
    config: Mapping[str, Any], registry: Registry, objects: Mapping[str, str] | None = None
) -> Composition:
    """Find, load and create the plugins that ``config`` names, each with its validated sections.

    Args:
        config: the merged config.
        registry: where plugins come from.
        objects: further paths, which classes of the model name -> name of such a class.

    Raises:
        ConfigError: every unknown key, missing distribution, and wrong value, all at once.
        PluginError: a plugin does not load.
    """
    values = plain(config, "the config")
    choices, activated, problems = _read_choices(values.pop(PLUGINS_KEY, {}))
    builder = _Builder(registry.choosing(choices), problems)
    builder.add_core()
    builder.cut(values, "", owned=False)
    for path in list(builder.sections):
        builder.claim(path, f"config section {path!r}")
    for name in activated:
        builder.claim(name, f"{PLUGINS_KEY}.{name}", where=f"{PLUGINS_KEY}.{name}")
    for path, kind in (objects or {}).items():
        if path not in builder.sections:
            builder.claim(path, f"the model has a {kind}", where=f"{kind} in the model")
    members = builder.build()
    if builder.problems:
        raise ConfigError(builder.problems)
    return Composition(members, tuple(builder.autos), builder.registry, tuple(builder.notes))


class _Builder:
    """Collects sections, owners and problems while a config is taken apart."""

    def __init__(self, registry: Registry, problems: list[str]) -> None:
        self.registry = registry
        self.problems = problems + registry.check_choices()
        self.sections: dict[str, Any] = {}
        self.autos: list[str] = []
        self.notes: list[str] = []
        self._known = list(dict.fromkeys([*registry.names("plugins", hidden=True), *SECTIONS]))
        self._unknown: list[str] = []
        self._owners: dict[type[Plugin], tuple[Entry, str]] = {}
        self._paths: dict[type[Plugin], dict[str, None]] = {}

    def add_core(self) -> None:
        """Core's defaults take part in every plan."""
        for entry in self.registry.entries("plugins"):
            if entry.distribution == CORE:
                self._owners.setdefault(entry.load(), (entry, "core's default"))

    def cut(self, node: dict[str, Any], prefix: str, *, owned: bool) -> None:
        """Move every value at a path that somebody owns from ``node`` to ``sections``.

        Args:
            node: an object of the config; owned values are removed from it.
            prefix: its path with a trailing dot, or the empty string.
            owned: whether a model will validate what is left in it.
        """
        for key in list(node):
            path = prefix + key
            has_owner = path in self._known
            leads_on = isinstance(node[key], dict) and bool(self._children(path))
            is_filled = leads_on and bool(node[key])
            if leads_on:
                self.cut(node[key], path + ".", owned=has_owner)
            if has_owner:
                value = node.pop(key)
                if value or not is_filled:  # else all that it held is others'
                    self.sections[path] = value
            elif not owned and not leads_on:
                self._unknown.append(path)

    def claim(self, path: str, reason: str, where: str = "") -> None:
        """Find and load the plugin class that serves ``path``; messages speak of ``where``."""
        where = where or path
        try:
            entry = self.registry.find("plugins", path)
        except PluginError as error:
            self.problems.append(f"{where}: {error}")
            return
        if entry is None:
            missing = self.registry.missing("plugins", path)
            if missing and path in self.sections and _is_off(self.sections[path]):
                self.notes.append(f"{path}: no effect, as it is switched off ({missing})")
            else:
                self.problems.append(f"{where}: {missing or self._unknown_plugin(path)}")
            return
        plugin = entry.load()
        if not (isinstance(plugin, type) and issubclass(plugin, Plugin)):
            raise PluginError(f"{entry.label} is {plugin!r}, not a subclass of drivetrain.Plugin")
        self._owners.setdefault(plugin, (entry, reason))
        model = plugin.sections.get(path)
        if model is not None and path not in self.sections and not issubclass(model, RootModel):
            self.sections[path] = {}
        if model is not None and path in self.sections:
            self._paths.setdefault(plugin, {})[path] = None
        elif path in self.sections:
            owned = ", ".join(plugin.sections) or "none"
            self.problems.append(
                f"{path}: {_label(plugin, entry)} has no section of that name (its sections: "
                f'{owned}); to activate it, write "plugins": {{"{path}": true}}'
            )

    def build(self) -> tuple[Member, ...]:
        """One object per class; adds the problems of unknown keys and wrong values."""
        models = {path: model for plugin in self._owners for path, model in plugin.sections.items()}
        top = [*(path.partition(".")[0] for path in self._known), PLUGINS_KEY]
        for path in self._unknown[:MOST]:
            parent, _, key = path.rpartition(".")
            names = self._children(parent) if parent else top
            hint = did_you_mean(key, names) or _other_place(key, models)
            self.problems.append(f"{path}: unknown key{hint}")
        if len(self._unknown) > MOST:
            self.problems.append(f"and {len(self._unknown) - MOST} more unknown keys")
        members = [self._member(plugin) for plugin in self._owners]
        found = [member for member in members if member is not None]
        return tuple(sorted(found, key=lambda m: (not m.is_core, not m.is_core and m.plugin.name)))

    def _member(self, plugin: type[Plugin]) -> Member | None:
        entry, reason = self._owners[plugin]
        sections: dict[str, BaseModel] = {}
        paths = self._paths.get(plugin, {})
        sound = True
        for path in paths:
            model, value = plugin.sections[path], self.sections[path]
            if value == "auto" and issubclass(model, RootModel):
                self.autos.append(path)
                continue
            value, autos = without_autos(value, [model], path)
            self.autos += autos
            try:
                sections[path] = model.model_validate(value)
            except ValidationError as error:
                label = _label(plugin, entry)
                found = describe(error, model, path, value, self._children(path), autos)
                self.problems += [f"{problem} [{label}]" for problem in found]
                sound = False
        if not sound:
            return None
        created = plugin(sections)
        return Member(created, entry, reason, entry.distribution == CORE or created.enabled())

    def _children(self, path: str) -> list[str]:
        """Keys that other plugins own inside the section at ``path``."""
        inside = (p for p in self._known if p.startswith(path + "."))
        return [p[len(path) + 1 :].partition(".")[0] for p in inside]

    def _unknown_plugin(self, path: str) -> str:
        return f"no plugin of that name is installed{did_you_mean(path, self._known)}"


def _read_choices(value: Any) -> tuple[dict[str, str], list[str], list[str]]:
    """The ``plugins`` section: choices among distributions, plugins to activate, problems."""
    if not isinstance(value, dict):
        return {}, [], [f"{PLUGINS_KEY}: expected an object, got {as_json(value)}"]
    choices = {name: item for name, item in value.items() if isinstance(item, str)}
    activated = [name for name, item in value.items() if item is True]
    problems = [
        f"{PLUGINS_KEY}.{name}: expected true (activate the plugin) or the name of a distribution "
        f"(choose who serves it), got {as_json(item)}"
        for name, item in value.items()
        if name not in choices and name not in activated
    ]
    return choices, activated, problems


_OFF: Mapping[str, tuple[object, ...]] = {
    "enabled": (False, None),
    "deepcompile": (False, None),
    "device": ("none", None),
    "stage": (0, None),
}
"""Key that switches a section -> the values that switch it off."""


def _is_off(value: Any) -> bool:
    """Whether a section asks for nothing, so that it does not matter that nobody serves it."""
    if not isinstance(value, dict):
        return value is None or value is False
    switches = [value[key] in off for key, off in _OFF.items() if key in value]
    nothing_set = bool(value) and all(not v or _is_off(v) for v in value.values())
    return nothing_set or (bool(switches) and all(switches))


def _other_place(key: str, models: Mapping[str, type[BaseModel]]) -> str:
    places = [f"{path}.{key}" for path, model in models.items() if key in model.model_fields]
    return f"; did you mean {places[0]!r}?" if places else ""


def _label(plugin: type[Plugin], entry: Entry) -> str:
    return f"plugin {plugin.name!r} ({entry.distribution} {entry.version})"

"""A plan: everything that a config decides before a device is touched. No torch, no job."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from drivetrain.contracts.loop.batch import ACCUMULATION, GLOBAL, MICRO, Batch
from drivetrain.contracts.world.axis import ATOMS, Atom, AxisRequest
from drivetrain.errors import ConfigError
from drivetrain.plan.config.composition import Composition, Member, compose
from drivetrain.plan.config.loading import load_config, overlay
from drivetrain.plan.hub import HOOKS, Hub
from drivetrain.plan.mesh_layout import MeshLayout
from drivetrain.plan.registry import Registry
from drivetrain.version import __version__
from drivetrain.wording import as_json

if TYPE_CHECKING:
    from drivetrain.contracts.plugin.plugin import Plugin

SectionT = TypeVar("SectionT", bound=BaseModel)


@dataclass(frozen=True)
class Explanation:
    """What a plan does and why; plain data that ``drivetrain explain`` shows.

    Args:
        plugins: label -> (why it is there, whether its hooks take part).
        hooks: hook -> labels of the plugins that implement it, in the order they are asked.
        mesh: axis -> number of ranks along it.
        settings: dtype, optimizer, schedule and every feature -> (value, where it comes from).
        values: derived value -> (value, where it comes from).
        notes: keys that are accepted without effect, and other remarks, one sentence each.
    """

    plugins: Mapping[str, tuple[str, bool]]
    hooks: Mapping[str, Sequence[str]]
    mesh: Mapping[str, int]
    settings: Mapping[str, tuple[object, str]]
    values: Mapping[str, tuple[object, str]]
    notes: Sequence[str]


@dataclass(frozen=True)
class ModelObjects:
    """Parts of a model whose classes name a plugin (``drivetrain_plugin``).

    Args:
        kind: name of the first one's class.
        wishes: what they ask of the plan (their ``drivetrain_wish``), each once, in order; plain
            data of which the plugin knows the meaning, such as how many ranks share out experts.
    """

    kind: str
    wishes: tuple[Any, ...] = ()


@dataclass
class Plan:
    """A checked config with its plugins; made by :meth:`build`.

    Attributes:
        config: the merged config, as given, with overlays.
        registry: what the plan's plugins come from, with the config's choices.
        hub: the composed plugins.
        members: plugins with their origin; those switched off are included.
        world_size: number of ranks.
        world_source: where that number comes from.
        autos: config paths that said ``"auto"``.
        section_notes: sections that are accepted although nothing installed serves them.
        batch_required: whether a plan without batch size is refused.
        serves_axes: mesh axes along which the caller's own code has ranks share work.
        axis_requests: what the plugins asked of the mesh.
        objects: parts of the model that have switched plugins on, by config path.
        layout: axes of the mesh.
        batch: the batch triple; ``None`` when it is neither required nor given.
    """

    config: dict[str, Any]
    registry: Registry
    hub: Hub
    members: tuple[Member, ...]
    world_size: int
    world_source: str
    autos: tuple[str, ...]
    batch_required: bool
    section_notes: tuple[str, ...] = ()
    serves_axes: frozenset[str] = frozenset()
    axis_requests: tuple[AxisRequest, ...] = ()
    objects: Mapping[str, ModelObjects] = field(default_factory=dict)
    layout: MeshLayout = field(init=False)
    batch: Batch | None = field(init=False, default=None)

    @classmethod
    def build(
        cls,
        config: Mapping[str, Any] | str | os.PathLike[str],
        *,
        overlays: Iterable[str] = (),
        world_size: int | None = None,
        registry: Registry | None = None,
        batch_required: bool = True,
        serves_axes: Iterable[str] = (),
        objects: Mapping[str, ModelObjects] | None = None,
    ) -> Plan:
        """Turn a config into a plan.

        Args:
            config: a dict, a path to JSON or YAML, or base64-url JSON.
            overlays: ``path=value`` assignments applied on top.
            world_size: number of ranks; else ``WORLD_SIZE`` of the environment, else 1.
            registry: where plugins come from; else everything installed.
            batch_required: whether a batch size must be given; serving needs none.
            serves_axes: mesh axes along which your own code has ranks share work, so that plugins
                which would do so leave it to you.
            objects: config paths of plugins that classes in the model name -> what they are; each
                takes part as if the config had an empty section at that path.

        Raises:
            ConfigError: with every problem that was found.
            PluginError: a plugin that the config names cannot be used.
        """
        merged = overlay(load_config(config), overlays)
        world, source = _world_size(world_size)
        known = registry if registry is not None else Registry.installed()
        kinds = {path: found.kind for path, found in (objects or {}).items()}
        composition = compose(merged, known, kinds)
        plan = cls(
            config=merged,
            registry=composition.registry,
            hub=_hub(composition),
            members=composition.members,
            world_size=world,
            world_source=source,
            autos=composition.autos,
            batch_required=batch_required,
            section_notes=composition.notes,
            serves_axes=frozenset(serves_axes),
            objects=dict(objects or {}),
        )
        plan._check()
        return plan

    @property
    def plugins(self) -> tuple[Plugin, ...]:
        """The active plugins."""
        return tuple(member.plugin for member in self.members if member.active)

    def section(self, model: type[SectionT]) -> SectionT:
        """The section validated by ``model``; its defaults when the config does not contain it."""
        for member in self.members:
            if model in member.plugin.sections.values():
                return member.plugin.section(model)
        return model()

    def features(self) -> dict[str, object]:
        """Feature path -> value, of all active plugins."""
        return {path: value for p in self.plugins for path, value in p.features().items()}

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal on every rank: core's version, active plugins, merged config."""
        versions = {
            member.plugin.name: f"{member.entry.distribution} {member.entry.version}"
            for member in self.members
            if member.active
        }
        return {
            "drivetrain": __version__,
            "plugins": dict(sorted(versions.items())),
            "config": self.config,
        }

    def explain(self) -> Explanation:
        """Which plugins take part and why, their hooks in order, mesh, batch, derived values."""
        notes = [f'{path}: "auto", so its default applies' for path in self.autos]
        notes += self.section_notes
        notes += [note for plugin in self.plugins for note in plugin.notes()]
        hooks = {
            name: [self.hub.label(impl.plugin_name) for impl in self.hub.implementations(name)]
            for name in HOOKS
        }
        return Explanation(
            plugins={member.label: (member.reason, member.active) for member in self.members},
            hooks={name: labels for name, labels in hooks.items() if labels},
            mesh={name: self.layout.size(name) for name in self.layout.axes},
            settings=self._settings(),
            values=self._values(),
            notes=notes,
        )

    def shards_origin(self) -> str:
        """How the number of data shards comes about, e.g. ``8 ranks from WORLD_SIZE / tp 2``."""
        sources = {r.name: r.source for r in self.axis_requests if isinstance(r, Atom)}
        others = [
            f"{atom} {self.layout.size(atom)} from {sources.get(atom) or 'a plugin'}"
            for atom in ATOMS
            if atom != "dp" and self.layout.size(atom) > 1
        ]
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        return " / ".join([f"{ranks} from {self.world_source}", *others])

    def _settings(self) -> dict[str, tuple[object, str]]:
        features = self.features()
        mode = next((m for m in ("fp16", "bf16") if features.get(f"{m}.enabled")), None)
        found: dict[str, tuple[object, str]] = {
            "dtype": (mode or "fp32", f"{mode}.enabled" if mode else "default")
        }
        for kind in ("optimizer", "scheduler"):
            section = self.config.get(kind) or {}
            params = as_json(section.get("params") or {})
            given = f"{section['type']} {params}" if section.get("type") else None
            found[kind] = (given or "none but the script's", "config" if given else "default")
        shown = {path: value for path, value in features.items() if path != "optimizer.type"}
        return found | {path: (value, self._origin(path)) for path, value in shown.items()}

    def _origin(self, path: str) -> str:
        section: Any = self.config
        for key in path.split("."):
            section = section.get(key) if isinstance(section, Mapping) else None
        return "default" if section is None or path in self.autos else "config"

    def _values(self) -> dict[str, tuple[object, str]]:
        values: dict[str, tuple[object, str]] = {
            "world_size": (self.world_size, self.world_source),
            "data_shards": (self.layout.size("dp"), self.shards_origin()),
        }
        if self.batch is not None:
            triple = (
                (GLOBAL, self.batch.train_batch_size),
                (MICRO, self.batch.micro_batch_size),
                (ACCUMULATION, self.batch.accumulation_steps),
            )
            for name, value in triple:
                given = name in self.config and name not in self.autos
                values[name] = (value, "config" if given else "derived from the others")
        return values

    def _check(self) -> None:
        """Lay out the mesh, check sections against each other, and solve the batch."""
        problems: list[str] = []
        try:
            self.axis_requests = tuple(self.hub.mesh_axes(self))
            self.layout = MeshLayout.build(self.world_size, self.axis_requests)
        except ConfigError as error:
            source = f"world size {self.world_size} from {self.world_source}"
            raise ConfigError([f"{problem} ({source})" for problem in error.problems]) from error
        problems += [str(problem) for problem in self.hub.configure(self)]
        problems += self._conflicts()
        try:
            self.batch = self.hub.plan_batch(self)
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError(problems)

    def _conflicts(self) -> list[str]:
        features = self.features()
        found: list[str] = []
        for plugin in self.plugins:
            for conflict in plugin.conflicts():
                sides = ((conflict.feature, conflict.value), (conflict.other, conflict.other_value))
                if all(
                    path in features and (value is None or features[path] == value)
                    for path, value in sides
                ):
                    one, other = (f"{path} = {as_json(features[path])}" for path, _ in sides)
                    found.append(f"{one} cannot be combined with {other}: {conflict.reason}")
        return found


def _hub(composition: Composition) -> Hub:
    active = [member for member in composition.members if member.active]
    return Hub(
        core=[member.plugin for member in active if member.is_core],
        others=[member.plugin for member in active if not member.is_core],
        labels={member.plugin.name: member.label for member in active},
    )


def _world_size(argument: int | None) -> tuple[int, str]:
    """The number of ranks and where it comes from."""
    if argument is not None:
        given, source = str(argument), "the world_size argument"
    elif "WORLD_SIZE" in os.environ:
        given, source = os.environ["WORLD_SIZE"], "WORLD_SIZE"
    else:
        return 1, "the default (WORLD_SIZE is not set)"
    if not given.isdecimal() or len(given) > 9 or int(given) < 1:
        raise ConfigError(
            f"the world size must be a positive number, got {given[:40]!r} from {source}"
            + (", which is too large" if len(given) > 9 else "")
        )
    return int(given), source

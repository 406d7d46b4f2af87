"""A recipe: modifiers in order, from YAML, JSON or a dict, and what of a model each works on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain.states.units import units as repeated_blocks
from drivetrain.wording import did_you_mean
from drivetrain_compression.recipe.modifier import (
    GROUP,
    CompressionUnit,
    Modifier,
    ModifierConfig,
    Target,
)

AnyModifier = Modifier[Any]

EVERY = "*"


@dataclass(frozen=True)
class Recipe:
    """Modifiers in the order in which they run: by place, and within one as they are listed.

    Args:
        modifiers: the methods, each with its config.
    """

    modifiers: tuple[AnyModifier, ...]

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any]) -> Recipe:
        """Read a recipe: ``{"modifiers": [{name: config}, ...]}``.

        Args:
            source: a path of a YAML or JSON file, or what is in one.

        Raises:
            ConfigError: no such file, no recipe, an unknown modifier, or a wrong value; says which
                modifier of the list is at fault.
        """
        data = source if isinstance(source, Mapping) else _load(Path(source))
        listed = data.get("modifiers") if isinstance(data, Mapping) else None
        if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
            raise ConfigError(
                "a recipe is an object with the key 'modifiers', a list of at least one "
                f"{{name: config}}, got {_shown(data)}"
            )
        if unknown := set(data) - {"modifiers"}:
            raise ConfigError(f"recipe: unknown key {sorted(map(str, unknown))[0]!r}")
        classes = modifier_classes()
        made = [_modifier(number, entry, classes) for number, entry in enumerate(listed)]
        return cls(tuple(sorted(made, key=lambda modifier: modifier.place)))

    def assign(self, model: nn.Module) -> list[tuple[AnyModifier, list[CompressionUnit]]]:
        """Find what each modifier works on.

        Returns:
            Each modifier with its units, those without targets left out, in the model's order.

        Raises:
            ConfigError: a pattern matches no module that the modifier can work on, or two modifiers
                decide the same of one module.
        """
        return assign(self.modifiers, model)


def modifier_classes() -> dict[str, type[AnyModifier]]:
    """All installed modifiers by name.

    Raises:
        ConfigError: two packages offer one name.
    """
    found: dict[str, Any] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        if entry.name in found and found[entry.name].value != entry.value:
            raise ConfigError(
                f"the modifier {entry.name!r} is offered by {found[entry.name].value} and by "
                f"{entry.value}; uninstall one"
            )
        found[entry.name] = entry
    return {name: entry.load() for name, entry in found.items()}


def assign(
    modifiers: Sequence[AnyModifier], model: nn.Module
) -> list[tuple[AnyModifier, list[CompressionUnit]]]:
    """See :meth:`Recipe.assign`."""
    owners: dict[tuple[int, str], tuple[str, str]] = {}
    found = []
    for modifier in modifiers:
        own = [u for u in units_for(modifier, model) if u.targets]
        for target in (target for unit in own for target in unit.targets):
            _claim(modifier, target, owners)
        found.append((modifier, own))
    return found


def units_for(modifier: AnyModifier, model: nn.Module) -> list[CompressionUnit]:
    """All units of ``model`` with the modules that the modifier's patterns choose.

    Returns:
        The repeated blocks in order, and last the rest, named ``""``.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    config: ModifierConfig = modifier.config
    chosen = matching(model, config.modules, modifier.takes, modifier.label)
    for left_out in matching(model, config.exclude, modifier.takes, f"{modifier.label}: exclude"):
        chosen = [target for target in chosen if target.module is not left_out.module]
    blocks = [CompressionUnit(u.name, u.module) for u in repeated_blocks(model) if u.name]
    rest = CompressionUnit("", model)
    owner = {id(part): b for b in blocks for part in b.module.modules()}
    targets: dict[str, list[Target]] = {}
    for target in chosen:
        unit = owner.get(id(target.module), rest)
        targets.setdefault(unit.name, []).append(target)
    return [replace(unit, targets=tuple(targets.get(unit.name, ()))) for unit in (*blocks, rest)]


def matching(
    model: nn.Module, patterns: Iterable[str], takes: tuple[type[nn.Module], ...], label: str
) -> list[Target]:
    """Modules of the kinds ``takes`` whose names match one of ``patterns``, in the model's order.

    Raises:
        ConfigError: a pattern is no regular expression, or matches nothing.
    """
    candidates = [Target(n, m) for n, m in model.named_modules() if isinstance(m, takes)]
    kinds = " or ".join(kind.__name__ for kind in takes)
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            search = re.compile("" if pattern == EVERY else pattern).search
        except re.error as error:
            raise ConfigError(f"{label}: {pattern!r} is no regular expression: {error}") from None
        names = {target.name for target in candidates if search(target.name)}
        if not names:
            raise ConfigError(
                f"{label}: no {kinds} of {type(model).__name__} has a name in which {pattern!r} is "
                f"found; there are {_some([target.name for target in candidates])}"
            )
        chosen |= names
    return [target for target in candidates if target.name in chosen]


def _claim(
    modifier: AnyModifier, target: Target, owners: dict[tuple[int, str], tuple[str, str]]
) -> None:
    if not modifier.claims:
        return
    # Tied modules have one weight, which cannot have two sets of values either.
    shared = getattr(target.module, "weight", None)
    key = (id(target.module if shared is None else shared), modifier.claims)
    other, name = owners.setdefault(key, (modifier.label, target.name))
    if other != modifier.label:
        raise ConfigError(
            f"{other} ({name}) and {modifier.label} ({target.name}) both decide the "
            f"{modifier.claims} of one weight; narrow the patterns of one of them, or exclude it"
        )


def _modifier(number: int, entry: Any, classes: Mapping[str, type[AnyModifier]]) -> AnyModifier:
    where = f"modifiers[{number}]"
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ConfigError(f"recipe: {where} is {{name: config}} with one name, got {_shown(entry)}")
    ((name, config),) = entry.items()
    if name not in classes:
        hint = did_you_mean(str(name), classes)
        raise ConfigError(
            f"recipe: {where}: no modifier {name!r} is installed{hint}; there are "
            f"{', '.join(sorted(classes))}"
        )
    return make_modifier(classes[name], {} if config is None else config, f"{name} ({where})")


def make_modifier(kind: type[AnyModifier], config: Mapping[str, Any], label: str) -> AnyModifier:
    """Build a modifier from plain data.

    Raises:
        ConfigError: a key is unknown or a value wrong; says which.
    """
    try:
        return kind(kind.config_class.model_validate(config), label)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{label}: {path + ': ' if path else ''}{reason}") from None


def _load(path: Path) -> Any:
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"the recipe {path} cannot be read: {error.strerror}") from None
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"the recipe {path} is neither YAML nor JSON: {error}") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _some(names: Sequence[str], count: int = 6) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more

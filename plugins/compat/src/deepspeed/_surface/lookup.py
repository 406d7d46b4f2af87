"""From a dotted name of DeepSpeed to the object that serves it, or to the reason why none does."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from deepspeed._surface.names import INSTEAD, NEEDS, OWN, RAISES, READS_CONFIG, SAME, SHOWS

if TYPE_CHECKING:
    from drivetrain.plan.registry import Registry

Status = Literal["works", "needs", "not yet", "unknown"]

GROUP: Literal["deepspeed"] = "deepspeed"
"""Group of the entry points that serve names: dotted ones, without ``deepspeed.``."""

GUIDE = "docs/moving-from-deepspeed.md has the whole list"


def load(dotted: str) -> Any:
    """Import what serves a name.

    Args:
        dotted: the name, without ``deepspeed.``.

    Raises:
        LookupError: nothing serves it; the text says what to do.
        PluginError: the package that serves it cannot be imported.
    """
    for candidate in _candidates(dotted):
        if (entry := _registry().find(GROUP, candidate)) is not None:
            return _reading(candidate, entry.load())
        if (target := _own().get(candidate)) is not None:
            module, _, attribute = target.partition(":")
            return _reading(candidate, getattr(import_module(module), attribute))
    raise LookupError(why_not(dotted))


def status(dotted: str) -> tuple[Status, str]:
    """Tell what becomes of a name, without importing anything that serves it.

    Returns:
        ``works`` with where the name leads, ``needs`` with a package, ``not yet`` with what to use
        instead, or ``unknown``.
    """
    for candidate in _candidates(dotted):
        if (entry := _registry().find(GROUP, candidate)) is not None:
            return "works", entry.value.replace(":", ".")
        if (target := _own().get(candidate)) is not None:
            return "works", target.replace(":", ".")
    for candidate in _candidates(dotted):
        if candidate in INSTEAD:
            return "not yet", INSTEAD[candidate]
        if (package := _needs().get(candidate)) is not None:
            return "needs", package
    return "unknown", ""


def why_not(dotted: str) -> str:
    """Say why nothing serves a name, and what to do."""
    from drivetrain.wording import did_you_mean

    kind, text = status(dotted)
    module, _, name = dotted.rpartition(".")
    full = f"deepspeed.{dotted}"
    if kind == "needs":
        return f"{full} needs {text}, {_how_to_get(dotted, text)}"
    if kind == "not yet":
        return f"{full} does not exist in Drivetrain; instead: {text}"
    if is_module(dotted):
        return f"{full} is a module of DeepSpeed that has no name of its own here; {GUIDE}"
    hint = did_you_mean(name, list(names_in(module)))
    where = f"deepspeed.{module}" if module else "deepspeed"
    return f"Drivetrain's {where} has no name {name!r}{hint}; {GUIDE}"


def is_module(dotted: str) -> bool:
    """Whether ``deepspeed.<dotted>`` is a module; the empty name is the package itself."""
    return dotted in _modules()


def names_in(module: str) -> Iterator[str]:
    """Names that ``deepspeed.<module>`` shows: those that are served, and its submodules."""
    prefix = f"{module}." if module else ""
    seen = {""}
    for dotted in (*served(), *_modules()):
        for shown in (prefix, *(f"{other}." for other in SHOWS.get(module, ()))):
            if dotted.startswith(shown):
                name = dotted.removeprefix(shown)
                if "." not in name and name not in seen:
                    seen.add(name)
                    yield name
    yield from (name for name in _same_in(prefix) if name not in seen)


def served() -> list[str]:
    """Every dotted name that leads to an object here, each once, sorted."""
    return sorted({*_own(), *_registry().names(GROUP)})


def everything() -> list[str]:
    """Every dotted name that is known: served, missing a package, or replaced; sorted."""
    return sorted({*served(), *SAME, *_needs(), *INSTEAD})


def _reading(dotted: str, value: Any) -> Any:
    if dotted in RAISES:
        from deepspeed._parts.errors import raising

        return raising(value, f"deepspeed.{dotted}")
    if dotted not in READS_CONFIG:
        return value
    from deepspeed._config.translated import translated
    from deepspeed._parts.parameters import show_attributes

    show_attributes()
    return translated(value)


def _same_in(prefix: str) -> Iterator[str]:
    for dotted, other in SAME.items():
        name = dotted.removeprefix(prefix)
        if dotted.startswith(prefix) and "." not in name and status(other)[0] == "works":
            yield name


def _candidates(dotted: str) -> Iterator[str]:
    """The name itself, and under which other names it is declared."""
    yield dotted
    if dotted in SAME:
        yield SAME[dotted]
    module, _, name = dotted.rpartition(".")
    for other in SHOWS.get(module, ()):
        yield f"{other}.{name}"


def _how_to_get(dotted: str, package: str) -> str:
    from drivetrain.plan.known import PLANNED

    if package in PLANNED:
        return "which is not released yet"
    for candidate in _candidates(dotted):
        if reason := _registry().missing(GROUP, candidate):
            return reason.partition(", ")[2]
    return f"which is not installed: pip install {package}"


def _registry() -> Registry:
    from drivetrain.plan.registry import Registry

    return Registry.installed()


@lru_cache(maxsize=1)
def _own() -> dict[str, str]:
    """Dotted name -> ``module:attribute`` of what this package serves itself."""
    found = {}
    for module, homes in OWN.items():
        for home, names in homes.items():
            for name in names.split():
                theirs, _, ours = name.partition("=")
                found[f"{module}.{theirs}" if module else theirs] = f"{home}:{ours or theirs}"
    return found


@lru_cache(maxsize=1)
def _needs() -> dict[str, str]:
    """Dotted name -> package that is to serve it."""
    return {
        f"{module}.{name}" if module else name: package
        for package, modules in NEEDS.items()
        for module, names in modules.items()
        for name in names.split()
    }


@lru_cache(maxsize=1)
def _modules() -> frozenset[str]:
    """Every module there is, as dotted names."""
    dotted = [*OWN, *SHOWS]
    names = (*_registry().names(GROUP), *_needs(), *INSTEAD, *SAME)
    dotted += [name.rpartition(".")[0] for name in names]
    split = [name.split(".") for name in dotted]
    return frozenset(".".join(parts[:end]) for parts in split for end in range(len(parts) + 1))

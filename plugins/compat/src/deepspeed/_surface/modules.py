"""Modules of DeepSpeed that exist in memory alone, and show what the lookup finds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

PACKAGE = "deepspeed"

_DUNDER = ("__compatible_ops__", "__installed_ops__")
"""Names of DeepSpeed's own that look like Python's."""


class ShownModule(ModuleType):
    """A module whose names are looked up when they are first used."""

    def __getattr__(self, name: str) -> Any:
        return attribute(self.__name__, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *names_in(self.__name__)})


def attribute(module: str, name: str) -> Any:
    """What ``module`` shows under ``name``; it is kept there for the next time.

    Raises:
        AttributeError: nothing serves the name; the text says what to do.
    """
    if name.startswith("__") and name not in _DUNDER:  # asked for by Python itself, very often
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    from deepspeed._surface import lookup

    dotted = f"{module}.{name}".removeprefix(f"{PACKAGE}.")
    try:
        value = lookup.load(dotted)
    except LookupError as error:
        if lookup.is_module(dotted):
            __import__(f"{PACKAGE}.{dotted}")
            return sys.modules[f"{PACKAGE}.{dotted}"]
        raise AttributeError(str(error), name=name) from None
    setattr(sys.modules[module], name, value)
    return value


def names_in(module: str) -> list[str]:
    """Names that a module shows."""
    from deepspeed._surface import lookup

    return list(lookup.names_in(module.removeprefix(PACKAGE).removeprefix(".")))


class _Finder:
    """Finds and loads modules that no file holds; asked after Python's own finders.

    It derives from none of ``importlib.abc``, whose import would take longer than this package's.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module below ``deepspeed``.

        Raises:
            ModuleNotFoundError: there is none. It carries no name: with one, Python would replace
                the text in ``from module import name`` by its own, which says nothing.
        """
        dotted = fullname.removeprefix(f"{PACKAGE}.")
        if dotted == fullname or dotted.startswith("_"):
            return None
        from importlib.machinery import ModuleSpec

        from deepspeed._surface import lookup

        if not lookup.is_module(dotted):
            raise ModuleNotFoundError(lookup.why_not(dotted))
        return ModuleSpec(fullname, cast("Any", self), origin="Drivetrain", is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return ShownModule(spec.name, f"DeepSpeed's {spec.name}, as Drivetrain serves it.")

    def exec_module(self, module: ModuleType) -> None:
        """Nothing runs: a module is empty until its names are used."""


def install() -> None:
    """Let Python find these modules."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())

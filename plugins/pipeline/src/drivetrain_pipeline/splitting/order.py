"""In which order a model's parts are called: read from its forward, before anything runs.

The *spine* are the modules that contain units: the model itself, and what lies between it and its
blocks. Their own forward runs on every stage. All other parts with parameters are *sides*
(embeddings, norms, heads), and belong to one place between units.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from types import CodeType
from typing import Any, Literal

from torch import nn

from drivetrain.errors import ConfigError
from drivetrain.states.units import units

_LOADS = ("LOAD_ATTR", "LOAD_METHOD")

_DEEPEST = 4
"""How far methods that forward calls are followed."""


@dataclass(eq=False)
class Part:
    """A unit, or a side: an outermost part with parameters that contains no unit.

    Args:
        name: path in the model.
        module: the part.
        unit: number of the unit, or ``None`` for a side.
        positions: for a side: how many units run before it; several where it lies in several
            places.
    """

    name: str
    module: nn.Module
    unit: int | None = None
    positions: set[int] = field(default_factory=set)


@dataclass
class Order:
    """The parts of a model, in order of their first call.

    Args:
        units: the repeated blocks.
        sides: everything else that has parameters.
        spine: modules that contain units, by path.
    """

    units: list[Part] = field(default_factory=list)
    sides: list[Part] = field(default_factory=list)
    spine: dict[str, nn.Module] = field(default_factory=dict)


def order_of(model: nn.Module, place: Mapping[str, Literal["first", "last"]]) -> Order:
    """Return the units and sides of ``model`` in the order in which its forward calls them.

    Args:
        model: to be split.
        place: sides that are known to run before the first, or after the last unit.

    Raises:
        ConfigError: the model has no repeated units, a unit lies in two places, or ``place`` names
            no side.
    """
    repeated = {id(unit.module) for unit in units(model) if unit.module is not model}
    if not repeated:
        raise ConfigError(
            f"pipeline.stages: {type(model).__name__} cannot be split, since it has no repeated "
            "units (children of one class in a ModuleList, Sequential or ModuleDict): describe its "
            "layers with drivetrain_pipeline.PipelineModule"
        )
    found = Order()
    known: dict[int, Part] = {}
    for name, module in _walk(model, "", repeated, found.spine):
        if id(module) in repeated:
            if id(module) in known:
                raise ConfigError(
                    f"pipeline.stages: unit {name} is the same module as {known[id(module)].name}; "
                    "a unit that runs twice cannot be on one stage"
                )
            part = known[id(module)] = Part(name, module, unit=len(found.units))
            found.units.append(part)
        else:
            if id(module) not in known:
                known[id(module)] = Part(name, module)
                found.sides.append(known[id(module)])
            known[id(module)].positions.add(len(found.units))
    _apply(place, found)
    return found


def _apply(place: Mapping[str, Literal["first", "last"]], order: Order) -> None:
    sides = {side.name: side for side in order.sides}
    for name, where in place.items():
        if name not in sides:
            raise ConfigError(
                f"pipeline.place.{name}: the model has no such part with parameters outside of its "
                f"units; it has {', '.join(sides) or 'none'}"
            )
        sides[name].positions = {0 if where == "first" else len(order.units)}


def _walk(
    module: nn.Module, name: str, repeated: set[int], spine: dict[str, nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield units and sides in order of their calls."""
    if id(module) in repeated:
        yield name, module
    elif any(id(part) in repeated for part in module.modules()):
        spine[name] = module
        for key in _ordered_children(module):
            child = module._modules[key]
            if child is not None:
                yield from _walk(child, f"{name}.{key}" if name else key, repeated, spine)
    elif next(module.parameters(), None) is not None:
        yield name, module


def _ordered_children(module: nn.Module) -> list[str]:
    """Names of children in the order in which forward calls them first.

    One that forward only looks into (``self.norm.weight``) comes where it does so. A child that
    forward does not name stays behind the one that it is registered after.
    """
    registered = list(module._modules)
    uses = list(_uses(type(module), _forward_of(type(module))))
    called = {name for name, is_called in uses if is_called}
    named = list(
        dict.fromkeys(
            n for n, is_called in uses if n in registered and (is_called or n not in called)
        )
    )
    ordered = list(named)
    for index, name in enumerate(registered):
        if name not in named:
            before = registered[index - 1] if index else None
            ordered.insert(0 if before is None else ordered.index(before) + 1, name)
    return ordered


def _forward_of(kind: type) -> Any:
    """The forward of a class that calls children: one that calls that of its bases is passed."""
    forwards = [vars(base)["forward"] for base in kind.__mro__ if "forward" in vars(base)]
    for forward in forwards:
        code = getattr(inspect.unwrap(forward), "__code__", None)
        if code is None or "super" not in code.co_names or "forward" not in code.co_names:
            return forward
    return forwards[-1] if forwards else None


def _uses(kind: type, function: Any, depth: int = 0) -> Iterator[tuple[str, bool]]:
    """Attributes in the code of a method and of methods that it calls; whether each is called."""
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    if code is None or depth > _DEEPEST:
        return
    for name, is_called in _attributes(code):
        method = inspect.getattr_static(kind, name, None)
        if inspect.isfunction(method) and name != "forward":
            yield from _uses(kind, method, depth + 1)
        else:
            yield name, is_called


def _attributes(code: CodeType) -> Iterator[tuple[str, bool]]:
    """Names of attributes in order; one that another attribute is taken of is not called."""
    instructions = list(dis.get_instructions(code))
    for instruction, following in zip_longest(instructions, instructions[1:]):
        if isinstance(instruction.argval, CodeType):
            yield from _attributes(instruction.argval)
        elif instruction.opname in _LOADS:
            yield str(instruction.argval), following is None or following.opname not in _LOADS

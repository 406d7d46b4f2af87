"""The page of the Python interface: what users and authors of plugins hold in their hands."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from html import escape
from typing import Any

from tools.docstrings import Docstring, one_line

NAMES: Mapping[str, Sequence[str]] = {
    "Training": (
        "drivetrain.initialize",
        "drivetrain.Engine",
        "drivetrain.contracts.StepReport",
        "drivetrain.whole",
        "drivetrain.checkpoint.save",
        "drivetrain.checkpoint.load",
        "drivetrain.Plan",
        "drivetrain.contracts.Batch",
        "drivetrain.Job",
        "drivetrain.communication.mesh.Mesh",
        "drivetrain.engine.loader.DataLoader",
        "drivetrain.contracts.LoaderRequest",
    ),
    "Plugins": (
        "drivetrain.contracts.Plugin",
        "drivetrain.contracts.Section",
        "drivetrain.contracts.Problem",
        "drivetrain.contracts.Conflict",
        "drivetrain.contracts.Transform",
        "drivetrain.contracts.ParameterInfo",
        "drivetrain.contracts.Placement",
        "drivetrain.checkpoint.StateWriter",
        "drivetrain.checkpoint.StateReader",
        "drivetrain.contracts.Fragment",
        "drivetrain.contracts.Box",
        "drivetrain.states.device_home.tensor_fragment",
        "drivetrain.plan.registry.Registry",
    ),
    "Optimizers": (
        "drivetrain.contracts.UpdateRule",
        "drivetrain.contracts.WrappedRule",
        "drivetrain.contracts.StateSpec",
        "drivetrain.contracts.BucketView",
        "drivetrain.optimization.spans.spans",
        "drivetrain.optimization.spans.tensors",
        "drivetrain.optimization.spans.Span",
        "drivetrain.contracts.Params",
        "drivetrain.optimization.schedules.Schedule",
    ),
    "States": (
        "drivetrain.contracts.ModelStates",
        "drivetrain.contracts.BucketSpec",
        "drivetrain.contracts.Segment",
        "drivetrain.contracts.StateHome",
        "drivetrain.contracts.ParameterHome",
    ),
    "Communication": (
        "drivetrain.contracts.Communicator",
        "drivetrain.contracts.Collective",
        "drivetrain.contracts.Tag",
        "drivetrain.contracts.Accelerator",
    ),
    "Tests": (
        "drivetrain.testing.run_distributed",
        "drivetrain.testing.assert_trains_like_reference",
        "drivetrain.testing.reference_losses",
        "drivetrain.testing.PluginConformance",
        "drivetrain.testing.StateConformance",
        "drivetrain.testing.OptimizerConformance",
        "drivetrain.testing.AcceleratorConformance",
    ),
}
"""Part of the page -> what it describes, each by the module that it is imported from."""

INTRODUCTION = """\
# Python interface

What a training script and the author of a plugin use. Names that begin with an underscore, and what
is not on this page, may change without notice.
"""


def api_page() -> str:
    """All of it, from signatures and docstrings."""
    parts = [INTRODUCTION]
    for title, names in NAMES.items():
        parts.append(f"## {title}\n")
        parts += [_described(name) for name in names]
    return "\n".join(parts)


def thing(path: str) -> Any:
    """The object of a dotted name."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _described(path: str) -> str:
    module, _, name = path.rpartition(".")
    found = thing(path)
    doc = Docstring.of(found)
    lines = [f"### `{name}`\n", f"```python\nfrom {module} import {name}\n```\n", f"{doc.text}\n"]
    if inspect.isclass(found):
        lines += _fields(found, doc)
        lines += _methods(found)
    else:
        lines += [f"```python\ndef {name}{_signature(found)}: ...\n```\n", *_arguments(found, doc)]
    for section in ("Returns", "Raises"):
        lines += _sentences(section, doc)
    return "\n".join(lines)


def _fields(kind: type, doc: Docstring) -> Iterator[str]:
    """A row for each documented field, argument or attribute, with its type if it is known."""
    meanings = doc.meanings()
    types = _types(kind)
    if meanings:
        yield "| name | type | meaning |\n|---|---|---|"
        for name, text in meanings.items():
            yield f"| `{name}` | {_code(types.get(name, ''))} | {text} |"
        yield ""


def _types(kind: type) -> dict[str, str]:
    found = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("drivetrain"):
            found.update({n: str(t) for n, t in inspect.get_annotations(base).items()})
    made_by = vars(kind).get("__init__")
    constructor = inspect.signature(made_by).parameters if made_by is not None else {}
    for name, parameter in constructor.items():
        if parameter.annotation is not parameter.empty:
            found.setdefault(name, str(parameter.annotation))
    return {name: re.sub(r"^ClassVar\[(.*)\]$", r"\1", text) for name, text in found.items()}


def _methods(kind: type) -> Iterator[str]:
    """A row for each public method and property that is Drivetrain's own."""
    rows = []
    for name, member in inspect.getmembers_static(kind):
        owner = next(base for base in kind.__mro__ if name in vars(base) or base is object)
        public = not name.startswith("_") and owner.__module__.startswith("drivetrain")
        called = getattr(member, "__func__", member)
        is_property = isinstance(member, (property, cached_property))
        if not public or not (inspect.isfunction(called) or is_property):
            continue
        first = one_line(Docstring.of(member).first)
        sign = "" if is_property else _signature(called, bound=True)
        rows.append(f"| {_code(name + sign)} | {first} |")
    if rows:
        yield "| member | |\n|---|---|"
        yield from rows
        yield ""


def _signature(function: Any, *, bound: bool = False) -> str:
    """Names and defaults; types are in the table of arguments."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    if bound and parameters and parameters[0].name in ("self", "cls"):
        parameters = parameters[1:]
    shown = [p.replace(annotation=p.empty, default=_written(p.default)) for p in parameters]
    return str(signature.replace(parameters=shown, return_annotation=signature.empty))


class _Named:
    """A default that is a class or function, shown by its name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


def _written(default: Any) -> Any:
    named = callable(default) and default is not inspect.Parameter.empty
    return _Named(default.__name__) if named else default


def _arguments(function: Any, doc: Docstring) -> Iterator[str]:
    meanings = doc.meanings()
    if meanings:
        yield "| argument | type | meaning |\n|---|---|---|"
        for name, parameter in inspect.signature(function).parameters.items():
            kind = "" if parameter.annotation is parameter.empty else str(parameter.annotation)
            yield f"| `{name}` | {_code(kind)} | {meanings.get(name, '')} |"
        yield ""


def _sentences(section: str, doc: Docstring) -> Iterator[str]:
    for name, text in doc.sections.get(section, []):
        who = f"`{name}`: " if name else ""
        yield f"{section}: {who}{text}\n"


def _code(text: str) -> str:
    """Code for a table cell, where a bar would end it, and GitHub and MkDocs escape it apart."""
    if "|" in text:
        return f"<code>{escape(text, quote=False).replace('|', '&#124;')}</code>"
    return f"`{text}`" if text else ""

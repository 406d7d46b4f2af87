"""What becomes of each key of a DeepSpeed config here, from what is installed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, RootModel

from deepspeed._config.keys import OPEN
from deepspeed._config.translate import LOOSE, OFFLOADS, WITHOUT_EFFECT, WORKS_HERE
from drivetrain.contracts.plugin.section import NO_EFFECT, Section
from drivetrain.plan.known import PLANNED, SECTIONS
from drivetrain.plan.registry import Registry

Status = Literal["works", "without effect", "needs", "refused"]

_SCALAR = "Accepted"
"""What the docstring of a scalar section without effect begins with."""


def key_status(path: str, registry: Registry | None = None) -> tuple[Status, str]:
    """Tell what becomes of a config path.

    Args:
        path: one of :func:`deepspeed._config.keys.paths`.
        registry: what is installed.

    Returns:
        ``works`` with a remark or nothing, ``without effect`` with the reason, ``needs`` with a
        package, or ``refused`` with what to do.
    """
    registry = registry or Registry.installed()
    if path in WITHOUT_EFFECT:
        return "without effect", WITHOUT_EFFECT[path]
    if path in WORKS_HERE:
        return "works", WORKS_HERE[path]
    last = path.rpartition(".")[2]
    if path == f"zero_optimization.{last}" and last in OFFLOADS:
        return "works", f"is `{OFFLOADS[last]}`"
    keys = path.split(".")
    for end in range(len(keys), 0, -1):
        owned = ".".join(keys[:end])
        if (entry := registry.find("plugins", owned)) is not None:
            return _inside(entry.load().sections[owned], keys[end:], path)
        if owned in SECTIONS:
            return "needs", _package(SECTIONS[owned])
    return "refused", "nothing here has this key"


def _package(name: str) -> str:
    return f"`{name}`" + (", not released yet" if name in PLANNED else "")


def _inside(model: type[BaseModel], keys: list[str], path: str) -> tuple[Status, str]:
    about = " ".join((model.__doc__ or "").split())
    if not keys and about.startswith(_SCALAR):
        return "without effect", "`drivetrain explain` says why"
    if (about.startswith("A section") and "must" in about) or "is not supported" in about:
        return "refused", "leave it out, or switched off"
    inner: Any = model
    for key in keys:
        if issubclass(inner, RootModel):
            return "works", ""
        if issubclass(inner, Section) and key in inner.renamed:
            return "works", f"is `{inner.renamed[key]}`"
        field = inner.model_fields.get(key)
        if field is None:
            loose = path.split(".")[0] in LOOSE
            reason = "DeepSpeed itself no longer reads it" if loose else "leave it out"
            return ("without effect" if loose else "refused"), reason
        text = " ".join((field.description or "").split())
        if text.startswith(NO_EFFECT):
            return "without effect", text.removeprefix(NO_EFFECT).rstrip(".")
        if path in OPEN or not _is_model(field.annotation):
            return "works", ""
        inner = field.annotation
    return "works", ""


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)

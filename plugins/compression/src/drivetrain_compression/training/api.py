"""What scripts call: compress a model before training, and clean it after."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from torch import nn

from drivetrain.contracts import Section
from drivetrain.errors import ConfigError
from drivetrain_compression.section import PATH, CompressionSection
from drivetrain_compression.students.distilling import Distillation, module_of
from drivetrain_compression.students.layers import copy_layers
from drivetrain_compression.training.build import modifiers_of
from drivetrain_compression.training.session import Session, session_of

Config = str | Path | Mapping[str, Any]
SectionT = TypeVar("SectionT", bound=Section)


def init_compression(
    model: nn.Module, config: Config, teacher_model: nn.Module | None = None
) -> nn.Module:
    """Put the modifiers of a config's ``compression_training`` on a model; returns the model.

    Only needed where a script wants them before the engine is built: to train learned scores with
    an optimizer of its own, or to give a teacher.

    Args:
        model: changed in place.
        config: a config, or the path of one.
        teacher_model: whose layers the model begins with, for ``layer_reduction``, and what it
            learns from, for ``distillation``; a module or an engine, which runs as such.

    Raises:
        ConfigError: the section does not fit the model, or a teacher is missing.
    """
    section = section_of(config)
    for key in ("layer_reduction", "distillation"):
        if getattr(section, key).enabled and teacher_model is None:
            raise ConfigError(f"{PATH}.{key} is enabled, so teacher_model is required")
    if session_of(model) is not None:
        raise ConfigError("the model is compressed already; clean it first (redundancy_clean)")
    if section.layer_reduction.enabled and teacher_model is not None:
        copy_layers(model, module_of(teacher_model), section.layer_reduction)
    session = Session(model, modifiers_of(section))
    if section.distillation.enabled and teacher_model is not None:
        session.distillation = Distillation(model, teacher_model, section.distillation.terms)
    return model


def redundancy_clean(model: nn.Module, config: Config | None = None) -> nn.Module:
    """Leave an ordinary model: values and zeros put into weights, what is related removed.

    What has not begun yet is left out. Inputs are quantised no longer: no weight can hold that.

    Args:
        model: compressed by an engine or by :func:`init_compression`; changed in place. One that
            has taken no step is cleaned as if everything had begun, with the masks that were
            loaded, if any.
        config: for a model that is not compressed; as for :func:`init_compression`.

    Returns:
        The model; what was removed is logged.

    Raises:
        ConfigError: it is kept by an engine, or is not compressed and there is no config.
    """
    import logging

    session = session_of(model)
    if session is None:
        if config is None:
            raise ConfigError("the model is not compressed: give the config that it is cleaned by")
        session = Session(model, modifiers_of(section_of(config)))
    if session.at < 0:
        session.activate_all()
    for line in session.finish(model):
        logging.getLogger("drivetrain.compression").info("%s", line)
    return model


def student_initialization(student: nn.Module, teacher: nn.Module, config: Config) -> nn.Module:
    """Copy the layers that ``layer_reduction`` names from a teacher; returns the student.

    Raises:
        ConfigError: it is not enabled, or the two do not fit.
    """
    section = section_of(config).layer_reduction
    if not section.enabled:
        raise ConfigError(f"{PATH}.layer_reduction is not enabled")
    copy_layers(student, teacher, section)
    return student


def section_of(config: Config) -> CompressionSection:
    """The section of a config, or its defaults.

    Raises:
        ConfigError: no such file, keys twice, or a wrong value.
    """
    return section_at(config, PATH, CompressionSection)


def section_at(config: Config, path: str, kind: type[SectionT]) -> SectionT:
    """The section ``path`` of a config, or its defaults.

    Raises:
        ConfigError: no such file, keys twice, or a wrong value.
    """
    data = config if isinstance(config, Mapping) else _load(Path(config))
    try:
        return kind.model_validate(data.get(path, {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([path, *map(str, first["loc"])])
        raise ConfigError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None


def _load(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ConfigError(f"{path}: the key {twice[0]!r} is there twice")
        return dict(pairs)

    try:
        found = json.loads(path.read_text("utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the config {path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"the config {path} is no object")
    return found

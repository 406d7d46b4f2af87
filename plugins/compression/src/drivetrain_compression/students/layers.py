"""A student with fewer layers begins with some of its teacher's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from drivetrain import whole
from drivetrain.errors import ConfigError
from drivetrain_compression.section import PATH, LayerReductionSection

_AT = f"{PATH}.layer_reduction"


def copy_layers(student: nn.Module, teacher: nn.Module, section: LayerReductionSection) -> None:
    """Copy parameters of the teacher's chosen layers, and of other modules, to the student.

    Where ranks keep parameters in parts it is collective.

    Args:
        student: changed in place; it has as many layers as ``section.teacher_layer`` names.
        teacher: has the same modules with more layers.
        section: which.

    Raises:
        ConfigError: a module is missing, layers are too few or too many, or parameters have other
            names or shapes; nothing is copied then.
    """
    prefix = section.module_name_prefix
    assert prefix is not None, "the section is enabled"
    own, given = _layers(student, prefix, "student"), _layers(teacher, prefix, "teacher")
    if len(own) != len(section.teacher_layer):
        raise ConfigError(
            f"{_AT}: the student has {len(own)} layers in {prefix}, but teacher_layer names "
            f"{len(section.teacher_layer)}: build the student with keep_number_layer layers"
        )
    if (most := max(section.teacher_layer)) >= len(given):
        raise ConfigError(
            f"{_AT}.teacher_layer: {most}, but the teacher has layers 0 to {len(given) - 1}"
        )
    pairs = [
        (f"{prefix}.{number}", own[number], given[taken])
        for number, taken in enumerate(section.teacher_layer)
    ]
    pairs += [
        (name, _module(student, name, "student"), _module(teacher, name, "teacher"))
        for name in section.other_module_name
    ]
    copies = [copy for pair in pairs for copy in _parameters(*pair)]
    with (
        whole([t for _, t in copies]),
        whole([s for s, _ in copies], write_rank=0),
        torch.no_grad(),
    ):
        for target, source in copies:
            target.copy_(source)


def _layers(model: nn.Module, prefix: str, who: str) -> list[nn.Module]:
    found = list(_module(model, prefix, who).children())
    if not found:
        raise ConfigError(f"{_AT}.module_name_prefix: {prefix} of the {who} has no layers")
    return found


def _module(model: nn.Module, name: str, who: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ConfigError(
            f"{_AT}: the {who} ({type(model).__name__}) has no module {name!r}"
        ) from None


def _parameters(name: str, student: nn.Module, teacher: nn.Module) -> list[tuple[Any, Any]]:
    own, given = dict(student.named_parameters()), dict(teacher.named_parameters())
    if own.keys() != given.keys():
        odd = sorted(own.keys() ^ given.keys())[0]
        raise ConfigError(f"{_AT}: {name}: only one of student and teacher has the parameter {odd}")
    for key, parameter in own.items():
        if parameter.shape != given[key].shape:
            raise ConfigError(
                f"{_AT}: {name}.{key} is {list(parameter.shape)} in the student and "
                f"{list(given[key].shape)} in the teacher; layers are copied, not cut"
            )
    return [(parameter, given[key]) for key, parameter in own.items()]

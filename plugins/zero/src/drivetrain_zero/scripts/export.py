"""Writing a model's weights as one file, without the whole model on any rank."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from drivetrain.checkpoint.format.storage import open_storage
from drivetrain.checkpoint.format.tensor_file import TensorEntry, write_tensors
from drivetrain.contracts import Purpose, Tag
from drivetrain.errors import ConfigError
from drivetrain.states.whole import whole
from drivetrain_zero.gathering.unit import find_units
from drivetrain_zero.section import ZeroSection

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine

_KEY = "zero_optimization.stage3_gather_16bit_weights_on_model_save"


def save_16bit_model(
    engine: Engine,
    save_dir: str | os.PathLike[str],
    save_filename: str = "model.safetensors",
    exclude_frozen_parameters: bool = False,
) -> bool:
    """Write the weights that the module computes with, and its buffers, to a safetensors file.

    Collective. Keys are those of ``state_dict()`` without ``torch.compile``; tied parameters are
    written under each of their names, so that a strict load works. Parameters are gathered one unit
    at a time, and the first rank writes. The file appears once it is complete.

    Args:
        engine: at any stage.
        save_dir: made if need be.
        save_filename: of the file in it.
        exclude_frozen_parameters: leave out parameters that are not trained.

    Returns:
        True.

    Raises:
        ConfigError: at stage 3, ``stage3_gather_16bit_weights_on_model_save`` is not set; or ranks
            have parameters that the first one has not.
        OSError: the file cannot be written.
    """
    section = engine.job.plan.section(ZeroSection)
    if section.stage == 3 and not section.stage3_gather_16bit_weights_on_model_save:
        raise ConfigError(f"{_KEY}: must be true for save_16bit_model at stage 3, which gathers")
    for parameter in engine.module.parameters():
        _refuse_distinct(engine, parameter)
    with ExitStack() as held:
        entries = list(_entries(engine, held, exclude_frozen_parameters))
        if engine.job.rank == 0:
            _write(os.fspath(save_dir), save_filename, entries)
        else:
            for entry in entries:
                entry.read()  # which takes part in the gather
    engine.job.communicator.barrier("world", Tag(Purpose.CONTROL, site="16-bit model"))
    return True


def _refuse_distinct(engine: Engine, parameter: nn.Parameter) -> None:
    info, mesh = engine.job.parameters.info(parameter), engine.job.mesh
    axes = [axis for axis in info.distinct if mesh.size(axis) > 1]
    if axes:
        raise ConfigError(
            f"save_16bit_model writes what the first rank has, but along {axes[0]} ranks have "
            f"others than {info.name}: use engine.save_checkpoint(), and export the checkpoint "
            "with `drivetrain checkpoint export`"
        )


def _write(folder: str, name: str, entries: list[TensorEntry]) -> None:
    """Write beside the file and rename, so that a reader never sees a part of it."""
    storage = open_storage(folder)
    partial_name = f"{name}.partial"
    with storage.writing(partial_name) as sink:
        write_tensors(sink, entries, {"format": "pt"})
    os.replace(storage.where(partial_name), storage.where(name))  # noqa: PTH105 - as storage does


def _entries(engine: Engine, held: ExitStack, exclude_frozen: bool) -> Iterator[TensorEntry]:
    """What is written, unit after unit; reading one of another unit gathers that."""
    module, parameters = engine.module, engine.job.parameters
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(_own(name))
    for unit in find_units(module):
        gather = _Once(held, unit.parameters)
        for parameter in unit.parameters:
            if exclude_frozen and not parameter.requires_grad:
                continue
            dtype, shape = parameter.dtype, parameters.info(parameter).whole_shape
            for name in names[parameter]:
                yield TensorEntry(name, dtype, shape, partial(gather.read, parameter))
    for name, buffer in _persistent_buffers(module):
        yield TensorEntry(_own(name), buffer.dtype, tuple(buffer.shape), buffer.detach)


def _own(name: str) -> str:
    """A name without what ``torch.compile`` puts before those of a module that it wraps."""
    return name.replace("_orig_mod.", "")


class _Once:
    """Gathers the parameters of one unit when the first of them is read, and lets others go.

    Args:
        held: what is gathered now.
        parameters: of the unit.
    """

    def __init__(self, held: ExitStack, parameters: Sequence[nn.Parameter]) -> None:
        self._held = held
        self._parameters = parameters
        self._is_open = False

    def read(self, parameter: nn.Parameter) -> torch.Tensor:
        """The whole values of one of the unit's parameters. Collective for the first."""
        if not self._is_open:
            self._held.close()
            self._held.enter_context(whole(self._parameters))
            self._is_open = True
        return parameter.detach().clone()  # whose memory the file may keep hold of


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for path, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer

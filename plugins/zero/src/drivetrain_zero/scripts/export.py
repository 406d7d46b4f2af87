"""Writing a model's weights as one file, without the whole model on any rank."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Self

import torch
from torch import nn

from drivetrain.checkpoint.agreement import texts_along
from drivetrain.checkpoint.format.storage import open_storage
from drivetrain.checkpoint.format.tensor_file import TensorEntry, write_tensors
from drivetrain.contracts import Purpose, Tag
from drivetrain.errors import ConfigError
from drivetrain.states.whole import axes_apart, broadcast_along, whole
from drivetrain_zero.gathering.unit import GatheredUnit, find_units
from drivetrain_zero.section import ZeroSection

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job

_SITE = "16-bit model"
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
    at a time, and the first rank writes, also what it gets from ranks that have other stages or
    experts. The file appears once it is complete.

    Args:
        engine: at any stage.
        save_dir: made if need be.
        save_filename: of the file in it.
        exclude_frozen_parameters: leave out parameters that are not trained.

    Returns:
        True.

    Raises:
        ConfigError: at stage 3, ``stage3_gather_16bit_weights_on_model_save`` is not set.
        OSError: the file cannot be written.
    """
    section = engine.job.plan.section(ZeroSection)
    if section.stage == 3 and not section.stage3_gather_16bit_weights_on_model_save:
        raise ConfigError(f"{_KEY}: must be true for save_16bit_model at stage 3, which gathers")
    with _Held(find_units(engine.module)) as held:
        units = list(_units(engine, held, exclude_frozen_parameters))
        for axis in axes_apart(engine.job, engine.module):
            units = _along(engine, axis, units, held)
        entries = [entry for unit in units for entry in unit]
        if engine.job.rank == 0:
            _write(os.fspath(save_dir), save_filename, entries)
        else:
            for entry in entries:
                entry.read()  # which takes part in the gather
    engine.job.communicator.barrier("world", Tag(Purpose.CONTROL, site=_SITE))
    return True


def _write(folder: str, name: str, entries: list[TensorEntry]) -> None:
    """Write beside the file and rename, so that a reader never sees a part of it."""
    storage = open_storage(folder)
    partial_name = f"{name}.partial"
    with storage.writing(partial_name) as sink:
        write_tensors(sink, entries, {"format": "pt"})
    os.replace(storage.where(partial_name), storage.where(name))  # noqa: PTH105 - as storage does


def _units(engine: Engine, held: _Held, exclude_frozen: bool) -> Iterator[list[TensorEntry]]:
    """What this rank has to write, unit by unit, and buffers; reading one of a unit gathers it."""
    module, parameters = engine.module, engine.job.parameters
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(_own(name))
    for position, unit in enumerate(held.units):
        yield [
            TensorEntry(
                *(name, parameter.dtype, parameters.info(parameter).whole_shape),
                partial(held.read, position, parameter),
            )
            for parameter in unit.parameters
            if parameter.requires_grad or not exclude_frozen
            for name in names[parameter]
        ]
    yield [
        TensorEntry(_own(name), buffer.dtype, tuple(buffer.shape), buffer.detach)
        for name, buffer in _persistent_buffers(module)
    ]


def _along(
    engine: Engine, axis: str, units: list[list[TensorEntry]], held: _Held
) -> list[list[TensorEntry]]:
    """What all ranks along ``axis`` have to write, in the same order on each of them.

    What all of them have each reads itself. All else comes from the first rank that has it, when it
    is read, which each of them has to do; they gather their units of that place before.
    """
    about = [[(e.key, str(e.dtype).split(".")[1], e.shape) for e in unit] for unit in units]
    every = [json.loads(text) for text in texts_along(engine.job, axis, json.dumps(about), _SITE)]
    ranks = Counter(name for theirs in every for unit in theirs for name, *_ in unit)
    own = {entry.key: entry for unit in units for entry in unit}
    found: dict[str, TensorEntry] = {}
    merged: list[list[TensorEntry]] = []
    for position, together in enumerate(zip_longest(*every, fillvalue=())):
        merged.append([])
        gather = partial(held.gather, position)
        for rank, unit in enumerate(together):
            for name, dtype, shape in unit:
                if name in found:
                    continue
                entry = own.get(name)
                if entry is None or ranks[name] < len(every):
                    facts = name, getattr(torch, dtype), tuple(shape)
                    read = partial(_sent, engine.job, axis, rank, facts, gather, entry)
                    entry = TensorEntry(*facts, read)
                found[name] = entry
                merged[-1].append(entry)
    return merged


def _sent(
    job: Job,
    axis: str,
    source: int,
    facts: tuple[str, torch.dtype, tuple[int, ...]],
    gather: Callable[[], None],
    own: TensorEntry | None,
) -> torch.Tensor:
    """What the rank ``source`` along ``axis`` reads, on all of them.

    To read gathers a unit, in which ranks take part that read nothing: so all of them do it first.
    """
    gather()
    name, dtype, shape = facts
    if own is not None and job.mesh.coordinate(axis) == source:
        value = own.read()
    else:
        value = torch.empty(shape, dtype=dtype, device="meta")
    return broadcast_along(job, axis, source, value, Tag(Purpose.STATE, name, _SITE))


def _own(name: str) -> str:
    """A name without what ``torch.compile`` puts before those of a module that it wraps."""
    return name.replace("_orig_mod.", "")


class _Held:
    """Gathers the parameters of one unit at a time.

    Args:
        units: of the module.
    """

    def __init__(self, units: Sequence[GatheredUnit]) -> None:
        self.units = units
        self._gathered = ExitStack()
        self._position = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._gathered.close()

    def gather(self, position: int) -> None:
        """Have one unit whole, if there are so many. Collective if it is another one."""
        if position != self._position and position < len(self.units):
            self._gathered.close()
            self._gathered.enter_context(whole(self.units[position].parameters))
            self._position = position

    def read(self, position: int, parameter: nn.Parameter) -> torch.Tensor:
        """The whole values of one of a unit's parameters. Collective, as :meth:`gather` is."""
        self.gather(position)
        return parameter.detach().clone()  # whose memory the file may keep hold of


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for path, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer

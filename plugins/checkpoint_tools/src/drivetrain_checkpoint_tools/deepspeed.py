"""DeepSpeed's checkpoints: ZeRO stages 0 to 3, and universal ones."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import torch

from drivetrain.checkpoint.format.index import MALFORMED, is_plain_name
from drivetrain.checkpoint.format.storage import LocalStorage
from drivetrain.contracts import is_plain
from drivetrain.errors import CheckpointError
from drivetrain_checkpoint_tools.conversion import Imported, Source, write_checkpoint
from drivetrain_checkpoint_tools.model_parallel import read_parallel
from drivetrain_checkpoint_tools.saved_states import Trained, aliases, step_source, whole_tensors
from drivetrain_checkpoint_tools.torch_archive import read_pickled

_POINTER_LIMIT = 4096
_SPARE = 1 << 20
"""Bytes that may be written beyond what was read."""

_OWN_KEYS = {
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes"),
    *("frozen_param_fragments", "shared_params", "lr_scheduler", "data_sampler", "random_ltd"),
    *("sparse_tensor_module_names", "skipped_steps", "global_steps", "global_samples"),
    *("dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config"),
    *("ds_version", "num_experts", "universal_checkpoint_info"),
}
"""What DeepSpeed itself writes beside the user's ``client_state``."""


def import_deepspeed(source: str, folder: str, tag: str | None = None) -> str:
    """Make a checkpoint of one of DeepSpeed's, one tensor at a time.

    Args:
        source: a run's folder (``latest`` or ``latest_universal`` names the checkpoint), or the
            folder of one checkpoint.
        folder: of the new checkpoints; a path or a URL.
        tag: of the new one; ``global_step<N>`` by default.

    Returns:
        The new checkpoint's path.

    Raises:
        CheckpointError: files are missing, damaged, do not fit together or hold what is not loaded
            for safety.
    """
    with _explained(source):
        return write_checkpoint(read_deepspeed(_checkpoint_folder(source)), folder, tag)


def read_saved(source: str) -> Imported:
    """What a run's latest checkpoint, or one checkpoint, holds; tensors are read when used.

    Raises:
        CheckpointError: see :func:`import_deepspeed`.
    """
    with _explained(source):
        return read_deepspeed(_checkpoint_folder(source))


@contextmanager
def _explained(source: str) -> Iterator[None]:
    try:
        yield
    except MALFORMED as error:
        reason = repr(error)[:200]
        raise CheckpointError(
            f"{source} is laid out in a way that is not known: {reason}"
        ) from error


def looks_like_deepspeed(source: str) -> bool:
    """True if a folder is a checkpoint of DeepSpeed, or that of a run.

    Raises:
        CheckpointError: it names a checkpoint that is elsewhere.
    """
    return bool(_model_files(_checkpoint_folder(source)))


def read_deepspeed(folder: LocalStorage) -> Imported:
    """What one checkpoint holds; tensors are read when they are used.

    Raises:
        CheckpointError: see :func:`import_deepspeed`.
        LookupError, TypeError, ValueError, AttributeError, RuntimeError: it is laid out in another
            way than what is known.
    """
    files = _model_files(folder)
    if not files:
        raise CheckpointError(f"{folder.root} has no model states of DeepSpeed (*_model_states.pt)")
    read = {name: read_pickled(folder, name) for name in files}
    model = read[files[0]].content
    universal = bool(folder.names("zero"))
    if universal:
        trained = _universal(folder, model)
        whole = whole_tensors(model, [found.content for found in read.values()])
    else:
        whole, trained = read_parallel(folder, {name: f.content for name, f in read.items()})
    known = {source.name for source in trained.sources}
    kept = [s for s in whole if s.kind == "buffer" or not universal or s.name not in known]
    sources = [*kept, *trained.sources]
    held = sum(found.nbytes for found in read.values()) + trained.nbytes
    _check_amount(sources, held, folder.root)
    longest = _SPARE + 4 * read[files[0]].pickle_bytes
    client = {key: value for key, value in model.items() if key not in _OWN_KEYS}
    lost = [key for key, value in client.items() if not is_plain({key: value}, longest)]
    trained.weaker += [f"client_state {str(key)[:100]!r} is not plain data" for key in lost]
    scheduler = model.get("lr_scheduler")
    return Imported(
        sources=sources,
        steps=_count(model, "global_steps"),
        samples=_count(model, "global_samples"),
        skipped=_count(model, "skipped_steps"),
        scheduler=scheduler if is_plain(scheduler, longest) else None,
        groups=trained.groups,
        loss_scale=trained.loss_scale,
        client_state={key: value for key, value in client.items() if key not in lost},
        weaker=trained.weaker,
        aliases={k: v for found in read.values() for k, v in aliases(found.content).items()},
    )


def _count(model: Mapping[str, Any], key: str) -> int:
    value = model.get(key, 0)
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise CheckpointError(f"{key} is {reprlib.repr(value)}, expected a count")
    return value


def _check_amount(sources: Sequence[Source], held: int, place: str) -> None:
    """Make sure that no more is written than was read: tensors may be expanded, or all the same."""
    claimed = sum(prod(s.shape) * s.dtype.itemsize for s in sources if s.kind != "step")
    if claimed > held + _SPARE:
        raise CheckpointError(
            f"the tensors in {place} would take {claimed:,} bytes, and its files have {held:,}"
        )


def _checkpoint_folder(source: str) -> LocalStorage:
    """The folder of the checkpoint that a run's folder names, or ``source`` itself."""
    run = LocalStorage(source)
    for pointer in ("latest_universal", "latest"):
        if run.size(pointer) is not None:
            tag = run.get(pointer, _POINTER_LIMIT).decode(errors="replace").strip()
            run.close()
            if not is_plain_name(tag):
                raise CheckpointError(
                    f"{run.where(pointer)} names {tag[:100]!r}, which is no folder's name"
                )
            return LocalStorage(run.where(tag), boundary=source)
    return run


def _model_files(folder: LocalStorage) -> list[str]:
    """Model states, by rank: one file below stage 3, else one per data-parallel rank."""
    files = [name for name in folder.names() if name.endswith("_model_states.pt")]
    return sorted(files, key=lambda name: [int(n[:18]) for n in re.findall(r"\d+", name)])


# -- universal checkpoints ------------------------------------------------------------------------


def _universal(folder: LocalStorage, model: Mapping[str, Any]) -> Trained:
    untrained = {*(model.get("buffer_names") or ()), *aliases(model)}
    shapes = {
        name: tuple(shape)
        for group in model.get("param_shapes") or ()
        for name, shape in group.items()
    }
    found = Trained(weaker=["hyper-parameters of groups stay the config's"])
    for name in folder.names("zero"):
        if name not in untrained:
            for file in folder.names(f"zero/{name}"):
                if file.endswith(".pt"):
                    found.nbytes += _add_universal(found, folder, name, file, shapes.get(name))
    counted = {source.name for source in found.sources if source.kind == "step"}
    if uncounted := [name for name in shapes if name not in counted]:
        updates = _count(model, "global_steps") - _count(model, "skipped_steps")
        found.sources += [step_source(name, updates) for name in uncounted]
    return found


def _add_universal(
    found: Trained, folder: LocalStorage, name: str, file: str, shape: tuple[int, ...] | None
) -> int:
    """Add a master or state of a parameter; those that come from stage 3 are flat."""
    path = f"zero/{name}/{file}"
    tensor, nbytes = _only_tensor(folder, path)
    stem = file.removesuffix(".pt")
    if stem == "step":
        found.sources.append(step_source(name, tensor))
        return nbytes
    extents = shape if shape and prod(shape) == tensor.numel() else tuple(tensor.shape)
    kind = "master" if stem == "fp32" else stem
    read = partial(_reshaped, folder, path, extents)
    found.sources.append(Source(kind, name, tensor.dtype, extents, read))
    return nbytes


def _reshaped(folder: LocalStorage, path: str, shape: tuple[int, ...]) -> torch.Tensor:
    return _only_tensor(folder, path, check=False)[0].reshape(shape)


def _only_tensor(
    folder: LocalStorage, path: str, *, check: bool = True
) -> tuple[torch.Tensor, int]:
    """The tensor in a file, and the bytes of the file."""
    read = read_pickled(folder, path, tensor=True, check=check)
    value = read.content.get("param")
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(f"file {folder.where(path)} holds no tensor")
    return value, read.nbytes

"""DeepSpeed's checkpoints: ZeRO stages 0 to 3, and universal ones."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch

from drivetrain.checkpoint.format.index import MALFORMED, is_plain_name
from drivetrain.checkpoint.format.storage import LocalStorage
from drivetrain.contracts import is_plain
from drivetrain.errors import CheckpointError
from drivetrain_checkpoint_tools.conversion import Imported, Source, write_checkpoint
from drivetrain_checkpoint_tools.torch_archive import read_pickled
from drivetrain_checkpoint_tools.zero_partitions import Partitioned, part_sources

_POINTER_LIMIT = 4096
_SPARE = 1 << 20
"""Bytes that may be written beyond what was read."""

_OPTIMIZER_FILE = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")

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
        CheckpointError: files are missing, damaged or hold what is not loaded for safety, or the
            checkpoint is cut by tensor or pipeline parallelism.
    """
    try:
        return write_checkpoint(read_deepspeed(_checkpoint_folder(source)), folder, tag)
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
    read = [read_pickled(folder, name) for name in files]
    ranks = [found.content for found in read]
    model = ranks[0]
    universal = bool(folder.names("zero"))
    if not universal and any("mp_rank_00" not in name for name in files):
        raise CheckpointError(
            f"{folder.root} is cut by tensor or pipeline parallelism; make it universal with "
            "DeepSpeed's ds_to_universal.py first, then import that"
        )
    trained = (_universal if universal else _partitioned)(folder, model)
    whole = _whole_tensors(model, ranks)
    known = {source.name for source in trained.sources}
    kept = [s for s in whole if s.kind == "buffer" or not universal or s.name not in known]
    sources = [*kept, *trained.sources]
    _check_amount(sources, sum(found.nbytes for found in read) + trained.nbytes, folder.root)
    longest = _SPARE + 4 * read[0].pickle_bytes
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


def _aliases(model: Mapping[str, Any]) -> set[str]:
    """Names of parameters that are the same as one before."""
    shared = model.get("shared_params") or {}
    found, seen = set(shared), set()
    for name, tensor in model["module"].items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape)
        if tensor.numel() and place in seen:
            found.add(name)
        seen.add(place)
    return found


def _whole_tensors(model: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]) -> list[Source]:
    """Buffers, and parameters as the module has them; at stage 3 only those that are frozen."""
    buffers, aliases = set(model.get("buffer_names") or ()), _aliases(model)
    found = [
        Source("buffer" if name in buffers else "parameter", name, t.dtype, tuple(t.shape), t.clone)
        for name, t in model["module"].items()
        if name not in aliases and (t.numel() or name in buffers)
    ]
    present = {source.name for source in found}
    for name, shape in (model.get("frozen_param_shapes") or {}).items():
        if name not in present:
            parts = [rank["frozen_param_fragments"][name] for rank in ranks]
            read = partial(_join, parts, tuple(shape))
            found.append(Source("parameter", name, parts[0].dtype, tuple(shape), read))
    return found


def _join(parts: Sequence[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of parts that the ranks hold in order, with padding behind the last."""
    flat = torch.cat([part.reshape(-1) for part in parts])
    if flat.numel() < prod(shape):
        raise CheckpointError(f"parts of {flat.numel():,} elements do not make up {list(shape)}")
    return flat[: prod(shape)].view(shape)


# -- masters and optimizer states ------------------------------------------------------------------


@dataclass
class _Trained:
    """Masters and optimizer states.

    Args:
        sources: all of them.
        groups: hyper-parameters with the names of their parameters.
        weaker: what could not be taken over.
        loss_scale: of fp16.
        nbytes: of the files that were read.
    """

    sources: list[Source] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    weaker: list[str] = field(default_factory=list)
    loss_scale: float = 1.0
    nbytes: int = 0


def _partitioned(folder: LocalStorage, model: Mapping[str, Any]) -> _Trained:
    numbered = {
        int(match[2]): name
        for name in folder.names()
        if (match := _OPTIMIZER_FILE.fullmatch(name)) and int(match[3]) == 0
    }
    if not numbered:
        return _unpartitioned(model)
    count = model.get("dp_world_size", len(numbered))
    if len(numbered) != count or sorted(numbered) != list(range(len(numbered))):
        raise CheckpointError(
            f"{folder.root} has optimizer states of ranks {sorted(numbered)} only, but "
            f"{reprlib.repr(count)} ranks saved it"
        )
    states, nbytes = [], 0
    for rank in sorted(numbered):
        read = read_pickled(folder, numbered[rank])
        if not isinstance(read.content.get("optimizer_state_dict"), dict):
            raise CheckpointError(f"{folder.where(numbered[rank])} has no optimizer_state_dict")
        states.append(read.content["optimizer_state_dict"])
        nbytes += read.nbytes
    try:
        found = Partitioned.of(states, model["param_shapes"], folder.root)
        scale = float(getattr(states[0].get("loss_scaler"), "cur_scale", 1.0))
        sources = list(part_sources(found))
        return _Trained(sources, found.groups, loss_scale=scale, nbytes=nbytes)
    except MALFORMED as error:
        raise CheckpointError(
            f"optimizer states in {folder.root} are laid out in a way that is not known: "
            f"{repr(error)[:200]} (DeepSpeed {reprlib.repr(model.get('ds_version'))})"
        ) from error


def _unpartitioned(model: Mapping[str, Any]) -> _Trained:
    """Stage 0: torch's optimizer, which numbers parameters and does not name them."""
    state = model.get("optimizer")
    if not isinstance(state, dict) or "param_groups" not in state:
        return _Trained(weaker=["optimizer states were not found, so they start afresh"])
    buffers, aliases = set(model.get("buffer_names") or ()), _aliases(model)
    named = [
        (name, tuple(tensor.shape))
        for name, tensor in model["module"].items()
        if name not in buffers | aliases
    ]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if len(state["param_groups"]) > 1 or len(numbers) != len(named):
        reason = "stage 0 does not name the parameters of its optimizer's groups"
        return _Trained(weaker=[f"optimizer states start afresh: {reason}"])
    sources = [
        Source(kind, name, value.dtype, tuple(value.shape), value.clone)
        for number, (name, shape) in zip(numbers, named, strict=True)
        for kind, value in state["state"].get(number, {}).items()
        if isinstance(value, torch.Tensor) and tuple(value.shape) == shape
    ]
    sources += [
        step_source(name, state["state"][number]["step"])
        for number, (name, _) in zip(numbers, named, strict=True)
        if "step" in state["state"].get(number, {})
    ]
    hyper = {k: v for k, v in state["param_groups"][0].items() if k != "params"}
    return _Trained(sources, [{"parameters": [name for name, _ in named], "hyper": hyper}])


def step_source(name: str, value: Any) -> Source:
    """The number of updates that a parameter has seen."""
    steps = torch.tensor(int(value))
    return Source("step", name, torch.int64, (), lambda: steps)


def _universal(folder: LocalStorage, model: Mapping[str, Any]) -> _Trained:
    buffers, aliases = set(model.get("buffer_names") or ()), _aliases(model)
    shapes = {
        name: tuple(shape)
        for group in model.get("param_shapes") or ()
        for name, shape in group.items()
    }
    found = _Trained(weaker=["hyper-parameters of groups stay the config's"])
    for name in folder.names("zero"):
        if name not in buffers | aliases:
            for file in folder.names(f"zero/{name}"):
                if file.endswith(".pt"):
                    found.nbytes += _add_universal(found, folder, name, file, shapes.get(name))
    counted = {source.name for source in found.sources if source.kind == "step"}
    if uncounted := [name for name in shapes if name not in counted]:
        updates = _count(model, "global_steps") - _count(model, "skipped_steps")
        found.sources += [step_source(name, updates) for name in uncounted]
    return found


def _add_universal(
    found: _Trained, folder: LocalStorage, name: str, file: str, shape: tuple[int, ...] | None
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

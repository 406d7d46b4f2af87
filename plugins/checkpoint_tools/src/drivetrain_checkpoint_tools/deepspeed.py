"""DeepSpeed's checkpoints: ZeRO stages 0 to 3, and universal ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from drivetrain.checkpoint.index import is_plain_name
from drivetrain.checkpoint.state import is_plain
from drivetrain.errors import CheckpointError
from drivetrain_checkpoint_tools.conversion import Imported, Source, write_checkpoint
from drivetrain_checkpoint_tools.pickled_file import read_pickled
from drivetrain_checkpoint_tools.zero_partitions import Partitioned, part_sources

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
    return write_checkpoint(read_deepspeed(_checkpoint_folder(Path(source))), folder, tag)


def looks_like_deepspeed(source: Path) -> bool:
    """Whether a folder is a checkpoint of DeepSpeed, or that of a run."""
    try:
        folder = _checkpoint_folder(source)
    except CheckpointError:
        return False
    return bool(_model_files(folder))


def read_deepspeed(folder: Path) -> Imported:
    """What one checkpoint holds; tensors are read when they are used.

    Raises:
        CheckpointError: see :func:`import_deepspeed`.
    """
    files = _model_files(folder)
    if not files:
        raise CheckpointError(f"{folder} has no model states of DeepSpeed (*_model_states.pt)")
    ranks = [read_pickled(file) for file in files]
    model = ranks[0]
    universal = (folder / "zero").is_dir()
    if not universal and any("mp_rank_00" not in file.name for file in files):
        raise CheckpointError(
            f"{folder} is cut by tensor or pipeline parallelism; make it universal with "
            "DeepSpeed's ds_to_universal.py first, then import that"
        )
    trained = (_universal if universal else _partitioned)(folder, model)
    whole = _whole_tensors(model, ranks)
    known = {source.name for source in trained.sources}
    kept = [s for s in whole if s.kind == "buffer" or not universal or s.name not in known]
    client = {key: value for key, value in model.items() if key not in _OWN_KEYS}
    lost = sorted(key for key, value in client.items() if not is_plain(value))
    trained.weaker += [f"client_state {key!r} is not plain data" for key in lost]
    scheduler = model.get("lr_scheduler")
    return Imported(
        sources=[*kept, *trained.sources],
        steps=int(model.get("global_steps", 0)),
        samples=int(model.get("global_samples", 0)),
        skipped=int(model.get("skipped_steps", 0)),
        scheduler=scheduler if is_plain(scheduler) else None,
        groups=trained.groups,
        loss_scale=trained.loss_scale,
        client_state={key: value for key, value in client.items() if key not in lost},
        weaker=trained.weaker,
    )


def _checkpoint_folder(source: Path) -> Path:
    for pointer in ("latest_universal", "latest"):
        file = source / pointer
        if file.is_file():
            tag = file.read_text("utf-8", errors="replace").strip()
            if not is_plain_name(tag):
                raise CheckpointError(f"{file} names {tag[:100]!r}, which is no folder's name")
            return source / tag
    return source


def _model_files(folder: Path) -> list[Path]:
    """Model states, by rank: one file below stage 3, else one per data-parallel rank."""
    files = folder.glob("*_model_states.pt")
    return sorted(files, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])


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
    """

    sources: list[Source] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    weaker: list[str] = field(default_factory=list)
    loss_scale: float = 1.0


def _partitioned(folder: Path, model: Mapping[str, Any]) -> _Trained:
    numbered = {
        int(match[2]): path
        for path in folder.iterdir()
        if (match := _OPTIMIZER_FILE.fullmatch(path.name)) and int(match[3]) == 0
    }
    if not numbered:
        return _unpartitioned(model)
    if sorted(numbered) != list(range(int(model.get("dp_world_size", len(numbered))))):
        raise CheckpointError(
            f"{folder} has optimizer states of ranks {sorted(numbered)} only, but "
            f"{model.get('dp_world_size')} ranks saved it"
        )
    states = []
    for rank in sorted(numbered):
        content = read_pickled(numbered[rank])
        if not isinstance(content.get("optimizer_state_dict"), dict):
            raise CheckpointError(f"{numbered[rank]} has no optimizer_state_dict")
        states.append(content["optimizer_state_dict"])
    try:
        found = Partitioned.of(states, model["param_shapes"], str(folder))
        scale = float(getattr(states[0].get("loss_scaler"), "cur_scale", 1.0))
        return _Trained(list(part_sources(found)), found.groups, loss_scale=scale)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"optimizer states in {folder} are laid out in a way that is not known: {error!r} "
            f"(DeepSpeed {model.get('ds_version')})"
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


def _universal(folder: Path, model: Mapping[str, Any]) -> _Trained:
    buffers, aliases = set(model.get("buffer_names") or ()), _aliases(model)
    shapes = {
        name: tuple(shape)
        for group in model.get("param_shapes") or ()
        for name, shape in group.items()
    }
    found = _Trained(weaker=["hyper-parameters of groups stay the config's"])
    for parameter in sorted(path for path in (folder / "zero").iterdir() if path.is_dir()):
        name = parameter.name
        if name not in buffers | aliases:
            found.sources += _universal_parameter(parameter, name, shapes.get(name))
    counted = {source.name for source in found.sources if source.kind == "step"}
    if uncounted := [name for name in shapes if name not in counted]:
        updates = int(model.get("global_steps", 0)) - int(model.get("skipped_steps", 0))
        found.sources += [step_source(name, updates) for name in uncounted]
    return found


def _universal_parameter(
    folder: Path, name: str, shape: tuple[int, ...] | None
) -> Iterator[Source]:
    """Masters and states of a parameter; those that come from stage 3 are flat."""
    for path in sorted(folder.glob("*.pt")):
        tensor = _only_tensor(path)
        if path.name == "step.pt":
            yield step_source(name, tensor)
            continue
        extents = shape if shape and prod(shape) == tensor.numel() else tuple(tensor.shape)
        kind = "master" if path.stem == "fp32" else path.stem
        yield Source(kind, name, tensor.dtype, extents, partial(_reshaped, path, extents))


def _reshaped(path: Path, shape: tuple[int, ...]) -> torch.Tensor:
    return _only_tensor(path).reshape(shape)


def _only_tensor(path: Path) -> torch.Tensor:
    value = read_pickled(path, tensor=True).get("param")
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(f"file {path} holds no tensor")
    return value

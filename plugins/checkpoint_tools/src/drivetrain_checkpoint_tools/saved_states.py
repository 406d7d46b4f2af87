"""What one model-parallel rank of DeepSpeed has saved: tensors, masters and optimizer states."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch

from drivetrain.checkpoint.format.index import MALFORMED
from drivetrain.checkpoint.format.storage import LocalStorage
from drivetrain.errors import CheckpointError
from drivetrain_checkpoint_tools.conversion import Source
from drivetrain_checkpoint_tools.torch_archive import read_pickled
from drivetrain_checkpoint_tools.zero_partitions import Partitioned, part_sources

_OPTIMIZER_FILE = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


def aliases(model: Mapping[str, Any]) -> dict[str, str]:
    """Names of parameters that are the same as one before, each with the name of that."""
    found = dict(model.get("shared_params") or {})
    seen: dict[Any, str] = {}
    for name, tensor in (model["module"] or {}).items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape)
        if tensor.numel() and seen.setdefault(place, name) != name:
            found[name] = seen[place]
    return found


def whole_tensors(model: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]) -> list[Source]:
    """Buffers, and parameters as the module has them; at stage 3 only those that are frozen."""
    buffers, tied = set(model.get("buffer_names") or ()), aliases(model)
    found = [
        Source("buffer" if name in buffers else "parameter", name, t.dtype, tuple(t.shape), t.clone)
        for name, t in model["module"].items()
        if name not in tied and (t.numel() or name in buffers)
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


@dataclass
class Trained:
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


def partitioned(folder: LocalStorage, model: Mapping[str, Any], slice_: int = 0) -> Trained:
    """Masters and optimizer states of one model-parallel rank, whatever the stage of ZeRO.

    Args:
        folder: of the checkpoint.
        model: what a model file of the rank holds.
        slice_: number of the rank.

    Raises:
        CheckpointError: files are missing, or laid out in a way that is not known.
    """
    numbered = {
        int(match[2]): name
        for name in folder.names()
        if (match := _OPTIMIZER_FILE.fullmatch(name)) and int(match[3]) == slice_
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
        return Trained(sources, found.groups, loss_scale=scale, nbytes=nbytes)
    except MALFORMED as error:
        raise CheckpointError(
            f"optimizer states in {folder.root} are laid out in a way that is not known: "
            f"{repr(error)[:200]} (DeepSpeed {reprlib.repr(model.get('ds_version'))})"
        ) from error


def _unpartitioned(model: Mapping[str, Any]) -> Trained:
    """Stage 0: torch's optimizer, which numbers parameters and does not name them."""
    state = model.get("optimizer")
    if (
        not isinstance(state, dict)
        or not isinstance(model.get("module"), dict)
        or "param_groups" not in state
    ):
        return Trained(weaker=["optimizer states were not found, so they start afresh"])
    untrained = {*(model.get("buffer_names") or ()), *aliases(model)}
    named = [
        (name, tuple(tensor.shape))
        for name, tensor in model["module"].items()
        if name not in untrained
    ]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if len(state["param_groups"]) > 1 or len(numbers) != len(named):
        reason = "stage 0 does not name the parameters of its optimizer's groups"
        return Trained(weaker=[f"optimizer states start afresh: {reason}"])
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
    return Trained(sources, [{"parameters": [name for name, _ in named], "hyper": hyper}])


def step_source(name: str, value: Any) -> Source:
    """The number of updates that a parameter has seen."""
    steps = torch.tensor(int(value))
    return Source("step", name, torch.int64, (), lambda: steps)

"""Reading a checkpoint back, into any layout."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.checkpoint import files
from drivetrain.checkpoint.state import StateReader
from drivetrain.errors import CheckpointError

if TYPE_CHECKING:
    from drivetrain.engine import Engine
    from drivetrain.fragment import Box, Fragment

logger = logging.getLogger("drivetrain.checkpoint")


def load(
    engine: Engine,
    load_dir: str | os.PathLike[str],
    tag: str | None = None,
    *,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
) -> tuple[str | None, dict[str, Any] | None]:
    """Restore what ``save`` wrote, on any number of ranks. Collective.

    Args:
        engine: what to restore into.
        load_dir: directory of the run's checkpoints.
        tag: which one; the file ``latest`` decides by default.
        load_module_strict: every parameter of the module must be in the checkpoint.
        load_optimizer_states: restore masters and optimizer states; otherwise masters are made
            from the loaded parameters and states start fresh.
        load_lr_scheduler_states: restore the schedule and the groups' hyper-parameters.
        load_module_only: restore nothing but parameters and buffers.

    Returns:
        Path and client state; ``(None, None)`` with a warning when no tag is given and the
        directory has no ``latest``.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor does not fit.
    """
    root = Path(load_dir)
    if tag is None:
        pointer = root / files.LATEST
        if not pointer.exists():
            logger.warning("no checkpoint loaded: %s does not exist", pointer)
            return None, None
        tag = pointer.read_text(encoding="utf-8").strip()
    path = root / tag
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}")
    stored = _Stored(path)
    with_states = load_optimizer_states and not load_module_only
    _load_fragments(engine, stored, strict=load_module_strict, with_states=with_states)
    stored.load_buffers(engine)
    if not with_states:
        engine.states.refresh()
    if not load_module_only:
        _load_progress(engine, stored, schedule=load_lr_scheduler_states)
    if engine.job.rank == 0:
        logger.info("loaded checkpoint %s", path)
    return str(path), stored.manifest["client_state"]


class _Stored:
    """An opened checkpoint: manifest, every rank's index, tensor files on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = files.read_json(path / files.MANIFEST)
        if self.manifest.get("format") != files.FORMAT:
            raise CheckpointError(
                f"{path} has format {self.manifest.get('format')!r}, expected {files.FORMAT!r}"
            )
        self.world_size = int(self.manifest["world_size"])
        self.ranks = [
            files.read_json(path / files.rank_file(rank, "json")) for rank in range(self.world_size)
        ]
        self.boxes: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = defaultdict(list)
        self.rank_states: dict[tuple[int, str, str], dict[str, Any]] = {}
        for rank, index in enumerate(self.ranks):
            for entry in index["tensors"]:
                if entry["rank_state"]:
                    self.rank_states[rank, entry["kind"], entry["name"]] = entry
                else:
                    self.boxes[entry["kind"], entry["name"]].append((rank, entry))
        self._files: dict[int, files.TensorFile] = {}

    def tensor(self, rank: int, key: str) -> torch.Tensor:
        if rank not in self._files:
            name = files.rank_file(rank, "safetensors")
            self._files[rank] = files.TensorFile(self.path / name, self.ranks[rank]["sha256"])
        return self._files[rank].read(key)

    def load_buffers(self, engine: Engine) -> None:
        rank = engine.job.rank if self.world_size == engine.job.world_size else 0
        with torch.no_grad():
            for name, buffer in engine.module.named_buffers():
                buffer.copy_(self.tensor(rank, f"buffer/{name}"))


def _load_fragments(engine: Engine, stored: _Stored, *, strict: bool, with_states: bool) -> None:
    missing: list[str] = []
    for fragment in engine.states.fragments():
        if fragment.kind == "gradient" or (fragment.kind != "parameter" and not with_states):
            continue
        if fragment.on_reshape == "reset":
            _load_rank_state(engine, stored, fragment)
        elif not _load_boxes(stored, fragment):
            missing.append(f"{fragment.name} ({fragment.kind})")
    if missing and strict:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if missing[5:] else "")
        raise CheckpointError(f"checkpoint {stored.path} lacks {shown}")
    if missing:
        logger.warning(
            "checkpoint %s lacks %d tensors, left as they are", stored.path, len(missing)
        )


def _load_rank_state(engine: Engine, stored: _Stored, fragment: Fragment) -> None:
    entry = stored.rank_states.get((engine.job.rank, fragment.kind, fragment.name))
    same_layout = stored.world_size == engine.job.world_size
    if entry is None or not same_layout or tuple(entry["size"]) != fragment.boxes[0].size:
        logger.warning("%s of %s starts afresh: the layout changed", fragment.kind, fragment.name)
        return
    fragment.write(stored.tensor(engine.job.rank, entry["key"]).reshape(-1))


def _load_boxes(stored: _Stored, fragment: Fragment) -> bool:
    """Fill a fragment from all stored boxes that overlap it; whether anything was stored."""
    entries = stored.boxes.get((_source_kind(stored, fragment), fragment.name), [])
    if not entries:
        return False
    local = fragment.read().clone()  # what is in no box (padding) stays as it is
    found = 0
    for rank, entry in entries:
        if tuple(entry["global_shape"]) != fragment.global_shape:
            raise CheckpointError(
                f"{fragment.name} ({fragment.kind}) has shape {list(fragment.global_shape)} in the "
                f"model, but {entry['global_shape']} in checkpoint {stored.path}"
            )
        for box in fragment.boxes:
            found += _copy_overlap(stored, rank, entry, box, local)
    if found < sum(box.numel for box in fragment.boxes):
        raise CheckpointError(
            f"checkpoint {stored.path} holds only a part of {fragment.name} ({fragment.kind})"
        )
    fragment.write(local)
    return True


def _source_kind(stored: _Stored, fragment: Fragment) -> str:
    """Prefer the stored master for a parameter that is its own master now, and the reverse."""
    name = fragment.name
    if fragment.kind == "parameter" and fragment.dtype == torch.float32:
        return "master" if ("master", name) in stored.boxes else "parameter"
    if fragment.kind == "master" and ("master", name) not in stored.boxes:
        return "parameter"
    return fragment.kind


def _copy_overlap(
    stored: _Stored, rank: int, entry: dict[str, Any], box: Box, local: torch.Tensor
) -> int:
    """Copy the intersection of a stored box and a local one; how many elements it has."""
    mine, theirs = [], []
    for start, size, offset, extent in zip(
        box.global_offset, box.size, entry["offset"], entry["size"], strict=True
    ):
        low, high = max(start, offset), min(start + size, offset + extent)
        if low >= high:
            return 0
        mine.append(slice(low - start, high - start))
        theirs.append(slice(low - offset, high - offset))
    target = local.narrow(0, box.local_offset, box.numel).view(box.size)
    part = target[tuple(mine)]
    part.copy_(stored.tensor(rank, entry["key"])[tuple(theirs)])
    return part.numel()


def _load_progress(engine: Engine, stored: _Stored, *, schedule: bool) -> None:
    manifest = stored.manifest
    engine.progress.load_state_dict(manifest["progress"])
    engine.loss_scaler.load_state_dict(manifest["loss_scaler"])
    if schedule and engine.optimizer is not None:
        for group, saved in zip(engine.optimizer.param_groups, manifest["groups"], strict=False):
            group.update({key: _tupled(group.get(key), value) for key, value in saved.items()})
        if engine.lr_scheduler is not None and manifest["scheduler"] is not None:
            engine.lr_scheduler.load_state_dict(manifest["scheduler"])
    rank = engine.job.rank if stored.world_size == engine.job.world_size else 0
    index = stored.ranks[rank]
    if stored.world_size == engine.job.world_size:
        engine.job.random.load_state_dict(index["random"])
        torch.set_rng_state(stored.tensor(rank, "rng/torch"))
    else:
        logger.warning(
            "saved on %d ranks, loaded on %d: random streams start afresh",
            stored.world_size,
            engine.job.world_size,
        )
    if engine.training_dataloader is not None and index["loader"] is not None:
        engine.training_dataloader.load_state_dict(index["loader"])
    tensors = {key: stored.tensor(rank, f"state/{key}") for key in index["state_tensors"]}
    engine.job.hub.load_state(engine, StateReader(index["state"], tensors))


def _tupled(current: Any, saved: Any) -> Any:
    """JSON turns tuples (betas) into lists."""
    return tuple(saved) if isinstance(current, tuple) and isinstance(saved, list) else saved

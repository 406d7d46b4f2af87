"""Writing a checkpoint aside and giving it its name when every rank is done."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from drivetrain import __version__
from drivetrain.checkpoint import files
from drivetrain.checkpoint.state import StateWriter, plain
from drivetrain.communicator import Op, Purpose, Tag
from drivetrain.errors import CheckpointError

if TYPE_CHECKING:
    from drivetrain.engine import Engine

logger = logging.getLogger("drivetrain.checkpoint")


def save(
    engine: Engine,
    save_dir: str | os.PathLike[str],
    tag: str | None = None,
    *,
    client_state: dict[str, Any] | None = None,
    save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
) -> str:
    """Save everything that training needs to go on. Collective: every rank must call it.

    Args:
        engine: what to save.
        save_dir: directory of all checkpoints of a run; shared by all ranks.
        tag: name of this one; ``global_step<N>`` by default.
        client_state: the caller's own plain data, returned by ``load``.
        save_latest: make this the checkpoint that ``load`` takes by default.
        exclude_frozen_parameters: leave out parameters that are not trained.

    Returns:
        The path of the checkpoint.

    Raises:
        CheckpointError: on every rank, when any rank cannot write, the tags differ, or
            ``client_state`` is not plain data. Nothing that existed before is touched.
    """
    root = Path(save_dir)
    tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
    aside, final = root / f".{tag}.saving", root / tag
    problem = _refuse_tag(tag, save_dir)
    _agree_on_tag(engine, tag)
    try:
        if problem is None:
            manifest = _manifest(engine, client_state)
            if engine.job.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
    except (CheckpointError, OSError) as error:
        problem = str(error)
    _agree(engine, problem, final)
    try:
        _write_rank(engine, aside, exclude_frozen_parameters)
    except (CheckpointError, OSError) as error:
        problem = str(error)
    _agree(engine, problem, final, aside)
    try:
        if engine.job.rank == 0:
            files.write_json(aside / files.MANIFEST, manifest)
            _give_name(aside, final)
            if save_latest:
                files.replace_atomically(root / files.LATEST, tag)
    except OSError as error:
        problem = str(error)
    _agree(engine, problem, final, aside)
    if engine.job.rank == 0:
        logger.info("saved checkpoint %s", final)
    return str(final)


def _refuse_tag(tag: str, save_dir: str | os.PathLike[str]) -> str | None:
    if not os.fspath(save_dir):
        return "save_dir is empty"
    if tag in ("", ".", "..") or Path(tag).name != tag:
        return f"tag {tag!r} is not a plain directory name"
    return None


def _agree_on_tag(engine: Engine, tag: str) -> None:
    """All ranks must save under one name; a rank of its own would leave a torn checkpoint."""
    digest = int.from_bytes(hashlib.sha256(tag.encode()).digest()[:4], "big")
    bounds = torch.tensor([digest, -digest], dtype=torch.int64, device=engine.device)
    tag_of = Tag(Purpose.CONTROL, site="checkpoint tag")
    engine.job.communicator.all_reduce(bounds, "world", tag_of, op=Op.MAX)
    if int(bounds[0]) != -int(bounds[1]):
        raise CheckpointError(f"the ranks save under different tags; this rank's is {tag!r}")


def _agree(engine: Engine, problem: str | None, final: Path, aside: Path | None = None) -> None:
    """Raise on every rank when any rank has a problem."""
    rank = engine.job.rank if problem is not None else -1
    worst = torch.tensor([rank], dtype=torch.int64, device=engine.device)
    tag = Tag(Purpose.CONTROL, site="checkpoint agreement")
    engine.job.communicator.all_reduce(worst, "world", tag, op=Op.MAX)
    if int(worst) < 0:
        return
    if engine.job.rank == 0 and aside is not None:
        shutil.rmtree(aside, ignore_errors=True)
    reason = problem if problem is not None else f"rank {int(worst)} failed; see its message"
    raise CheckpointError(f"checkpoint {final} was not saved: {reason}")


def _manifest(engine: Engine, client_state: dict[str, Any] | None) -> dict[str, Any]:
    scheduler = engine.lr_scheduler
    groups = engine.optimizer.param_groups if engine.optimizer is not None else []
    return {
        "format": files.FORMAT,
        "version": __version__,
        "world_size": engine.job.world_size,
        "progress": engine.progress.state_dict(),
        "loss_scaler": engine.loss_scaler.state_dict(),
        "scheduler": plain(scheduler.state_dict(), "scheduler state") if scheduler else None,
        "groups": [
            {key: value for key, value in group.items() if key != "params" and _is_plain(value)}
            for group in groups
        ],
        "client_state": plain(client_state or {}, "client_state"),
    }


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, tuple))


def _write_rank(engine: Engine, aside: Path, exclude_frozen: bool) -> None:
    tensors: dict[str, torch.Tensor] = {}
    index: list[dict[str, Any]] = []
    numbers: Counter[str] = Counter()  # a home may answer with several fragments of one state
    frozen = {
        engine.job.parameters.info(p).name
        for p in engine.module.parameters()
        if exclude_frozen and not p.requires_grad
    }
    for fragment in engine.states.fragments():
        if not fragment.owner or fragment.kind == "gradient" or fragment.name in frozen:
            continue
        flat = fragment.read()
        state = f"{fragment.kind}/{fragment.name}"
        for box in fragment.boxes:
            key = f"{state}/{numbers[state]}"
            numbers[state] += 1
            tensors[key] = box.of_storage(flat).detach().cpu().clone()
            index.append(
                {
                    "key": key,
                    "kind": fragment.kind,
                    "name": fragment.name,
                    "global_shape": fragment.global_shape,
                    "offset": box.global_offset,
                    "size": box.size,
                    "rank_state": fragment.on_reshape == "reset",
                }
            )
    writer = StateWriter()
    engine.job.hub.save_state(engine, writer)
    tensors.update({f"state/{key}": t.detach().cpu().clone() for key, t in writer.tensors.items()})
    tensors["rng/torch"] = torch.get_rng_state()
    for name, buffer in engine.module.named_buffers():  # batch statistics differ between ranks
        tensors[f"buffer/{name}"] = buffer.detach().cpu().clone()
    rank = engine.job.rank
    digest = files.write_tensors(aside / files.rank_file(rank, "safetensors"), tensors)
    loader = engine.training_dataloader
    files.write_json(
        aside / files.rank_file(rank, "json"),
        {
            "sha256": digest,
            "tensors": index,
            "state": writer.data,
            "state_tensors": list(writer.tensors),
            "random": engine.job.random.state_dict(),
            "loader": loader.state_dict() if loader is not None else None,
        },
    )


def _give_name(aside: Path, final: Path) -> None:
    """Rename; an older checkpoint of that name stays until the new one has it."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    files.sync_directory(aside)
    if final.exists():
        final.rename(old)
    aside.rename(final)
    files.sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)

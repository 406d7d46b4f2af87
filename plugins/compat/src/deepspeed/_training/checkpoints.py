"""Saving and loading with DeepSpeed's arguments, and loading what DeepSpeed itself has saved."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deepspeed._surface import lookup
from drivetrain import checkpoint
from drivetrain.checkpoint.agreement import texts_along
from drivetrain.contracts import Purpose, Tag, is_plain
from drivetrain.errors import CheckpointError, PluginError
from drivetrain.states.whole import axes_apart, of_all_ranks, whole_state_dict

if TYPE_CHECKING:
    from deepspeed._training.engine import DeepSpeedEngine

logger = logging.getLogger("deepspeed")

Folder = str | os.PathLike[str]

_CONVERTED = ".from_deepspeed"
"""Folder beside a checkpoint of DeepSpeed in which it lies in our format while it is loaded."""

_TORCH_FILE = "file of torch, in base64"
"""The one key of a client's state that is not plain data."""


def save(
    engine: DeepSpeedEngine,
    save_dir: Folder,
    tag: str | int | None,
    client_state: dict[str, Any] | None,
    save_latest: bool,
    exclude_frozen_parameters: bool,
) -> bool:
    """See ``engine.save_checkpoint``.

    Raises:
        CheckpointError: ``save_dir`` is empty, or nothing can be written there.
    """
    if not save_dir or not os.fspath(save_dir):
        raise CheckpointError(
            f"save_checkpoint: save_dir is {save_dir!r}, expected the folder for checkpoints"
        )
    checkpoint.save(
        engine,
        save_dir,
        None if tag is None else str(tag),
        _portable(client_state),
        save_latest=save_latest,
        exclude_frozen_parameters=exclude_frozen_parameters,
    )
    return True


def load(
    engine: DeepSpeedEngine, load_dir: Folder, tag: str | int | None, **options: bool
) -> tuple[str | None, dict[str, Any] | None]:
    """See ``engine.load_checkpoint``."""
    named = None if tag is None else str(tag)
    with _in_our_format(engine, os.fspath(load_dir), named) as (folder, inner):
        path, client_state = checkpoint.load(engine, folder, inner, **options)
    if folder != os.fspath(load_dir):
        path = os.path.join(load_dir, inner or "")  # noqa: PTH118 - as the caller spells it
    return path, _as_saved(client_state)


def _portable(client_state: dict[str, Any] | None) -> dict[str, Any] | None:
    """A client's state for a checkpoint, which has room for plain data only.

    Anything else that torch reads without running code, such as tensors and keys that are numbers,
    goes in as a file of torch. What not even that takes is left for the checkpoint to refuse.
    """
    if client_state is None or is_plain(client_state):
        return client_state
    file = io.BytesIO()
    try:
        torch.save(client_state, file)
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    except (pickle.PickleError, AttributeError, RuntimeError, TypeError, ValueError):
        return client_state
    return {_TORCH_FILE: base64.b64encode(file.getvalue()).decode()}


def _as_saved(client_state: dict[str, Any] | None) -> dict[str, Any] | None:
    """A client's state as it was before :func:`_portable`."""
    if client_state is None or client_state.keys() != {_TORCH_FILE}:
        return client_state
    content = base64.b64decode(client_state[_TORCH_FILE])
    loaded: dict[str, Any] = torch.load(io.BytesIO(content), "cpu", weights_only=True)
    return loaded


@contextmanager
def _in_our_format(
    engine: DeepSpeedEngine, load_dir: str, tag: str | None
) -> Iterator[tuple[str, str | None]]:
    """Folder and tag of a checkpoint; one of DeepSpeed is converted for the time being. Collective.

    The first rank converts, into the folder itself, since every rank can see that.
    """
    source = None if "://" in load_dir else _of_deepspeed(load_dir, tag)
    if source is None:
        yield load_dir, tag
        return
    target = Path(load_dir, _CONVERTED)
    problem = ""
    if engine.job.rank == 0:
        logger.info("%s is a checkpoint of DeepSpeed: converting it", source)
        try:
            lookup.load("checkpoint.import_deepspeed")(str(source), str(target), source.name)
        except (CheckpointError, PluginError, LookupError, OSError) as error:
            problem = str(error)
    try:
        _same_on_all(engine, problem)
        yield str(target), source.name
    finally:
        _meet(engine)
        if engine.job.rank == 0:
            shutil.rmtree(target, ignore_errors=True)


def _of_deepspeed(load_dir: str, tag: str | None) -> Path | None:
    """The folder of a checkpoint that DeepSpeed has written, if this is one."""
    run = Path(load_dir)
    for pointer in ("latest", "latest_universal"):
        if tag is None and (run / pointer).is_file():
            named = (run / pointer).read_text("utf-8", "replace").strip()
            if named and Path(named).name == named and any((run / named).glob("*model_states.pt")):
                return run / named
    if tag is not None and any((run / tag).glob("*model_states.pt")):
        return run / tag
    return None


def _same_on_all(engine: DeepSpeedEngine, problem: str) -> None:
    """Raise the first rank's problem on every rank."""
    if engine.job.world_size > 1:
        told: list[str] = [problem]
        torch.distributed.broadcast_object_list(told, src=0)
        problem = told[0]
    if problem:
        raise CheckpointError(problem)


def _meet(engine: DeepSpeedEngine) -> None:
    engine.job.communicator.barrier("world", Tag(Purpose.CONTROL, site="checkpoint"))


def consolidated(engine: DeepSpeedEngine, exclude_frozen: bool) -> dict[str, Any] | None:
    """Whole weights on the host of the first rank; ``None`` elsewhere. Collective."""
    first = engine.job.rank == 0
    state = of_all_ranks(engine.job, engine.module, whole_state_dict(engine.module), keep=first)
    if exclude_frozen:
        state = without_frozen(engine, state)
    if not first:
        return None
    return {
        name: value.detach().to("cpu") if isinstance(value, torch.Tensor) else value
        for name, value in state.items()
    }


def without_frozen(
    engine: DeepSpeedEngine, state: dict[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """A state dict of all ranks without the parameters that none of them trains. Collective.

    Args:
        engine: whose.
        state: names after ``prefix`` are the model's.
        prefix: of the names.
    """
    frozen = {n for n, p in engine.module.named_parameters() if not p.requires_grad}
    for axis in axes_apart(engine.job, engine.module):
        every = texts_along(engine.job, axis, json.dumps(sorted(frozen)), "frozen parameters")
        frozen = {name for text in every for name in json.loads(text)}
    left_out = {prefix + name for name in frozen}
    return {name: value for name, value in state.items() if name not in left_out}


def save_weights(engine: DeepSpeedEngine, folder: Folder, name: str, exclude_frozen: bool) -> bool:
    """See ``engine.save_16bit_model``."""
    if (
        engine.zero_optimization_partition_weights()
        and not engine.zero_gather_16bit_weights_on_model_save()
    ):
        logger.warning(
            "nothing is saved: at stage 3 save_16bit_model needs "
            "zero_optimization.stage3_gather_16bit_weights_on_model_save: true"
        )
        return False
    if name.endswith(".safetensors") and (
        entry := engine.job.plan.registry.find("methods", "save_16bit_model")
    ):
        written: bool = entry.load()(engine, folder, name, exclude_frozen)
        return written
    state = consolidated(engine, exclude_frozen)
    if state is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save(state, Path(folder, name))
    _meet(engine)
    return True

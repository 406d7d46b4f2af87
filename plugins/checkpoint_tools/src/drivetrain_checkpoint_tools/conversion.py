"""Writing tensors that come from elsewhere as a checkpoint, one tensor at a time."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch

from drivetrain import __version__
from drivetrain.checkpoint.format.commit import PendingSave, SavedBox
from drivetrain.checkpoint.format.index import FORMAT, is_plain_name, shown
from drivetrain.checkpoint.format.storage import open_storage
from drivetrain.checkpoint.format.tensor_file import NAMES, TensorEntry
from drivetrain.checkpoint.guarantee import promise
from drivetrain.checkpoint.save import take_back
from drivetrain.contracts import is_plain
from drivetrain.errors import CheckpointError


@dataclass(frozen=True)
class Source:
    """A whole tensor that is to be imported.

    Args:
        kind: ``parameter``, ``master``, ``buffer``, or an optimizer state's name.
        name: the parameter's name.
        dtype: of its elements.
        shape: its extents.
        read: returns it, when its turn has come.
    """

    kind: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


@dataclass
class Imported:
    """What an import has found.

    Args:
        sources: all tensors.
        steps: updates that the run has made.
        samples: samples that it has seen.
        skipped: boundaries without an update.
        scheduler: state of its schedule, or ``None``.
        groups: hyper-parameters: ``{"parameters": names, "hyper": values}``.
        loss_scale: of fp16.
        client_state: the user's own data.
        weaker: what could not be taken over, with reasons.
        aliases: other names of tied parameters, each with that of its source.
    """

    sources: Sequence[Source]
    steps: int = 0
    samples: int = 0
    skipped: int = 0
    scheduler: Mapping[str, Any] | None = None
    groups: Sequence[Mapping[str, Any]] = ()
    loss_scale: float = 1.0
    client_state: Mapping[str, Any] = field(default_factory=dict)
    weaker: Sequence[str] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)


def write_checkpoint(imported: Imported, folder: str, tag: str | None = None) -> str:
    """Write a checkpoint that loads into any layout, and make it the latest.

    Args:
        imported: what it holds.
        folder: of the run's checkpoints; a path or a URL.
        tag: its name; ``global_step<N>`` by default.

    Returns:
        The checkpoint's path.

    Raises:
        CheckpointError: a dtype that no file can hold, or a tag that is no name.
    """
    tag = f"global_step{imported.steps}" if tag is None else tag
    if not is_plain_name(tag):
        raise CheckpointError(f"tag {tag!r} is not a plain directory name")
    own: dict[str, Any] = {"random": None, "loader": None, "plugins": {}, "fragments": ""}
    state = torch.frombuffer(bytearray(json.dumps(own).encode()), dtype=torch.uint8)
    entry = TensorEntry("rank/state", state.dtype, tuple(state.shape), lambda: state)
    boxes = [*map(_box, imported.sources), SavedBox(entry, "state")]
    pending = PendingSave(
        storage=open_storage(folder),
        tag=tag,
        id=secrets.token_hex(4),
        rank=0,
        world_size=1,
        boxes=sorted(boxes, key=lambda box: -box.entry.dtype.itemsize),
        empty={f"{s.kind}/{s.name}": (s.dtype, s.shape) for s in imported.sources if 0 in s.shape},
        manifest=_manifest(imported),
    )
    try:
        pending.write()
        pending.commit()
    except BaseException:
        take_back(pending)
        raise
    finally:
        pending.storage.close()
    return pending.place


def _box(source: Source) -> SavedBox:
    if source.dtype not in NAMES:
        raise CheckpointError(
            f"{shown(source.name)} has dtype {source.dtype}, which no file can hold"
        )
    origin = (0,) * len(source.shape)
    key = f"{source.kind}/{source.name}"
    file_key = f"{key}@{','.join(map(str, origin))}"
    read = partial(_read, source)
    return SavedBox(
        TensorEntry(file_key, source.dtype, source.shape, read), key, source.shape, origin
    )


def _read(source: Source) -> torch.Tensor:
    tensor = source.read()
    if tensor.dtype != source.dtype or tuple(tensor.shape) != source.shape:
        raise CheckpointError(
            f"{shown(source.name)} ({shown(source.kind)}) is put together of parts that differ: a "
            f"{tensor.dtype} of shape {list(tensor.shape)}, expected {source.dtype} of shape "
            f"{list(source.shape)}"
        )
    return tensor


def _manifest(imported: Imported) -> dict[str, Any]:
    weaker = [*imported.weaker, "random streams and the data start anew after an import"]
    groups = [
        {**group, "hyper": {k: v for k, v in group["hyper"].items() if is_plain(v)}}
        for group in imported.groups
    ]
    progress = {
        "steps": imported.steps,
        "micro_steps": imported.steps,
        "samples": imported.samples,
        "tokens": 0,
        "skipped_steps": imported.skipped,
    }
    return {
        "format": FORMAT,
        "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"drivetrain": __version__, "torch": torch.__version__},
        "world_size": 1,
        "axes": {"pp": 1, "dp": 1, "sp": 1, "tp": 1},
        "step": imported.steps,
        "state": {
            "progress": progress,
            "unfinished_micro_batches": 0,
            "loss_scaler": {"scale": imported.loss_scale},
            "scheduler": imported.scheduler,
            "groups": groups,
            "plugins": {},
            "plugin_tensors": [],
        },
        "client_state": dict(imported.client_state),
        "excluded": [],
        "aliases": dict(imported.aliases),
        "guarantee": {"weaker": weaker, "weaker_reshaped": [], "promise": promise(weaker, ())},
    }

"""Collecting all that a run needs to go on, and writing it whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.checkpoint.agreement import any_rank, same_everywhere, text_of, texts_along, worst
from drivetrain.checkpoint.choice import continue_history, history_of
from drivetrain.checkpoint.format import index
from drivetrain.checkpoint.format.commit import PendingSave, SavedBox, UnfinishedSaveError
from drivetrain.checkpoint.format.packed import packed
from drivetrain.checkpoint.format.retention import Retention
from drivetrain.checkpoint.format.storage import Storage, open_storage
from drivetrain.checkpoint.format.tensor_file import (
    NAMES,
    TensorEntry,
    as_buffer,
    checksums,
    raw_bytes,
)
from drivetrain.checkpoint.guarantee import fragments_digest, layout_of, promise
from drivetrain.checkpoint.random_state import random_state
from drivetrain.checkpoint.state import (
    buffer_fragment,
    client_fragments,
    persistent_buffers,
    plugin_fragments,
    plugin_state,
)
from drivetrain.contracts.state.extra import StateWriter, is_plain, plain
from drivetrain.contracts.world.communicator import is_first_copy
from drivetrain.errors import CheckpointError, DrivetrainError
from drivetrain.sections.checkpoints import CheckpointSection
from drivetrain.tensor_parts import tensor_parts
from drivetrain.version import __version__

if TYPE_CHECKING:
    from drivetrain.checkpoint.subject import Subject
    from drivetrain.contracts.state.fragment import Box, Fragment
    from drivetrain.contracts.state.parameters import ParameterInfo
    from drivetrain.contracts.world.axis import Axis

logger = logging.getLogger("drivetrain.checkpoint")


@torch.inference_mode(False)
def save(
    engine: Subject,
    save_dir: str | os.PathLike[str],
    tag: str | None = None,
    client_state: dict[str, Any] | None = None,
    *,
    save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
) -> str:
    """Save everything that training needs to go on. Collective: every rank must call it.

    Args:
        engine: what to save.
        save_dir: folder of all checkpoints of a run, seen by all ranks; or a URL.
        tag: name of this one; ``global_step<N>`` by default.
        client_state: the caller's own plain data, returned by ``load``.
        save_latest: make this the checkpoint that ``load`` takes by default.
        exclude_frozen_parameters: leave out parameters that are not trained.

    Returns:
        The path of the checkpoint.

    Raises:
        CheckpointError: on every rank, when any rank cannot write, a plugin's state would be lost,
            or ``client_state`` is not plain data. Nothing that existed before is touched.
    """
    with engine.job.span("checkpoint"):
        tag, save_id = _agree_on_names(engine, tag)
        storage, problem = open_storage(save_dir), None
        try:
            if not os.fspath(save_dir):
                raise CheckpointError("save_dir is empty")
            if not index.is_plain_name(tag):
                raise CheckpointError(f"tag {tag!r} is not a plain directory name, or is taken")
            if storage.is_link(tag):
                raise CheckpointError("it is a link, and what it points to would be overwritten")
            contents = _Contents(engine, exclude_frozen_parameters)
            contents.collect(client_state)
        except DrivetrainError as error:
            problem = str(error)
        raise_together(engine, problem, storage.where(tag))
        contents.compare_buffers()
        contents.unite()
        contents.manifest |= {"latest": save_latest, "history": history_of(engine)}
        pending = contents.pending(storage, tag, save_id, save_latest=save_latest)
        continue_history(engine, history_of(engine), save_id)
        target: Any = engine  # hooks are written for engines that train
        engine.job.hub.carry_out_save(target, pending)
    return pending.place


def write_and_commit(engine: Subject, pending: PendingSave) -> None:
    """Carry out a save now. Collective.

    Raises:
        CheckpointError: on every rank, when it failed on any. What was written is removed, unless
            the message says that the checkpoint is there.
    """
    try:
        _attempt(engine, pending, pending.write)
        _attempt(engine, pending, pending.commit if engine.job.rank == 0 else None)
    finally:
        pending.storage.close()
    if engine.job.rank == 0:
        announce(pending)


def announce(pending: PendingSave) -> None:
    """Log that a save is complete, and what it promises."""
    logger.info("saved checkpoint %s; %s", pending.place, pending.manifest["guarantee"]["promise"])


def take_back(pending: PendingSave) -> None:
    """Remove what a failed save has written, as far as the storage that failed lets us. Rank 0."""
    try:
        pending.discard()
    except (CheckpointError, OSError) as error:
        logger.error("files of a failed save stay in %s: %s", pending.place, error)


def raise_together(engine: Subject, problem: str | None, place: str) -> None:
    """Raise on every rank when any rank has a problem. Collective."""
    found = worst(engine.job, problem)
    if found is not None:
        raise CheckpointError(f"checkpoint {place} was not saved: {found}")


def _attempt(engine: Subject, pending: PendingSave, action: Callable[[], None] | None) -> None:
    cause: Exception | None = None
    try:
        if action is not None:
            action()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is raised on every rank
        cause = error
    found = worst(engine.job, None if cause is None else str(cause) or type(cause).__name__)
    if found is None:
        return
    (unfinished,) = any_rank(engine.job, [isinstance(cause, UnfinishedSaveError)])
    if unfinished:
        raise UnfinishedSaveError(found) from cause
    if engine.job.rank == 0:
        take_back(pending)
    raise CheckpointError(f"checkpoint {pending.place} was not saved: {found}") from cause


def _agree_on_names(engine: Subject, tag: str | None) -> tuple[str, str]:
    """Tag and id of a save: rank 0's, once it is clear whether the ranks differ."""
    own = f"global_step{engine.global_steps}" if tag is None else str(tag)
    policy = engine.job.plan.section(CheckpointSection).tag_validation
    if policy != "Ignore" and not same_everywhere(engine.job, own)[0]:
        problem = f"the ranks save under different tags; this rank's is {own!r}"
        if policy == "Fail":
            raise CheckpointError(f"{problem}; give all ranks the same one")
        logger.warning("%s; rank 0's is used", problem)
    save_id, _, agreed = text_of(engine.job, 0, f"{secrets.token_hex(4)} {own}").partition(" ")
    return agreed, save_id


@dataclass
class _Contents:
    """What one rank has to save."""

    engine: Subject
    exclude_frozen: bool
    boxes: list[SavedBox] = field(default_factory=list)
    empty: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    excluded: list[str] = field(default_factory=list)
    weaker: list[str] = field(default_factory=list)
    weaker_reshaped: list[str] = field(default_factory=list)

    def collect(self, client_state: dict[str, Any] | None) -> None:
        """Everything but buffers; no communication."""
        engine = self.engine
        engine.states.flush()
        kept = [f for f in engine.states.fragments() if f.kind != "gradient"]
        fragments = client_fragments(kept, engine.job.parameters, engine.module)
        self._fragments([*fragments, *plugin_fragments(engine.job.hub, engine)])
        writer = plugin_state(engine.job.hub, engine)
        self._plugin_tensors(writer)
        self.own = {
            "random": random_state(engine.job),
            "loader": self._loader(),
            "learned": [*engine.states.learned()],
            "plugins": writer.data[True],
            "fragments": fragments_digest(fragments),
        }
        self.manifest = {
            "format": index.FORMAT,
            "saved_at": datetime.now(UTC).isoformat(timespec="microseconds"),
            "versions": versions(engine),
            **layout_of(engine),
            "step": engine.global_steps,
            "state": self._state(writer),
            "client_state": plain(client_state or {}, "client_state"),
            "excluded": self.excluded,
            "aliases": {alias: info.name for info in self._infos() for alias in info.aliases},
        }

    def compare_buffers(self) -> None:
        """Buffers once; also each rank's own where they differ. Collective."""
        job, different = self.engine.job, 0
        copies: dict[tuple[Axis, Axis], dict[str, tuple[torch.Tensor, ParameterInfo]]] = {}
        axes: tuple[Axis, Axis]
        for name, found in persistent_buffers(job.parameters, self.engine.module).items():
            axes = found[1].reduction, job.parameters.replicated(found[1])
            copies.setdefault(axes, {})[name] = found
        for axes, buffers in copies.items():
            digests = [checksums(as_buffer(raw_bytes(buffer))) for buffer, _ in buffers.values()]
            equal = same_everywhere(job, *digests, axes=axes)
            for (name, (buffer, info)), same in zip(buffers.items(), equal, strict=True):
                if is_first_copy(job.communicator, *axes):
                    self._buffer(name, buffer, info)
                if not same:
                    self._box(f"buffer/{name}", buffer)
            different += equal.count(False)
        if different:
            self.weaker_reshaped.append(
                f"{different} buffers differ between ranks (such as batch statistics), of which "
                "rank 0's are taken"
            )

    def unite(self) -> None:
        """Add what ranks know that have other parameters, such as other stages. Collective."""
        job, state = self.engine.job, self.manifest["state"]
        mine = {axis for info in self._infos() for axis in info.distinct}
        axes = sorted(job.mesh.layout.axes)
        known = [state["groups"], state["steps"], self.excluded, self.manifest["aliases"]]
        for axis, differs in zip(axes, any_rank(job, [a in mine for a in axes]), strict=True):
            if differs:
                texts = texts_along(job, axis, json.dumps(known))
                groups, steps, excluded, aliases = zip(*map(json.loads, texts), strict=True)
                names = sorted({n for names in excluded for n in names})
                known = [_united(groups), dict(ChainMap(*steps)), names, dict(ChainMap(*aliases))]
        state["groups"], steps, self.manifest["excluded"], self.manifest["aliases"] = known
        state["steps"] = steps if len(set(steps.values())) > 1 else {}

    def pending(
        self, storage: Storage, tag: str, save_id: str, *, save_latest: bool
    ) -> PendingSave:
        """The save, ready to be carried out."""
        section = self.engine.job.plan.section(CheckpointSection)
        data = torch.frombuffer(bytearray(json.dumps(self.own).encode()), dtype=torch.uint8)
        self._box("state", data)
        self.manifest["guarantee"] = {
            "weaker": self.weaker,
            "weaker_reshaped": self.weaker_reshaped,
            "promise": promise(self.weaker, self.weaker_reshaped),
        }
        return PendingSave(
            storage=storage,
            tag=tag,
            id=save_id,
            rank=self.engine.job.rank,
            world_size=self.engine.job.world_size,
            # larger elements first, so that all are aligned in the file
            boxes=sorted(self.boxes, key=lambda box: -box.entry.dtype.itemsize),
            empty=self.empty,
            manifest=self.manifest,
            save_latest=save_latest,
            retention=Retention(section.keep_last, section.keep_every),
        )

    def _fragments(self, fragments: list[Fragment]) -> None:
        engine, read = self.engine, _LastFragment()
        frozen = {
            name
            for parameter in engine.module.parameters()
            if self.exclude_frozen and not parameter.requires_grad
            for own in engine.job.parameters.info(parameter).client_names
            for name in tensor_parts(parameter, own)
        }
        self.excluded = sorted(frozen)
        reset: dict[str, None] = {}
        for fragment in fragments:
            name, key = fragment.name, f"{fragment.kind}/{fragment.name}"
            if name in frozen or not fragment.owner:
                continue
            if fragment.dtype not in NAMES:
                raise CheckpointError(f"{key} has dtype {fragment.dtype}, which no file can hold")
            if 0 in fragment.global_shape:
                self.empty[key] = (fragment.dtype, fragment.global_shape)
            if fragment.on_reshape == "reset":
                reset[f"{fragment.kind} belongs to a rank and starts afresh"] = None
            for box in fragment.boxes:
                self._fragment_box(fragment, key, box, read)
        self.weaker_reshaped += reset

    def _fragment_box(self, fragment: Fragment, key: str, box: Box, read: _LastFragment) -> None:
        own = fragment.on_reshape == "reset"
        place = ",".join(map(str, box.global_offset))
        entry = TensorEntry(
            f"rank/{key}" if own else f"{key}@{place}",
            fragment.dtype,
            box.size,
            lambda: box.of_storage(read(fragment)),
        )
        whole = None if own else fragment.global_shape
        self.boxes.append(SavedBox(entry, key, whole, () if own else box.global_offset))

    def _box(self, key: str, tensor: torch.Tensor, *, whole: bool = False) -> None:
        shape = tuple(tensor.shape)
        file_key = f"{key}@{','.join('0' * len(shape))}" if whole else f"rank/{key}"
        entry = TensorEntry(file_key, tensor.dtype, shape, lambda: tensor)
        self.boxes.append(SavedBox(entry, key, shape if whole else None, (0,) * len(shape)))

    def _buffer(self, name: str, buffer: torch.Tensor, info: ParameterInfo) -> None:
        """The one copy of a buffer, or of this rank's part of it."""
        if info.placement is None:
            self._box(f"buffer/{name}", buffer, whole=True)
            return
        part = buffer_fragment(name, buffer, info.placement)
        for box in part.boxes:
            self._fragment_box(part, f"buffer/{name}", box, _LastFragment())

    def _plugin_tensors(self, writer: StateWriter) -> None:
        for key, tensor in writer.tensors[True].items():
            self._box(f"plugin/{key}", tensor)
        for key, tensor in writer.tensors[False].items() if self.engine.job.rank == 0 else ():
            self._box(f"plugin/{key}", tensor)
        for key in (*writer.data[True], *writer.tensors[True]):
            self.weaker_reshaped.append(f"{key} belongs to a rank and starts afresh")

    def _loader(self) -> Any:
        loader = self.engine.training_dataloader
        if loader is None:
            return None
        if not hasattr(loader, "state_dict"):
            kind = type(loader).__name__
            self.weaker.append(f"the data start anew, since {kind} has no state_dict")
            return None
        return packed(loader.state_dict(), "state of the data loader")

    def _state(self, writer: StateWriter) -> dict[str, Any]:
        engine, scheduler = self.engine, self.engine.lr_scheduler
        unfinished, known = engine.progress.in_window, engine.states.steps()
        names = ((info.name, name) for info in self._infos() for name in info.client_names)
        steps = {name: known[own] for own, name in names if own in known}
        if unfinished:
            self.weaker.append(
                f"the gradients of {unfinished} micro-batches of an unfinished step are not saved"
            )
        self.weaker_reshaped.append("random streams start afresh")
        return {
            "progress": engine.progress.state_dict(),
            "unfinished_micro_batches": unfinished,
            "loss_scaler": engine.loss_scaler.state_dict(),
            "scheduler": packed(scheduler.state_dict(), "scheduler state") if scheduler else None,
            "groups": list(self._groups()),
            "steps": steps,
            "plugins": writer.data[False],
            "plugin_tensors": sorted(writer.tensors[False]),
        }

    def _infos(self) -> Iterator[ParameterInfo]:
        return map(self.engine.job.parameters.info, self.engine.module.parameters())

    def _groups(self) -> Iterator[Mapping[str, Any]]:
        """Hyper-parameters, with the names of the parameters that they belong to."""
        engine = self.engine
        for number, group in enumerate(engine.optimizer.param_groups if engine.optimizer else ()):
            infos = map(engine.job.parameters.info, group["params"])
            names = [name for info in infos for name in info.client_names]
            values = {key: value for key, value in group.items() if key != "params"}
            for key in [key for key, value in values.items() if not is_plain(value)]:
                kind = type(values.pop(key)).__name__
                self.weaker.append(f"{key} of group {number} is a {kind}, which is not saved")
            yield {"parameters": names, "hyper": values}


def _united(ranks: Iterable[Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    """Groups of ranks with other parameters; those of one place with equal values are one."""
    found: dict[str, dict[str, Any]] = {}
    for number, group in (pair for groups in ranks for pair in enumerate(groups)):
        key = f"{number} {json.dumps(group['hyper'])}"
        names = found.setdefault(key, {"parameters": [], "hyper": group["hyper"]})["parameters"]
        names += [name for name in group["parameters"] if name not in names]
    return list(found.values())


class _LastFragment:
    """Reads a fragment once, though its boxes are written one by one."""

    def __init__(self) -> None:
        self._fragment: Fragment | None = None
        self._flat = torch.empty(0)

    def __call__(self, fragment: Fragment) -> torch.Tensor:
        if self._fragment is not fragment:
            self._fragment, self._flat = fragment, fragment.read()
        return self._flat


def versions(engine: Subject) -> dict[str, str]:
    """What may change the bits that a step computes."""
    return {"drivetrain": __version__, "torch": torch.__version__, "device": engine.device.type}

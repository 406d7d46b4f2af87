"""Reading a checkpoint back, into any layout, or the last good one when it is damaged."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.checkpoint.agreement import any_rank, worst
from drivetrain.checkpoint.choice import candidates, continue_history, tags_by_age
from drivetrain.checkpoint.format import index
from drivetrain.checkpoint.format.index import Stored, StoredTensor
from drivetrain.checkpoint.format.packed import unpacked
from drivetrain.checkpoint.format.reading import check_coverage, read_whole, restore
from drivetrain.checkpoint.format.storage import Storage, open_storage
from drivetrain.checkpoint.format.tensor_file import checksums, raw_bytes
from drivetrain.checkpoint.guarantee import Guarantee, changed_versions, fragments_digest, layout_of
from drivetrain.checkpoint.random_state import load_random_state
from drivetrain.checkpoint.save import versions
from drivetrain.checkpoint.state import (
    PLUGIN,
    buffer_fragment,
    client_fragments,
    persistent_buffers,
    plugin_fragments,
)
from drivetrain.contracts.state.extra import StateReader, tupled
from drivetrain.errors import CheckpointError
from drivetrain.job.ownership import is_lent, lent_modules
from drivetrain.tensor_parts import copy_into

if TYPE_CHECKING:
    from drivetrain.checkpoint.subject import Subject
    from drivetrain.contracts.state.fragment import Fragment

logger = logging.getLogger("drivetrain.checkpoint")


@dataclass(frozen=True)
class LoadOptions:
    """What is restored; see :func:`load`."""

    strict: bool = True
    optimizer: bool = True
    schedule: bool = True
    module_only: bool = False

    @property
    def states(self) -> bool:
        """Whether masters and optimizer states are restored."""
        return self.optimizer and not self.module_only


@torch.inference_mode(False)  # tensors made in it could not be written by other threads
def load(
    engine: Subject,
    load_dir: str | os.PathLike[str],
    tag: str | None = None,
    *,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
) -> tuple[str | None, dict[str, Any] | None]:
    """Restore what ``save`` wrote, in any layout. Collective.

    Args:
        engine: what to restore into.
        load_dir: folder of the run's checkpoints, or a URL.
        tag: which one. By default the one that the file ``latest`` names, or when that is damaged
            the newest one that it continued from; see :mod:`drivetrain.checkpoint.choice`.
        load_module_strict: module and checkpoint must have the same parameters and buffers.
        load_optimizer_states: restore masters and optimizer states; otherwise masters are made
            from the loaded parameters, and states and counts of updates start fresh.
        load_lr_scheduler_states: restore the schedule and the groups' hyper-parameters; otherwise
            both stay as the engine has them. Without a schedule in the engine, it has no effect.
        load_module_only: restore parameters and buffers. Optimizer states start fresh, as they
            belong to other values; schedule, hyper-parameters, loss scale, counters, the loader's
            position, random streams and the state of plugins stay as the engine has them.

    Whatever is restored, gradients and losses since the last step are dropped, and a window begins.

    Returns:
        Path and client state; ``(None, None)`` with a warning when no tag is given and the
        folder has no checkpoint that was saved as the latest.

    Raises:
        CheckpointError: on every rank: a file is missing or damaged, or a tensor does not fit.
            When that turned up while tensors were read, the engine's states are no whole.
    """
    options = LoadOptions(
        load_module_strict, load_optimizer_states, load_lr_scheduler_states, load_module_only
    )
    with closing(open_storage(load_dir)) as storage, engine.job.span("checkpoint"):
        tags = candidates(engine, storage) if tag is None else iter([str(tag)])
        problems, hint = dict[str, str](), ""
        touched: set[tuple[str, str]] = set()
        for candidate in tags:
            attempt = _Attempt(engine, storage, candidate, options)
            problem = attempt.run(touched)
            if problem is None:
                return attempt.finish(list(problems.values()))
            problems[candidate] = problem.text
            if tag is not None:
                break
            if not problem.damage:
                hint = "; it is not known to be damaged, so no other one is taken"
                break
            if engine.job.rank == 0:
                logger.error("%s; falling back to the last good checkpoint", problem.text)
        if problems:
            torn = "; the engine's states are no whole now, build it anew" if touched else ""
            others = _other_tags(storage, problems)
            raise CheckpointError(f"{'; '.join(problems.values())}{hint}{others}{torn}")
    logger.warning("no checkpoint loaded: %s does not exist", storage.where(index.LATEST))
    return None, None


def _other_tags(storage: Storage, tried: Collection[str]) -> str:
    try:
        others = [other for other in tags_by_age(storage) if other not in tried]
    except OSError as error:  # the problem itself is the one to be raised
        logger.warning("%s", error)
        return ""
    return f"; other checkpoints there: {', '.join(others[:5])}" if others else ""


@dataclass(frozen=True)
class _Problem:
    """Why a checkpoint is not loaded.

    Args:
        text: for the message.
        damage: its files are not as they were saved. Otherwise they cannot be read for now, or do
            not fit the engine, or are of another version.
    """

    text: str
    damage: bool


class _Attempt:
    """Loading one checkpoint: plan, then tensors, then everything else."""

    def __init__(self, engine: Subject, storage: Storage, tag: str, options: LoadOptions) -> None:
        self.engine = engine
        self.storage = storage
        self.tag = tag
        self.options = options
        self.guarantee = Guarantee(same_layout=False)

    def run(self, touched: set[tuple[str, str]]) -> _Problem | None:
        """Restore tensors; what is wrong, on every rank, if anything is. Collective.

        Args:
            touched: (kind, name) of what earlier attempts have overwritten; grows.
        """
        problem = self._together(self._open, *index.MALFORMED)
        if problem is None:
            self._keep_apart()
            (other,) = any_rank(self.engine.job, [not self.same])
            self.guarantee = self._guarantee(not other)
            self.unexpected = self._find_unexpected()
            problem = self._together(self._plan, damage=False)
        if problem is None:
            touched.update(self._keys())
            problem = self._together(self._read)
        if problem is None and (stale := sorted(touched - self._keys())):
            text = f"{self.stored.place} does not have {stale[0][1]}, which is damaged now"
            problem = _Problem(text, damage=True)
        return problem

    def finish(self, problems: list[str]) -> tuple[str, dict[str, Any]]:
        """Restore counters, schedules and all other state, and say what the resume is worth."""
        engine, manifest = self.engine, self.stored.manifest
        engine.states.fragments_written()
        if not self.options.states:
            engine.states.refresh()
        problem: CheckpointError | None = None
        try:
            if not self.options.module_only:
                before = manifest.get("history")
                known = before if isinstance(before, list) else []
                continue_history(engine, known, self.stored.id)
                self._load_progress(manifest["state"])
                self._load_own()
        except CheckpointError as error:
            problem = error
        except index.MALFORMED as error:
            problem = CheckpointError(f"state in {self.stored.place} does not fit: {error!r}")
            problem.__cause__ = error
        found = worst(engine.job, None if problem is None else str(problem))
        if found is not None:  # on every rank, though state may be one rank's own
            raise problem or CheckpointError(found)
        if engine.job.rank == 0:
            back = f"; it is not the latest, which is damaged: {problems[0]}" if problems else ""
            logger.log(
                logging.ERROR if problems else logging.INFO,
                "loaded checkpoint %s, step %s; %s%s",
                *(self.stored.place, manifest["step"], self.guarantee, back),
            )
        return self.stored.place, manifest["client_state"]

    # -- planning: nothing is changed --------------------------------------------------------------

    def _together(
        self, action: Callable[[], None], *malformed: type[Exception], damage: bool = True
    ) -> _Problem | None:
        """Do something on every rank; ``damage`` tells what a :class:`CheckpointError` means."""
        texts: dict[bool, str] = {}
        try:
            action()
        except OSError as error:
            texts[False] = str(error)
        except CheckpointError as error:
            texts[damage and not error.other_version] = str(error)
        except malformed as error:
            texts[damage] = f"checkpoint {self.storage.where(self.tag)} is malformed: {error!r}"
        if not any(any_rank(self.engine.job, [bool(texts)])):
            return None
        for kind in (False, True):  # what is not damage on one rank is none
            if (text := worst(self.engine.job, texts.get(kind))) is not None:
                return _Problem(text, damage=kind)
        raise AssertionError("a rank has a problem")

    def _open(self) -> None:
        """Read manifest, index, and what this rank, or else rank 0, saved for itself."""
        job = self.engine.job
        self.stored = Stored(self.storage, self.tag)
        rank = job.rank if job.world_size == self.stored.world_size else 0
        check_file(self.stored, rank)
        self.own = self.stored.own(rank)
        place = f"state of rank {rank} in {self.stored.place}"
        if "state" not in self.own:
            raise CheckpointError(f"{place} is missing")
        data = bytes(raw_bytes(read_whole(self.storage, self.own["state"])).numpy())
        self.own_state = index.parse(data, place)
        saved = self.stored.manifest["state"].get("steps", {})
        self.steps = {str(name): int(step) for name, step in saved.items()}
        for info in map(self.engine.job.parameters.info, self.engine.module.parameters()):
            if info.client_names[0] in self.steps:
                self.steps[info.name] = self.steps[info.client_names[0]]
        self._look_at_engine()

    def _keep_apart(self) -> None:
        """Give parameters whose states have seen other numbers of updates buckets of their own.

        A bucket has one such number, so an engine in which a parameter was unfrozen has other
        buckets than one that trains it from the beginning. Collective where that is so.
        """
        states = self.engine.states
        kept = [(step, self.steps.get(name, step)) for name, step in states.steps().items()]
        if self.options.states and len({now for now, _ in kept}) < len(set(kept)):
            states.rebuild(self.steps)
            self._look_at_engine()

    def _look_at_engine(self) -> None:
        """Find what there is to restore, and whether it lies as it did in the engine saved."""
        job, module, states = self.engine.job, self.engine.module, self.engine.states
        client = partial(client_fragments, table=job.parameters, module=module)
        kept = [f for f in states.fragments() if f.kind != "gradient"]
        self.lent = {fragment.name for fragment in client(filter(is_lent, kept))}
        self.fragments = client(f for f in kept if not is_lent(f))
        self.plugin_fragments = (
            [] if self.options.module_only else plugin_fragments(job.hub, self.engine)
        )
        digest, layout = fragments_digest(client(kept)), layout_of(self.engine)
        alike = all(self.stored.manifest[key] == value for key, value in layout.items())
        self.same = alike and self.own_state.get("fragments") == digest

    def _find_unexpected(self) -> list[str]:
        """Stored parameters that no rank has. Collective."""
        table = self.engine.job.parameters
        known = {table.info(parameter).name for parameter in self.engine.module.parameters()}
        known |= {fragment.name for fragment in self.fragments}  # also what is inside of wrappers
        known |= self.lent
        stored = sorted(name for kind, name in self.stored.keys if kind == "parameter")
        anywhere = any_rank(self.engine.job, [name in known for name in stored])
        return [name for name, found in zip(stored, anywhere, strict=True) if not found]

    def _guarantee(self, same: bool) -> Guarantee:
        manifest, guarantee = self.stored.manifest, Guarantee(same)
        guarantee.weaken(*manifest["guarantee"].get("weaker", ()))
        if self.lent:
            guarantee.weaken(f"{len(self.lent)} parameters are lent by another engine and stay")
        changed = changed_versions(manifest["versions"], versions(self.engine))
        guarantee.weaken(*(changed if same else manifest["guarantee"].get("weaker_reshaped", ())))
        return guarantee

    def _plan(self) -> None:
        stored, table = self.stored, self.engine.job.parameters
        frozen = (p for p in self.engine.module.parameters() if not p.requires_grad)
        self.frozen = {name for p in frozen for name in table.info(p).client_names}
        self.work: list[tuple[Fragment, StoredTensor]] = []
        self.fresh: list[Fragment] = []
        missing = list[str]()
        for fragment in [*self.fragments, *self.plugin_fragments]:
            wanted = fragment.kind in ("parameter", PLUGIN) or self.options.states
            if wanted and (source := self._source(fragment)) is not None:
                check_coverage(fragment, source, stored.place)
                self._note_dtype(fragment, source)
                self.work.append((fragment, source))
            elif fragment.kind == PLUGIN:
                self.guarantee.weaken(f"{fragment.name} is not in the checkpoint, left as it is")
            else:
                if self._starts_fresh(fragment):
                    self.fresh.append(fragment)
                if wanted and fragment.on_reshape != "reset":
                    missing.append(f"{fragment.name} ({fragment.kind})")
        self._plan_buffers(missing)
        excluded = set(stored.manifest["excluded"])
        left_out = [m for m in missing if m.removesuffix(" (parameter)") in excluded]
        if left_out:
            self.guarantee.weaken(f"{len(left_out)} frozen parameters were excluded when saving")
        self._refuse_missing([m for m in missing if m not in left_out])
        self._refuse_unexpected()

    def _starts_fresh(self, fragment: Fragment) -> bool:
        """True for an optimizer state whose parameter gets other values; masters are made again."""
        if fragment.kind in ("parameter", "master"):
            return False
        stored = (self.stored.find(kind, fragment.name) for kind in ("parameter", "master"))
        return fragment.on_reshape == "reset" or any(source is not None for source in stored)

    def _source(self, fragment: Fragment) -> StoredTensor | None:
        """The stored tensor that a fragment is filled from."""
        if fragment.on_reshape == "reset":
            own = self.own.get(f"{fragment.kind}/{fragment.name}")
            fits = own is not None and own.shape == fragment.global_shape
            if self.guarantee.same_layout and fits:
                return own
            self.guarantee.weaken(f"{fragment.kind} belongs to a rank and starts afresh")
            return None
        find, name = self.stored.find, fragment.name
        found = find(fragment.kind, name)
        if fragment.kind == "master":
            return found or find("parameter", name)
        if fragment.kind == "parameter" and found is not None and found.dtype != fragment.dtype:
            return find("master", name) or found  # rounded once, from the most exact values
        return found or (find("master", name) if fragment.kind == "parameter" else None)

    def _note_dtype(self, fragment: Fragment, source: StoredTensor) -> None:
        # the exact value of a trained parameter is its master's
        exact = fragment.kind != "parameter" or fragment.name in self.frozen
        if source.dtype.itemsize > fragment.dtype.itemsize and exact:
            self.guarantee.weaken(
                f"{fragment.kind} narrows from {source.dtype} to {fragment.dtype}"
            )

    def _plan_buffers(self, missing: list[str]) -> None:
        self.buffers: list[tuple[torch.Tensor, StoredTensor]] = []
        table, module = self.engine.job.parameters, self.engine.module
        borrowed = lent_modules(module, self.engine.states)
        for name, (buffer, info) in persistent_buffers(table, module, borrowed).items():
            own = self.own.get(f"buffer/{name}") if self.guarantee.same_layout else None
            source = own or self.stored.find("buffer", name)
            if source is None:
                missing.append(f"{name} (buffer)")
            elif own is None and info.placement is not None:
                part = buffer_fragment(name, buffer, info.placement)
                check_coverage(part, source, self.stored.place)
                self.work.append((part, source))
            elif source.shape != tuple(buffer.shape):
                raise CheckpointError(
                    f"{name} (buffer) has shape {list(buffer.shape)} in the model, but "
                    f"{list(source.shape)} in checkpoint {self.stored.place}"
                )
            else:
                self.buffers.append((buffer, source))

    def _refuse_missing(self, missing: list[str]) -> None:
        if not missing:
            return
        listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if missing[5:] else "")
        if self.options.strict:
            kinds = {kind for kind, _ in self.stored.keys}
            only = "; it has parameters only, which load_module_only=True takes"
            hint = only if kinds <= {"parameter", "buffer"} and self.options.states else ""
            raise CheckpointError(f"checkpoint {self.stored.place} lacks {listed}{hint}")
        self.guarantee.weaken(
            f"the checkpoint lacks {listed}: parameters and buffers stay as they are, states of "
            "parameters that it has start fresh"
        )

    def _refuse_unexpected(self) -> None:
        if self.options.strict and self.unexpected:
            raise CheckpointError(
                f"checkpoint {self.stored.place} has parameters that the module lacks: "
                f"{', '.join(self.unexpected[:5])}"
            )

    # -- reading -----------------------------------------------------------------------------------

    def _keys(self) -> set[tuple[str, str]]:
        return {(fragment.kind, fragment.name) for fragment, _ in self.work}

    def _read(self) -> None:
        self.engine.drop_window()
        self._check_headers()
        restore(self.storage, self.work)
        for fragment in self.fresh:
            fragment.write(torch.full_like(fragment.read(), fragment.initial))
        with torch.no_grad():
            for buffer, source in self.buffers:
                copy_into(buffer, read_whole(self.storage, source))
        self.plugin_tensors = {
            key: read_whole(self.storage, source) for key, source in self._plugin_sources()
        }

    def _check_headers(self) -> None:
        """Each rank checks some files, so that all are checked, though few may be needed."""
        job, stored = self.engine.job, self.stored
        for rank in range(job.rank, stored.world_size, job.world_size):
            check_file(stored, rank)

    def _plugin_sources(self) -> Iterator[tuple[str, StoredTensor]]:
        first = self.stored.own(0)
        for key in self.stored.manifest["state"].get("plugin_tensors", ()):
            if f"plugin/{key}" not in first:
                raise CheckpointError(f"{self.stored.place} lacks the tensor {key!r} of a plugin")
            yield key, first[f"plugin/{key}"]
        for key, source in self.own.items() if self.guarantee.same_layout else ():
            if key.startswith("plugin/"):
                yield key.removeprefix("plugin/"), source

    # -- everything else ---------------------------------------------------------------------------

    def _load_progress(self, state: Mapping[str, Any]) -> None:
        engine = self.engine
        engine.progress.load_state_dict(state["progress"])
        engine.loss_scaler.load_state_dict(state["loss_scaler"])
        schedule = engine.lr_scheduler
        if engine.optimizer is not None and (self.options.schedule or schedule is None):
            self._load_groups(state["groups"])
            if schedule is not None and state["scheduler"] is not None:
                schedule.load_state_dict(unpacked(state["scheduler"]))
            elif schedule is not None:
                self.guarantee.weaken("the checkpoint has no schedule, so the engine's stays")

    def _load_groups(self, saved: list[Mapping[str, Any]]) -> None:
        """Hyper-parameters follow their parameters, also into groups that are cut otherwise."""
        assert self.engine.optimizer is not None
        table = self.engine.job.parameters
        by_name = {name: group["hyper"] for group in saved for name in group["parameters"]}
        for number, group in enumerate(self.engine.optimizer.param_groups):
            names = [n for p in group["params"] for n in table.info(p).client_names]
            found = [by_name[name] for name in names if name in by_name]
            for key in found[0] if found else ():
                if all(hyper.get(key) == found[0][key] for hyper in found):
                    group[key] = tupled(group.get(key), found[0][key])
                else:
                    self.guarantee.weaken(
                        f"parameters of group {number} had different values of {key}, so it stays "
                        f"{group.get(key)}"
                    )

    def _load_own(self) -> None:
        engine, own = self.engine, self.own_state
        same = self.guarantee.same_layout
        if same:
            load_random_state(engine.job, own["random"])
        else:
            engine.job.random.start_afresh()
        engine.states.learn(own.get("learned", []) if same else [])
        loader = engine.training_dataloader
        if own["loader"] is not None and hasattr(loader, "load_state_dict"):
            assert loader is not None
            loader.load_state_dict(unpacked(own["loader"]))
        data = dict(self.stored.manifest["state"]["plugins"])
        if same:
            data.update(own["plugins"])
        target: Any = engine  # hooks are written for engines that train
        engine.job.hub.load_state(target, StateReader(data, self.plugin_tensors))


def check_file(stored: Stored, rank: int) -> None:
    """Check length and header of a rank's file.

    Raises:
        CheckpointError: missing, cut off, longer than it was, or another header.
    """
    file, (length, expected) = stored.file(rank), stored.header(rank)
    size = stored.storage.size(file.path)
    if size is None:
        raise CheckpointError(f"checkpoint file {file.place} is missing")
    if size != file.nbytes:
        raise CheckpointError(
            f"checkpoint file {file.place} is damaged: it has {size:,} bytes, and {file.nbytes:,} "
            "were written"
        )
    header = bytearray(length)
    stored.storage.read(file.path, 0, memoryview(header))
    if checksums(header) != expected:
        raise CheckpointError(f"checkpoint file {file.place} is damaged: its header was changed")

"""Model states that leave the accelerator between phases of a job, and come back.

A job that generates, evaluates or trains another model for a while needs the accelerator's memory
for that. Every state is reachable as a fragment, and reading a fragment that lies on the device
gives a view of the memory that really keeps it. So the storages under these views are copied to
host memory and emptied in place, and filled again later. The model states (of plain data
parallelism, ZeRO of any stage, another plugin) need not know.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, cast

import torch

from drivetrain.errors import TrainingError
from drivetrain_offload.on_demand.storages import PlacedStorage, find_storages
from drivetrain_offload.on_demand.suspended import SuspendedStates, suspended

if TYPE_CHECKING:
    from drivetrain.contracts import Fragment, ModelStates
    from drivetrain.engine.engine import Engine

logger = logging.getLogger("drivetrain.offload")

PLACES = ("cpu",)
"""Where states may go; ``"nvme"`` is for states that always live there, by the config."""


class StateKind(StrEnum):
    """What can be moved, under DeepSpeed's names."""

    OPTIM_STATES = "optim_states"
    """Moments and whatever else the optimizer keeps."""

    HP_PARAMS = "hp_params"
    """Master weights; parameters which are their own masters are ``LP_PARAMS``."""

    LP_PARAMS = "lp_params"
    """The parameters that forward and backward use."""

    LP_GRADS = "lp_grads"
    """Gradients, and the errors that compressed gradients leave behind."""

    CONTIGUOUS_GRAD_BUFFER = "contiguous_grad_buffer"
    """The same as ``LP_GRADS``: gradients are added up where they are reduced."""


def offload_states(
    engine: Engine,
    include: Iterable[StateKind | str] | None = None,
    device: str = "cpu",
    pin_memory: bool = True,
    non_blocking: bool = False,
) -> dict[str, int]:
    """Move model states of this rank from the accelerator to host memory, and free it there.

    May be called again for further kinds. Until :func:`reload_states`, whatever needs what is away
    raises :class:`TrainingError`: without parameters no forward, without gradients no forward that
    records a graph, without optimizer states or master weights no step. Checkpoints can be saved
    all the time, but not loaded. Does not communicate.

    On an engine that computes on the CPU there is nothing to gain, and this does nothing. What
    lives in host memory or in files already is left there. Memory that others share (an
    array of the client, another process) cannot be freed, and stays; a warning counts it.

    Args:
        engine: whose states; at best between steps.
        include: kinds to move; all by default.
        device: where to; ``"cpu"``.
        pin_memory: lock the host memory, so that copies are fast.
        non_blocking: queue all copies before any is waited for.

    Returns:
        Bytes that were moved by this call, for each kind asked for. Memory that holds several
        kinds counts under the first.

    Raises:
        TrainingError: unknown kinds, another device, or too little host memory. Everything is then
            where it was before.
    """
    wanted = _kinds(include)
    if device not in PLACES:
        raise TrainingError(
            f"offload_states cannot move states to device {device!r}, expected 'cpu'; for states "
            "in files set zero_optimization.offload_optimizer.device: nvme"
        )
    moved = dict.fromkeys((kind.value for kind in StateKind if kind in wanted), 0)
    if engine.device.type == "cpu":
        return moved
    states = suspended(engine) or SuspendedStates(engine)
    engine.job.accelerator.synchronize()
    chosen, left = _choose(states, wanted)
    states.move_away(chosen, pin_memory=pin_memory, non_blocking=non_blocking)
    for storage in chosen:
        kind = _first_kind(storage)
        moved[kind if kind in moved else StateKind.CONTIGUOUS_GRAD_BUFFER.value] += storage.nbytes
    engine.states = cast("ModelStates", states) if states.away else states.inner
    for (kind, why), count in left.items():
        logger.warning("%d bytes of %s stay on %s: %s", count, kind, engine.device, why)
    return moved


def reload_states(engine: Engine, non_blocking: bool = False) -> None:
    """Bring back whatever :func:`offload_states` has moved away; if nothing, do nothing.

    Args:
        engine: whose states.
        non_blocking: return while copies are under way; what the accelerator is told to do later
            sees the values all the same.

    Raises:
        TrainingError: the accelerator has too little memory. What is away then stays away.
    """
    states = suspended(engine)
    if states is not None:
        states.bring_back(non_blocking=non_blocking)
        engine.states = states.inner


def state_devices(engine: Engine) -> dict[str, set[str]]:
    """Where the states of this rank are now.

    Returns:
        Kind, as :class:`StateKind` names it, -> homes of its fragments: ``"device"``, ``"host"``,
        ``"nvme"``, ...
    """
    found: dict[str, set[str]] = defaultdict(set)
    for fragment in engine.states.fragments():
        if fragment.kind != "step":
            found[kind_of(fragment)].add(fragment.home)
    return dict(found)


def get_state_devices(model: Engine, state: StateKind | str) -> set[torch.device]:
    """The devices of one kind of this rank's states; those in files are on none.

    Args:
        model: the engine.
        state: the kind, or its name.

    Raises:
        ValueError: there is no such kind.
    """
    homes = state_devices(model).get(StateKind(str(state)), set())
    devices = {"device": model.device, "host": torch.device("cpu")}
    return {devices[home] for home in homes if home in devices}


def kind_of(fragment: Fragment) -> StateKind:
    """The kind under which a fragment can be moved."""
    # Error feedback is used where gradients are reduced, so it must be there when they are.
    if fragment.kind == "gradient" or fragment.on_reshape == "reset":
        return StateKind.LP_GRADS
    known = {"parameter": StateKind.LP_PARAMS, "master": StateKind.HP_PARAMS}
    return known.get(fragment.kind, StateKind.OPTIM_STATES)


def _kinds(include: Iterable[StateKind | str] | None) -> set[StateKind]:
    if include is None:
        return set(StateKind)
    names = [getattr(kind, "value", kind) for kind in include]
    unknown = [name for name in names if name not in list(StateKind)]
    if unknown:
        raise TrainingError(
            f"offload_states knows no states {unknown[0]!r}, expected some of "
            f"{', '.join(StateKind)}"
        )
    return {StateKind(name) for name in names}


def _choose(
    states: SuspendedStates, wanted: set[StateKind]
) -> tuple[list[PlacedStorage], dict[tuple[str, str], int]]:
    """Storages to move; and (kind, reason) -> bytes of those that have to stay."""
    if StateKind.CONTIGUOUS_GRAD_BUFFER in wanted:
        wanted = wanted | {StateKind.LP_GRADS}
    chosen: list[PlacedStorage] = []
    left: dict[tuple[str, str], int] = defaultdict(int)
    for storage in find_storages(states.engine, states.live_fragments(), kind_of):
        if not storage.kinds & wanted:
            continue
        why = None
        if others := sorted(storage.kinds - wanted):
            why = f"the same memory holds {', '.join(others)}, which are to stay"
        elif not storage.resizable:
            why = "the memory is shared with somebody who did not give it back"
        if why is None:
            chosen.append(storage)
        else:
            left[_first_kind(storage), why] += storage.nbytes
    return chosen, left


def _first_kind(storage: PlacedStorage) -> str:
    return next(kind.value for kind in StateKind if kind in storage.kinds)

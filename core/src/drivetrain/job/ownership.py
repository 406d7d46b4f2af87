"""Which model states of this process keep which parameters: at most one keeps each.

Model states take the parameters that lie in their buckets, and give them back when their engine is
destroyed. Meanwhile these are *lent* to all other engines whose modules have them: an engine reads
what it is lent where it lies, made whole by the hooks of the engine that keeps it, and neither
trains, casts, broadcasts nor frees it. Jobs in one process share this registry, since they may
share a module.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from drivetrain.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts.state.fragment import Fragment
    from drivetrain.contracts.state.model_states import ModelStates
    from drivetrain.job.job import Job

_owners: MutableMapping[nn.Parameter, Owner] = WeakTensorKeyDictionary()

_changes = [0]
"""How often parameters have been taken or given back."""

_looked_at: MutableMapping[nn.Module, int] = weakref.WeakKeyDictionary()
"""Module -> changes up to which nothing was wrong with it."""


class Owner:
    """The model states of one engine, as others in the process see them.

    Args:
        job: the engine's, to whose engines it is about to be added.
        module: the engine's.
        states: the engine's, which call :meth:`take` and :meth:`release`.

    Attributes:
        number: the engine's place among those of its job, from 0.
    """

    def __init__(self, job: Job, module: nn.Module, states: ModelStates) -> None:
        self._job = weakref.ref(job)
        self._states = weakref.ref(states)
        self._module = weakref.ref(module)
        self.number = len(job.engines)
        self._what = type(module).__name__

    @property
    def job(self) -> Job | None:
        """The engine's job."""
        return self._job()

    @property
    def module(self) -> nn.Module | None:
        """The engine's module."""
        return self._module()

    @property
    def states(self) -> ModelStates | None:
        """The model states; ``None`` if they are gone without having been detached."""
        return self._states()

    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep exactly ``parameters`` from now on; see :func:`refuse_kept_elsewhere`."""
        self.release()
        for parameter in parameters:
            _owners[parameter] = self

    def release(self) -> None:
        """Keep none any more; the parameters may be anybody's. May be called repeatedly."""
        _changes[0] += 1
        for parameter in [p for p, owner in _owners.items() if owner is self]:
            del _owners[parameter]

    def label(self, job: Job) -> str:
        """How a message for an engine of ``job`` calls the engine that keeps parameters."""
        where = "this job" if job is self._job() else "another job"
        return f"another engine (number {self.number} of {where}, over {self._what})"


def owner_of(parameter: nn.Parameter) -> Owner | None:
    """Return whose parameter it is; ``None`` if no living model states keep it."""
    owner = _owners.get(parameter)
    return owner if owner is not None and owner.states is not None else None


def lent(parameters: Iterable[nn.Parameter], states: ModelStates | None) -> set[nn.Parameter]:
    """Return those that other model states than ``states`` keep; they are only read here."""
    owned = ((p, owner_of(p)) for p in parameters)
    return {p for p, owner in owned if owner is not None and owner.states is not states}


def lent_modules(module: nn.Module, states: ModelStates | None) -> set[nn.Module]:
    """Return the parts of ``module`` that belong to engines which lend it parameters."""
    owners = {owner_of(parameter) for parameter in lent(module.parameters(), states)}
    theirs = [owner.module for owner in owners if owner is not None and owner.module is not None]
    inside = {part for other in theirs for part in other.modules()}
    return {part for part in module.modules() if part in inside}


def lent_fragments(module: nn.Module, states: ModelStates) -> list[Fragment]:
    """Return what those that lend parameters to ``module`` keep of them, to be read only.

    Their names are the paths in ``module``.
    """
    named = module.named_parameters()
    names = {p: name.replace("_orig_mod.", "") for name, p in named}
    borrowed = lent(names, states)
    found: list[Fragment] = []
    for owner in dict.fromkeys(owner_of(p) for p in names if p in borrowed):
        assert owner is not None
        assert owner.states is not None
        assert owner.job is not None, "an engine keeps its job"
        table = owner.job.parameters
        here = {table.info(p).name: names[p] for p in borrowed if owner_of(p) is owner}
        owner.states.flush()
        found += [
            replace(fragment, name=here[fragment.name], write=_refuse_write)
            for fragment in owner.states.fragments()
            if fragment.kind == "parameter" and fragment.name in here
        ]
    return found


def is_lent(fragment: Fragment) -> bool:
    """True if ``fragment`` is one of :func:`lent_fragments`."""
    return fragment.write is _refuse_write


def _refuse_write(_values: torch.Tensor) -> None:
    raise TrainingError("a parameter that another engine lends is written through that engine only")


def refuse_kept_elsewhere(
    job: Job,
    module: nn.Module,
    groups: Iterable[Mapping[str, Any]],
    states: ModelStates | None = None,
) -> None:
    """Check that an engine over ``module`` only reads what others keep, and can read it.

    Args:
        job: of the engine that is to be built, or built again; it knows the parameters' names.
        module: the engine's.
        groups: of its optimizer, if there is one.
        states: the engine's, if it has been built.

    Raises:
        ConfigError: names the first parameter that is trained here, or is computed with in another
            dtype, or is used by a module where the engine that keeps it does not gather it; and
            that engine.
    """
    trained = {p for group in groups for p in group["params"] if p.requires_grad}
    theirs = lent_modules(module, states)
    borrowed = lent(module.parameters(), states)
    alone = {p for part in module.modules() if part not in theirs for p in _own(part)}
    for parameter in module.parameters():
        owner = owner_of(parameter)
        if owner is None or parameter not in borrowed:
            continue
        info, label = job.parameters.info(parameter), owner.label(job)
        if parameter in trained:
            raise ConfigError(
                f"parameter {info.name} is kept by {label}, so no other can train it: leave it out "
                "of the optimizer, freeze it (requires_grad_(False)), or call destroy() on that "
                "engine first"
            )
        if info.compute_dtype != parameter.dtype and parameter.is_floating_point():
            raise ConfigError(
                f"parameter {info.name} is lent by {label}, which computes with it in "
                f"{parameter.dtype}, but the config of this engine asks for {info.compute_dtype}: "
                "give both the same precision"
            )
        if parameter in alone and hasattr(parameter, "drivetrain_handle"):
            raise ConfigError(
                f"parameter {info.name} is kept in shards by {label}, and used here by a module "
                "that is no part of that one's, so nothing gathers it: share the module instead of "
                "the parameter"
            )


def refuse_orphans(module: nn.Module) -> None:
    """Check that the engines which keep parameters of ``module`` in shards still gather them.

    Costs next to nothing as long as no engine takes or gives back parameters.

    Raises:
        TrainingError: names the first that is kept in shards by no living engine.
    """
    if _looked_at.get(module) == _changes[0]:
        return
    for name, parameter in module.named_parameters():
        handle = getattr(parameter, "drivetrain_handle", None)
        if owner_of(parameter) is None and not getattr(handle, "gathered", True):
            raise TrainingError(
                f"parameter {name} was kept in shards by an engine that has been destroyed, so "
                "nothing gathers it: destroy the engines that only read it before that one, or, "
                "while its job is open, build another engine over it"
            )
    _looked_at[module] = _changes[0]


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]

"""Which model states of this process keep which parameters: at most one keeps each.

Model states take the parameters that lie in their buckets, and no others may free or write these.
They give them back when their engine is destroyed. Jobs in one process share this registry, since
they may share a module.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from drivetrain.contracts.state.model_states import ModelStates
    from drivetrain.job.job import Job

_owners: MutableMapping[nn.Parameter, Owner] = WeakTensorKeyDictionary()


class Owner:
    """The model states of one engine, as others in the process see them.

    Args:
        job: of the engine, which is going to be the last one there.
        module: the engine's.
        states: the engine's, which call :meth:`take` and :meth:`release`.
    """

    def __init__(self, job: Job, module: nn.Module, states: ModelStates) -> None:
        self._job = weakref.ref(job)
        self._states = weakref.ref(states)
        self._number = len(job.engines)
        self._what = type(module).__name__

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
        for parameter in [p for p, owner in _owners.items() if owner is self]:
            del _owners[parameter]

    def label(self, job: Job) -> str:
        """How a message for an engine of ``job`` calls the engine that keeps parameters."""
        where = "this job" if job is self._job() else "another job"
        return f"another engine (number {self._number} of {where}, over {self._what})"


def owner_of(parameter: nn.Parameter) -> Owner | None:
    """Return whose parameter it is; ``None`` if no living model states keep it."""
    owner = _owners.get(parameter)
    return owner if owner is not None and owner.states is not None else None


def refuse_kept_elsewhere(
    job: Job,
    module: nn.Module,
    groups: Iterable[Mapping[str, Any]],
    states: ModelStates | None = None,
) -> None:
    """Check that no other engine keeps what an engine over ``module`` trains.

    Args:
        job: of the engine that is to be built, or built again; it knows the parameters' names.
        module: the engine's.
        groups: of its optimizer, if there is one.
        states: the engine's, if it has been built.

    Raises:
        ConfigError: names the first such parameter, and the other engine.
    """
    trained = {p for group in groups for p in group["params"] if p.requires_grad}
    for parameter in module.parameters():
        owner = owner_of(parameter)
        if owner is None or owner.states is states:
            continue
        name, label = job.parameters.info(parameter).name, owner.label(job)
        if parameter in trained:
            raise ConfigError(
                f"parameter {name} is kept by {label}, so no other can train it: leave it out of "
                "the optimizer, freeze it (requires_grad_(False)), or call destroy() on that "
                "engine first"
            )
        if hasattr(parameter, "drivetrain_handle"):
            raise ConfigError(
                f"parameter {name} is kept in shards by {label}: call destroy() on that engine "
                "first"
            )

"""The compression of one model in training: its modifiers, when they run, and what is saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any
from uuid import uuid4
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import nn

from drivetrain.errors import CheckpointError, CommunicationError, ConfigError
from drivetrain.job.ownership import owner_of
from drivetrain.states.whole import handed_over
from drivetrain_compression.pruned.pruning import Pruning, Removing
from drivetrain_compression.recipe.modifier import CompressionUnit, Progress
from drivetrain_compression.recipe.recipe import assign
from drivetrain_compression.training.base import TrainingModifier

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain_compression.students.distilling import Distillation

AnyTraining = TrainingModifier[Any]

_of_model: WeakKeyDictionary[nn.Module, Session] = WeakKeyDictionary()

_MARK = "drivetrain_compression_session"
"""Attribute of a compressed model that copies of it have, too: a key of :data:`_by_mark`."""

_by_mark: WeakValueDictionary[str, Session] = WeakValueDictionary()


class Session:
    """Modifiers at work on one model.

    Args:
        model: changed in place.
        modifiers: in their order.

    Raises:
        ConfigError: they do not fit the model.
    """

    def __init__(self, model: nn.Module, modifiers: Sequence[AnyTraining]) -> None:
        self.modifiers = list(modifiers)
        self.at = -1
        """Applied optimizer steps that modifiers have been told of; -1 before any."""
        self.distillation: Distillation | None = None
        self._checked = False
        assigned: Any = assign(modifiers, model)
        self._assigned: list[tuple[AnyTraining, list[CompressionUnit]]] = assigned
        for modifier, units in self._assigned:
            modifier.begin(units)
        for modifier in self.modifiers:
            if isinstance(modifier, Pruning):
                modifier.relate(model)
        self._belong_to(model, uuid4().hex)

    def _belong_to(self, model: nn.Module, mark: str | None = None) -> None:
        _of_model[model] = self
        if mark is not None:
            model.__dict__[_MARK] = mark
            _by_mark[mark] = self

    def of_copy(self, model: nn.Module) -> Session:
        """A session for a copy of the model, which has copies of masks, scores and steps.

        Raises:
            ConfigError: the model learns from a teacher, whose hooks a copy cannot be rid of.
        """
        if self.distillation is not None:
            raise ConfigError(
                "a copy of a model that learns from a teacher cannot be cleaned: destroy the "
                "engine, and clean the model itself"
            )
        new = copy(self)
        known = {id(modifier): copy(modifier) for modifier in self.modifiers}
        new.modifiers = [known[id(modifier)] for modifier in self.modifiers]
        for modifier in new.modifiers:
            modifier.job = None  # a copy is this rank's own
            modifier.move_to(model)
        new._assigned = [
            (known[id(modifier)], [unit.in_copy(model) for unit in units])
            for modifier, units in self._assigned
        ]
        new._belong_to(model)
        return new

    def use(self, job: Job) -> None:
        """Communicate within a job from now on."""
        for modifier in self.modifiers:
            modifier.job = job

    def catch_up(self, steps: int) -> None:
        """Tell modifiers of the optimizer steps that they have not been told of. Collective.

        Args:
            steps: applied so far.
        """
        while self.at < steps:
            self.at += 1
            for modifier in self.modifiers:
                modifier.step(Progress(self.at))

    def activate_all(self) -> None:
        """Have everything begun, with the fewest bits; masks that were loaded stay. Collective."""
        for modifier in self.modifiers:
            modifier.complete()

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Scores that are learned, by name."""
        for modifier in self.modifiers:
            if isinstance(modifier, Pruning):
                for target in modifier.targets:
                    scores = target.module._parameters.get(modifier.scores_name)
                    if scores is not None:
                        yield f"{target.name}.{modifier.scores_name}", scores

    def check_trained(self, engine: Engine) -> None:
        """Refuse scores that no optimizer trains.

        Raises:
            ConfigError: names the first.
        """
        if self._checked or engine.optimizer is None:
            return
        trained = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
        lost = [name for name, p in self.own_parameters() if id(p) not in trained]
        if lost:
            raise ConfigError(
                f"compression_training: the optimizer was given parameters before {lost[0]} was "
                "there, so these scores (topk) would never be trained: leave model_parameters out, "
                "or build the optimizer after drivetrain_compression.init_compression"
            )
        self._checked = True

    def finish(self, model: nn.Module) -> list[str]:
        """Leave an ordinary model: values put into weights, what is pruned and related removed.

        Returns:
            What was removed, one line each.

        Raises:
            ConfigError: an engine keeps a part of the model in shards, whose shapes cannot change.
        """
        sharded = [p for p in model.parameters() if hasattr(p, "drivetrain_handle")]
        if any(owner_of(parameter) is not None for parameter in sharded):
            raise ConfigError(
                "the model's parameters are kept in shards by an engine: clean "
                "copy.deepcopy(engine.module), made inside `with drivetrain.whole(engine.module)"
                ":`, or destroy the engine and clean the model while the job is open"
            )
        if sharded:  # by an engine that was destroyed
            _take_whole(sharded)
        lines = []
        # Quantised as in forward: before zeros are put in, and before shapes change.
        for modifier, units in sorted(self._assigned, key=lambda pair: -pair[0].place):
            kept = _kept(modifier)
            modifier.finish(units)
            if isinstance(modifier, Removing):
                lines += modifier.remove(model, kept)
        if self.distillation is not None:
            self.distillation.close()
        if _of_model.get(model) is self:
            del _of_model[model]
            model.__dict__.pop(_MARK, None)
        return lines

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        parts = {modifier.label: modifier.state() for modifier in self.modifiers}
        return {"at": self.at, "modifiers": parts}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Go on from what :meth:`state` returned; without one, begin.

        Raises:
            CheckpointError: it was saved by other modifiers.
        """
        if state is None:
            return
        saved = state["modifiers"]
        own = [modifier.label for modifier in self.modifiers]
        if sorted(saved) != sorted(own):
            raise CheckpointError(
                f"the checkpoint was compressed by {', '.join(sorted(saved))}, and this job by "
                f"{', '.join(sorted(own))}; load it with the compression_training it was saved with"
            )
        self.at = int(state["at"])
        for modifier in self.modifiers:
            modifier.load_state(saved[modifier.label])


def _take_whole(parameters: Sequence[nn.Parameter]) -> None:
    """Give parameters that no engine shards any more their values. Collective.

    Raises:
        ConfigError: the job of the ranks that have the shards is closed.
    """
    try:
        with handed_over(parameters):
            values = [parameter.detach().clone() for parameter in parameters]
    except CommunicationError as error:
        raise ConfigError(
            "the model's parameters lie in shards of an engine that was destroyed with its job, so "
            "nothing gathers them: clean copy.deepcopy(engine.module), made inside "
            "`with drivetrain.whole(engine.module):`, before destroy()"
        ) from error
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value


def _kept(modifier: AnyTraining) -> dict[str, Any]:
    if not isinstance(modifier, Removing) or not modifier.started:
        return {}
    return {target.name: modifier.kept(target).reshape(-1) for target in modifier.targets}


def session_of(model: nn.Module) -> Session | None:
    """What compresses a model, or the model that it is a copy of."""
    found = _of_model.get(model)
    if found is None and (first := _by_mark.get(model.__dict__.get(_MARK, ""))) is not None:
        found = first.of_copy(model)
    return found

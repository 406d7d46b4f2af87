"""The plugin: hands the length of a step to the model, or cuts the inputs to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet

from drivetrain.contracts import Plugin, Problem, Sections, hookimpl
from drivetrain.errors import TrainingError
from drivetrain_curriculum.schedule import Pacing, Schedule
from drivetrain_curriculum.section import CurriculumSection

if TYPE_CHECKING:
    from drivetrain.contracts import StateReader, StateWriter
    from drivetrain.engine.engine import Engine
    from drivetrain.plan.plan import Plan

_PATH = "curriculum_learning"
_KEYWORD = "curriculum_seqlen"
_STATE = f"{_PATH}/difficulty"

_TILE = 8
"""Matrix units work on multiples of this many elements."""


class Curriculum(Plugin):
    """Owns ``curriculum_learning``, DeepSpeed's first form of it."""

    name = _PATH
    sections: ClassVar[Sections] = {_PATH: CurriculumSection}

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        shards = plan.layout.size("sp")
        if self.section(CurriculumSection).truncate and shards > 1:
            reason = f"a sequence is spread over {shards} ranks, so none of them can cut it"
            return [Problem(f"{_PATH}.truncate", f"{reason}; let the model or the data do it")]
        return []

    @hookimpl
    def prepare_inputs(
        self, engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not engine.training:
            return None
        length = self._pacing(engine).update(engine.global_steps + 1)
        if self.section(CurriculumSection).truncate:
            return _truncated(args, kwargs, length)
        if engine not in _checked:
            from drivetrain.checked_call import require_keywords

            require_keywords(_PATH, engine.module, [_KEYWORD])
            _checked.add(engine)
        return args, {**kwargs, _KEYWORD: length}

    @hookimpl
    def save_state(self, engine: Engine, writer: StateWriter) -> None:
        writer.put(_STATE, self._pacing(engine).current)

    @hookimpl
    def load_state(self, engine: Engine, reader: StateReader) -> None:
        fresh = Pacing(self.section(CurriculumSection)).current
        self._pacing(engine).current = reader.get(_STATE, fresh)

    def features(self) -> Mapping[str, object]:
        section = self.section(CurriculumSection)
        return {f"{_PATH}.enabled": True, f"{_PATH}.truncate": section.truncate}

    def feature_values(self) -> Mapping[str, Sequence[object]]:
        return {f"{_PATH}.truncate": (False, True)}

    def notes(self) -> Sequence[str]:
        step = self.section(CurriculumSection).schedule_config.difficulty_step
        if step is None or step % _TILE == 0:
            return []
        path = f"{_PATH}.schedule_config.difficulty_step"
        return [f"{path}: {step} is no multiple of {_TILE}; matrix units are faster with one"]

    def _pacing(self, engine: Engine) -> Pacing:
        if engine not in _pacings:
            _pacings[engine] = Pacing(self.section(CurriculumSection))
        return _pacings[engine]


_pacings: WeakKeyDictionary[Engine, Pacing] = WeakKeyDictionary()

_checked: WeakSet[Engine] = WeakSet()
"""Engines whose model is known to take the keyword."""


def current_difficulty(engine: Engine) -> int | None:
    """The length of the latest training forward; ``None`` without a curriculum."""
    plugin = _plugin(engine)
    return plugin._pacing(engine).current if plugin is not None else None


def set_schedule(engine: Engine, schedule: Schedule) -> None:
    """Let ``schedule`` decide the length: a function of the step, from 1, alike on all ranks.

    Raises:
        TrainingError: the engine has no curriculum, or one with a fixed schedule.
    """
    plugin = _plugin(engine)
    if plugin is None or plugin.section(CurriculumSection).schedule_type != "custom":
        raise TrainingError(
            f"set_schedule needs {_PATH} in the config, enabled, with schedule_type custom"
        )
    plugin._pacing(engine).schedule = schedule


def _plugin(engine: Engine) -> Curriculum | None:
    return next((p for p in engine.job.plan.plugins if isinstance(p, Curriculum)), None)


def _truncated(
    args: tuple[Any, ...], kwargs: dict[str, Any], length: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Cut dimension 1 of every tensor in which it has the sequence's length.

    That is the length of dimension 1 of the first two-dimensional tensor of integers.
    """
    import torch
    from torch.utils import _pytree as pytree

    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
    tokens = next((t for t in leaves if t.dim() == 2 and not t.is_floating_point()), None)
    if tokens is None:
        raise TrainingError(
            f"{_PATH}.truncate: no input is a two-dimensional tensor of integers [batch, sequence],"
            " so there is no sequence to cut; leave truncate out and cut in the model"
        )
    whole = tokens.shape[1]

    def cut(leaf: Any) -> Any:
        if not torch.is_tensor(leaf) or leaf.dim() < 2 or leaf.shape[1] != whole:
            return leaf
        return leaf[:, :length].contiguous()

    cut_args, cut_kwargs = pytree.tree_map(cut, (args, kwargs))
    return cut_args, cut_kwargs

"""The schedules that a config can name, each written as the passes of one stage after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

from drivetrain_pipeline.schedules.instruction import Instruction, Kind
from drivetrain_pipeline.schedules.streams import Schedule, ScheduleError

Phases = Sequence[tuple[str, int]]
"""Passes, such as ``"F0 I1 W1"``, and how often they are repeated; the digit says which of the
stage's chunks, in the order of the model. A pass that has no micro-batch left is skipped."""

Passes = Iterator[tuple[str, int]]
"""(Pass, micro-batch) of one stage."""


@dataclass(frozen=True)
class _Form:
    """How a named schedule is made.

    Args:
        passes: of a stage: (stage, stages, micro-batches, chunks of a stage).
        least: the fewest chunks on a stage.
        most: the most; None if any number will do.
        turns: True if the model's second half comes back from the last stage to the first.
    """

    passes: Callable[[int, int, int, int], Passes]
    least: int = 1
    most: int | None = 1
    turns: bool = False


def _repeat(phases: Phases, micro_batches: int) -> Passes:
    done: dict[str, int] = {}
    for passes, times in phases:
        for _ in range(times):
            for one in passes.split():
                number = done.get(one, 0)
                if number < micro_batches:
                    done[one] = number + 1
                    yield one, number


def _gpipe(stage: int, stages: int, micro_batches: int, chunks: int) -> Passes:
    """Huang et al. 2019, "GPipe", section 2.3: all forwards, then all backwards."""
    return _repeat([("F0", micro_batches), ("B0", micro_batches)], micro_batches)


def _one_forward_one_backward(stage: int, stages: int, micro_batches: int, chunks: int) -> Passes:
    """Narayanan et al. 2021, "Efficient Large-Scale Language Model Training", section 2.2.1."""
    ahead = stages - 1 - stage
    phases = [("F0", ahead), ("F0 B0", micro_batches), ("B0", ahead)]
    return _repeat(phases, micro_batches)


def _interleaved(stage: int, stages: int, micro_batches: int, chunks: int) -> Passes:
    """Narayanan et al. 2021, section 2.2.2.

    The micro-batches go through the chunks in groups of as many as there are stages. Where they do
    not fill the last group, the schedule is that of full groups without the passes of those that
    are missing; this leaves some more bubble, and no stage waits for what does not come.
    """
    forwards, backwards = [], []
    for first in range(0, micro_batches, stages):
        group = range(first, first + stages)
        forwards += [(f"F{chunk}", m) for chunk in range(chunks) for m in group]
        backwards += [(f"B{chunk}", m) for chunk in reversed(range(chunks)) for m in group]
    ahead = min(2 * (stages - 1 - stage) + (chunks - 1) * stages, len(forwards))
    passes = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        passes += [forward, backward]
    passes += backwards[len(forwards) - ahead :]
    return ((one, m) for one, m in passes if m < micro_batches)


def _zb_h1(stage: int, stages: int, micro_batches: int, chunks: int) -> Passes:
    """Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.2, ZB-H1.

    Later stages put off more gradients of weights, so that each keeps as much as the first.
    """
    ahead = stages - 1 - stage
    phases = [
        ("F0", ahead),
        ("F0 I0", stage),
        ("F0 I0 W0", max(0, micro_batches - (stages - 1))),
        ("I0 W0", ahead),
        ("I0", micro_batches),
        ("W0", micro_batches),
    ]
    return _repeat(phases, micro_batches)


def _zb_v(stage: int, stages: int, micro_batches: int, chunks: int) -> Passes:
    """Qi et al. 2024, "Pipeline Parallelism with Controllable Memory", the zero-bubble V shape.

    Chunk 0 of a stage goes down the V, chunk 1 comes back. A stage fills up with forwards until the
    first comes back, so that it keeps 2 * stages chunks, as much as stage 0 keeps in 1F1B. From
    then on it does one pass of each kind for each chunk in turn.
    """
    below = stages - stage
    phases = [
        ("F0", 2 * below - 1),
        ("F1 F0", stage),
        ("F1 I1 W1", below),
        ("F0 I0 W0 F1 I1 W1", max(0, micro_batches - stages)),
        ("I1 I0", stage),
        ("I0 W0", below),
        ("I1 I0", micro_batches),
        ("W1", micro_batches),
        ("W0", micro_batches),
    ]
    return _repeat(phases, micro_batches)


def _forward(stage: int, stages: int, micro_batches: int, chunks: int) -> Passes:
    for m in range(micro_batches):
        for chunk in range(chunks):
            yield f"F{chunk}", m


_FORMS: Mapping[str, _Form] = MappingProxyType(
    {
        "gpipe": _Form(_gpipe),
        "1f1b": _Form(_one_forward_one_backward),
        "interleaved": _Form(_interleaved, least=2, most=None),
        "zb_h1": _Form(_zb_h1),
        "zb_v": _Form(_zb_v, least=2, most=2, turns=True),
    }
)

NAMES: tuple[str, ...] = tuple(_FORMS)
"""Names of the schedules that train."""


def schedule(name: str, stages: int, micro_batches: int, chunks: int | None = None) -> Schedule:
    """Make a schedule.

    Args:
        name: one of :data:`NAMES`.
        stages: ranks along ``pp``.
        micro_batches: of one step.
        chunks: on each stage; None for the fewest that the schedule works with.

    Raises:
        ScheduleError: no schedule has that name, or it cannot have these numbers.
    """
    form, chunks = _fitting(name, stages, micro_batches, chunks)
    total = stages * chunks
    if form.turns:
        placement = tuple(min(c, total - 1 - c) for c in range(total))
    else:
        placement = tuple(c % stages for c in range(total))
    streams = (form.passes(stage, stages, micro_batches, chunks) for stage in range(stages))
    return _made(name, micro_batches, placement, streams)


def forward_only(trained: Schedule, micro_batches: int) -> Schedule:
    """The schedule of an evaluation, with chunks on the stages where ``trained`` has them.

    Raises:
        ScheduleError: there are no micro-batches.
    """
    if micro_batches < 1:
        raise ScheduleError(f"an evaluation of {micro_batches} micro-batches: it needs at least 1")
    stages, placement = trained.stages, trained.placement
    chunks = len(placement) // stages
    streams = (_forward(stage, stages, micro_batches, chunks) for stage in range(stages))
    return _made("forward", micro_batches, placement, streams)


def fewest_chunks(name: str) -> int:
    """The fewest chunks of a stage that the schedule ``name`` works with.

    Raises:
        ScheduleError: no schedule has that name.
    """
    return _form(name).least


def most_chunks(name: str) -> int | None:
    """The most chunks of a stage that the schedule ``name`` works with; None if any number will do.

    Raises:
        ScheduleError: no schedule has that name.
    """
    return _form(name).most


def _form(name: str) -> _Form:
    if name not in _FORMS:
        raise ScheduleError(f"no schedule is named {name!r}; there are {', '.join(NAMES)}")
    return _FORMS[name]


def _fitting(name: str, stages: int, micro_batches: int, chunks: int | None) -> tuple[_Form, int]:
    form = _form(name)
    for what, number in (("stages", stages), ("micro-batches", micro_batches)):
        if number < 1:
            raise ScheduleError(f"schedule {name!r} of {number} {what}: it needs at least 1")
    chunks = form.least if chunks is None else chunks
    if chunks < form.least or (form.most is not None and chunks > form.most):
        wanted = str(form.least) if form.most == form.least else f"at least {form.least}"
        raise ScheduleError(f"schedule {name!r} with {chunks} chunks on a stage: it needs {wanted}")
    return form, chunks


def _made(
    name: str, micro_batches: int, placement: tuple[int, ...], streams: Iterator[Passes]
) -> Schedule:
    made = []
    for stage, passes in enumerate(streams):
        own = [c for c, holder in enumerate(placement) if holder == stage]
        made.append(
            tuple(
                Instruction(cast("Kind", one[0]), number, own[int(one[1:])])
                for one, number in passes
            )
        )
    return Schedule(name, micro_batches, placement, tuple(made))

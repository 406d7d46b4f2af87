"""Choosing a schedule, and how the model is cut for it, by simulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from drivetrain_pipeline.balance import BalanceError, Layer, balance
from drivetrain_pipeline.schedules.costs import Costs
from drivetrain_pipeline.schedules.named import NAMES, fewest_chunks, most_chunks, schedule
from drivetrain_pipeline.schedules.simulation import simulate
from drivetrain_pipeline.schedules.streams import Schedule, ScheduleError
from drivetrain_pipeline.schedules.timeline import Timeline

MOST_CHUNKS = 8
"""Chunks of a stage beyond which no schedule is tried: each one more brings less, and costs
messages."""


@dataclass(frozen=True)
class LayerCosts:
    """What one layer costs for one micro-batch, in any units that are the same for all.

    Args:
        forward: time of its forward.
        inputs: time of its gradients of inputs.
        weights: time of its gradients of weights.
        activations: memory that it keeps from forward to backward.
        kept: the part of it that stays until the gradients of weights; None for all.
        fixed: memory of its parameters, gradients and optimizer states.
        backward: time of its full backward; None if it takes as long as its two halves.
    """

    forward: float
    inputs: float
    weights: float
    activations: float = 0.0
    kept: float | None = None
    fixed: float = 0.0
    backward: float | None = None

    @property
    def full_backward(self) -> float:
        """Time of gradients of inputs and weights together."""
        return self.inputs + self.weights if self.backward is None else self.backward

    @property
    def left(self) -> float:
        """Memory between the gradients of inputs and those of weights."""
        return self.activations if self.kept is None else self.kept


@dataclass(frozen=True)
class Choice:
    """A schedule for a model of known costs, and what the simulation says of it.

    Args:
        schedule: what the stages do.
        bounds: chunk ``c`` has the layers from ``bounds[c]`` to ``bounds[c + 1]``.
        timeline: one step.
        peaks: by stage, the most memory at a time.
    """

    schedule: Schedule
    bounds: tuple[int, ...]
    timeline: Timeline
    peaks: tuple[float, ...]


def choose(
    layers: Sequence[LayerCosts],
    stages: int,
    micro_batches: int,
    *,
    send: float = 0.0,
    limit: float | None = None,
    names: Sequence[str] = NAMES,
) -> Choice:
    """Choose the schedule, and the number of chunks, that takes the least time in simulation.

    Of those that take equally long, it is the one with the lowest peak of memory, and of these the
    one with the fewest chunks.

    Args:
        layers: of the whole model.
        stages: ranks along ``pp``.
        micro_batches: of one step.
        send: time of a message between two stages.
        limit: memory of one stage; None for no limit.
        names: the schedules to choose from.

    Raises:
        ScheduleError: there are too few layers, or no schedule keeps the limit; it says which one
            comes nearest.
    """
    tried = list(candidates(layers, stages, micro_batches, send=send, limit=limit, names=names))
    if not tried:
        raise ScheduleError(
            f"{len(layers)} layers cannot be cut for {stages} stages by any of {', '.join(names)}"
        )
    return best_of(tried, limit)


def best_of(tried: Sequence[Choice], limit: float | None = None) -> Choice:
    """Return the best of schedules that were simulated; see :func:`choose`.

    Args:
        tried: at least one.
        limit: memory of one stage; None for no limit.

    Raises:
        ScheduleError: none keeps the limit; it says which one comes nearest.
    """
    fit = [found for found in tried if limit is None or max(found.peaks) <= limit]
    if not fit:
        least = min(tried, key=lambda found: max(found.peaks))
        raise ScheduleError(
            f"no schedule of {least.schedule.stages} stages keeps within {limit:g} of memory; "
            f"{least.schedule.name} needs the least, {max(least.peaks):g}; use more stages, "
            "smaller micro-batches or recomputation"
        )
    # Sums of the same times in another order differ in their last digits.
    unit = max(found.timeline.makespan for found in fit) * 1e-9 or 1.0
    return min(
        fit,
        key=lambda found: (
            round(found.timeline.makespan / unit),
            max(found.peaks),
            found.schedule.chunks,
        ),
    )


def candidates(
    layers: Sequence[LayerCosts],
    stages: int,
    micro_batches: int,
    *,
    send: float = 0.0,
    limit: float | None = None,
    names: Sequence[str] = NAMES,
) -> Iterator[Choice]:
    """Simulate every schedule that the model has enough layers for; see :func:`choose`."""
    for name in names:
        most = min(most_chunks(name) or MOST_CHUNKS, len(layers) // stages)
        for chunks in range(fewest_chunks(name), most + 1):
            made = schedule(name, stages, micro_batches, chunks)
            yield _cut(made, layers, send, limit)


def _cut(made: Schedule, layers: Sequence[LayerCosts], send: float, limit: float | None) -> Choice:
    """Cut the layers for a schedule; within the limit if that is possible."""
    times = [
        Layer(cost.forward + cost.full_backward, cost.activations, cost.fixed) for cost in layers
    ]
    found = _simulated(made, layers, balance(times, made.chunks), send)
    if limit is None or max(found.peaks) <= limit or made.chunks > made.stages:
        return found
    # With one chunk on a stage its memory follows from what it keeps at a time.
    try:
        bounds = balance(times, made.chunks, limit=limit, held=made.held())
    except BalanceError:
        return found
    return _simulated(made, layers, bounds, send)


def _simulated(
    made: Schedule, layers: Sequence[LayerCosts], bounds: tuple[int, ...], send: float
) -> Choice:
    costs = costs_of(layers, bounds, send)
    timeline = simulate(made, costs)
    return Choice(made, bounds, timeline, timeline.peaks(costs))


def costs_of(layers: Sequence[LayerCosts], bounds: Sequence[int], send: float = 0.0) -> Costs:
    """Add up the costs of the layers of each chunk.

    Args:
        layers: of the whole model.
        bounds: chunk ``c`` has the layers from ``bounds[c]`` to ``bounds[c + 1]``.
        send: time of a message between two stages.
    """

    def total(value: Callable[[LayerCosts], float]) -> tuple[float, ...]:
        cuts = pairwise(bounds)
        return tuple(sum(map(value, layers[first:end])) for first, end in cuts)

    return Costs(
        forward=total(lambda cost: cost.forward),
        inputs=total(lambda cost: cost.inputs),
        weights=total(lambda cost: cost.weights),
        send=send,
        activations=total(lambda cost: cost.activations),
        kept=total(lambda cost: cost.left),
        fixed=total(lambda cost: cost.fixed),
        backward=total(lambda cost: cost.full_backward),
    )

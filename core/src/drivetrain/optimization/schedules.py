"""Learning rates (and momenta) as functions of the number of updates."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.optim import Optimizer

logger = logging.getLogger(__name__)

PerGroup = float | Sequence[float]
"""One number for all groups, or one for each."""

Warmup = Literal["log", "linear"]

_BETA2 = 0.99
"""Second beta that :class:`OneCycle` writes beside the momentum."""


@dataclass(eq=False)
class Schedule(ABC):
    """A function of the iteration; the first update has the values of iteration -1.

    The engine calls :meth:`step` after every update that was applied, so skipped ones (loss scale)
    do not count.

    Args:
        optimizer: its groups' learning rates are written, now and at every step.

    Raises:
        ValueError: a parameter is out of range.
    """

    optimizer: Optimizer

    def __post_init__(self) -> None:
        self.last_batch_iteration = -1
        # torch's own schedules keep the original rate under this key, too.
        self._base = [float(g.setdefault("initial_lr", float(g["lr"]))) for g in self._groups]
        self._prepare()
        self._apply()

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @abstractmethod
    def _prepare(self) -> None:
        """Check the parameters and compute what does not depend on the iteration."""

    @abstractmethod
    def rates(self, iteration: int) -> list[float]:
        """Learning rate of each group at ``iteration`` (from -1)."""

    def step(self, batch_iteration: int | None = None) -> None:
        """Go to the next iteration, or to ``batch_iteration``."""
        following = self.last_batch_iteration + 1
        self.last_batch_iteration = following if batch_iteration is None else batch_iteration
        self._apply()

    def get_lr(self) -> list[float]:
        """Learning rates of the present iteration."""
        return self.rates(self.last_batch_iteration)

    def get_last_lr(self) -> list[float]:
        """Learning rates written last."""
        return self._last

    def state_dict(self) -> dict[str, Any]:
        """The iteration, which is all that a schedule remembers."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.step(int(state_dict["last_batch_iteration"]))

    def _apply(self) -> None:
        self._last = self.get_lr()
        for group, rate in zip(self._groups, self._last, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _per_group(self, name: str, value: PerGroup) -> list[float]:
        groups = len(self._groups)
        values: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value] * groups
        if len(values) != groups:
            raise ValueError(f"{name} has {len(values)} values for {groups} groups")
        for number in values:
            if isinstance(number, bool) or not isinstance(number, (int, float)) or number < 0:
                raise ValueError(f"{name} must be at least 0, got {number!r}")
        return [float(number) for number in values]


@dataclass(eq=False)
class LRRangeTest(Schedule):
    """Raise the rate step by step to find its useful range (Smith 2017, section 3.3).

    Args:
        lr_range_test_min_lr: first rate, one for all groups or one for each.
        lr_range_test_step_size: updates per interval.
        lr_range_test_step_rate: growth per interval, as a multiple of the first rate.
        lr_range_test_staircase: grow at the end of intervals only.
    """

    lr_range_test_min_lr: PerGroup = 1e-3
    lr_range_test_step_size: int = 2000
    lr_range_test_step_rate: float = 1.0
    lr_range_test_staircase: bool = False

    def _prepare(self) -> None:
        _whole(lr_range_test_step_size=self.lr_range_test_step_size)
        self.min_lrs = self._per_group("lr_range_test_min_lr", self.lr_range_test_min_lr)

    def rates(self, iteration: int) -> list[float]:
        done, size = iteration + 1, self.lr_range_test_step_size
        interval = done // size if self.lr_range_test_staircase else done / size
        return [low * (1 + self.lr_range_test_step_rate * interval) for low in self.min_lrs]


@dataclass(eq=False)
class OneCycle(Schedule):
    """One ramp up and down, then decay (Smith 2018, "A disciplined approach", section 4).

    Groups with ``betas`` get ``(momentum, 0.99)``, the momentum moving against the rate.

    Args:
        cycle_min_lr: rate at both ends of the cycle, one for all groups or one for each.
        cycle_max_lr: rate at its peak.
        decay_lr_rate: after the cycle, divide by ``1 + rate * (updates / decay_step_size)``.
        cycle_first_step_size: updates of the ramp up.
        cycle_second_step_size: updates of the ramp down; as many as up by default, 0 for none.
        cycle_first_stair_count: stairs of the ramp up; 0 for a smooth one.
        cycle_second_stair_count: stairs of the ramp down; as many as up by default.
        decay_step_size: unit of the decay, in updates; 0 keeps the end of the cycle for ever.
        cycle_momentum: move the momentum, too.
        cycle_min_mom: momentum at the peak of the rate, one for all groups or one for each.
        cycle_max_mom: momentum at both ends of the cycle, likewise.
        decay_mom_rate: growth of the momentum after the cycle, as ``decay_lr_rate``.

    Attributes:
        step_ratio: the share of the cycle that is the ramp up.
    """

    cycle_min_lr: PerGroup
    cycle_max_lr: PerGroup
    decay_lr_rate: float = 0.0
    cycle_first_step_size: int = 2000
    cycle_second_step_size: int | None = None
    cycle_first_stair_count: int = 0
    cycle_second_stair_count: int | None = None
    decay_step_size: int = 0
    cycle_momentum: bool = True
    cycle_min_mom: PerGroup = 0.8
    cycle_max_mom: PerGroup = 0.9
    decay_mom_rate: float = 0.0

    def _prepare(self) -> None:
        self._up, down = self.cycle_first_step_size, self.cycle_second_step_size
        self._down = self._up if down is None else down
        _whole(cycle_first_step_size=self._up, cycle_second_step_size=self._down or 1)
        self.step_ratio = self._up / (self._up + self._down)
        stairs = self.cycle_second_stair_count
        self._down_stairs = self.cycle_first_stair_count if stairs is None else stairs
        self.min_lrs = self._per_group("cycle_min_lr", self.cycle_min_lr)
        self.max_lrs = self._per_group("cycle_max_lr", self.cycle_max_lr)
        self.min_moms = self._per_group("cycle_min_mom", self.cycle_min_mom)
        self.max_moms = self._per_group("cycle_max_mom", self.cycle_max_mom)

    def rates(self, iteration: int) -> list[float]:
        height = self._height(iteration)
        decay = 1 + self.decay_lr_rate * self._decay_intervals(iteration)
        pairs = zip(self.min_lrs, self.max_lrs, strict=True)
        return [between(low, high, height) / decay for low, high in pairs]

    def momenta(self, iteration: int) -> list[float]:
        """Momentum of each group at ``iteration`` (from -1)."""
        growth = 1 + self.decay_mom_rate * self._decay_intervals(iteration)
        height = self._height(iteration)
        pairs = zip(self.min_moms, self.max_moms, strict=True)
        return [between(high, low, height) * growth for low, high in pairs]

    def get_mom(self) -> list[tuple[float, float]]:
        """Betas of the present iteration, as the groups get them."""
        return [(momentum, _BETA2) for momentum in self.momenta(self.last_batch_iteration)]

    def _apply(self) -> None:
        super()._apply()
        for group, betas in zip(self._groups, self.get_mom(), strict=True):
            if self.cycle_momentum and "betas" in group:
                group["betas"] = betas

    def _height(self, iteration: int) -> float:
        """Where on the ramps, from 0 (both ends) to 1 (the peak)."""
        done = iteration + 1
        if done <= self._up:
            return _on_stairs(done, self._up, self.cycle_first_stair_count)
        left = max(self._up + self._down - done, 0)
        return 1 - _on_stairs(self._down - left, self._down, self._down_stairs) if left else 0.0

    def _decay_intervals(self, iteration: int) -> float:
        after = max(iteration + 1 - self._up - self._down, 0)
        return after / self.decay_step_size if self.decay_step_size > 0 else 0.0


@dataclass(eq=False)
class WarmupLR(Schedule):
    """Raise the rate to its maximum, then keep it.

    Args:
        warmup_min_lr: first rate, one for all groups or one for each.
        warmup_max_lr: rate after warm-up; each group's own by default.
        warmup_num_steps: updates of the warm-up, at least 2.
        warmup_type: ``"log"`` or ``"linear"`` growth; anything else is ``"log"``, with a warning.
    """

    warmup_min_lr: PerGroup = 0.0
    warmup_max_lr: PerGroup | None = None
    warmup_num_steps: int = 1000
    warmup_type: Warmup = "log"

    def _prepare(self) -> None:
        highest = self._base if self.warmup_max_lr is None else self.warmup_max_lr
        self.min_lrs = self._per_group("warmup_min_lr", self.warmup_min_lr)
        self.max_lrs = self._per_group("warmup_max_lr", highest)
        _check_warmup(self)

    def rates(self, iteration: int) -> list[float]:
        share = self._share(max(iteration, 0))
        pairs = zip(self.min_lrs, self.max_lrs, strict=True)
        return [between(low, high, share) for low, high in pairs]

    def _share(self, iteration: int) -> float:
        return warmup_share(iteration, self.warmup_num_steps, self.warmup_type)


@dataclass(eq=False)
class WarmupDecayLR(WarmupLR):
    """:class:`WarmupLR`, then a straight line down to ``warmup_min_lr``.

    Args:
        total_num_steps: updates of the whole training, at whose end the line ends.
    """

    total_num_steps: int = field(kw_only=True)

    def _prepare(self) -> None:
        super()._prepare()
        _check_total(self.total_num_steps, self.warmup_num_steps)

    def _share(self, iteration: int) -> float:
        warmup = max(2, self.warmup_num_steps)
        if iteration < warmup:
            return super()._share(iteration)
        return max(0.0, (self.total_num_steps - iteration) / max(1, self.total_num_steps - warmup))


@dataclass(eq=False)
class WarmupCosineLR(Schedule):
    """Warm-up, then half a cosine, both as a ratio of each group's own rate.

    Args:
        total_num_steps: updates of the whole training.
        warmup_min_ratio: first ratio.
        warmup_num_steps: updates of the warm-up, at least 2.
        cos_min_ratio: last ratio.
        warmup_type: ``"log"`` or ``"linear"`` growth; anything else is ``"log"``, with a warning.
    """

    total_num_steps: int
    warmup_min_ratio: float = 0.0
    warmup_num_steps: int = 1000
    cos_min_ratio: float = 1e-4
    warmup_type: Warmup = "log"

    def _prepare(self) -> None:
        _check_warmup(self)
        _check_total(self.total_num_steps, self.warmup_num_steps)

    def rates(self, iteration: int) -> list[float]:
        ratio = self._ratio(max(iteration, 0))
        return [base * ratio for base in self._base]

    def get_lr_ratio(self) -> float:
        """By what each group's own rate is multiplied at the present iteration."""
        return self._ratio(max(self.last_batch_iteration, 0))

    def _ratio(self, iteration: int) -> float:
        warmup = max(2, self.warmup_num_steps)
        first, last = self.warmup_min_ratio, self.cos_min_ratio
        if iteration < warmup:
            return between(first, 1.0, warmup_share(iteration, warmup, self.warmup_type))
        progress = min((iteration - warmup + 1) / max(1, self.total_num_steps - warmup), 1.0)
        return between(last, 1.0, (1 + math.cos(math.pi * progress)) / 2)


def warmup_share(iteration: int, steps: int, kind: Warmup) -> float:
    """How far a warm-up of ``steps`` (at least 2) is at ``iteration`` (from 0), from 0 to 1."""
    steps = max(2, steps)
    if iteration >= steps:
        return 1.0
    return math.log(iteration + 1) / math.log(steps) if kind == "log" else iteration / steps


def between(low: float, high: float, share: float) -> float:
    """From exactly ``low`` at share 0 to exactly ``high`` at share 1."""
    return low * (1 - share) + high * share


def _on_stairs(done: int, steps: int, stairs: int) -> float:
    """How far ``done`` of ``steps`` is, from 0 to 1, on so many stairs; on a ramp if 0.

    Counted before it is divided: a rounded share lies below a border as often as on it.
    """
    return done * stairs // steps / stairs if stairs else done / steps


def _positive(**values: float) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _whole(**values: float) -> None:
    _positive(**values)
    for name, value in values.items():
        if value != int(value):
            raise ValueError(f"{name} must be a whole number, got {value}")


def _check_warmup(schedule: WarmupLR | WarmupCosineLR) -> None:
    steps: object = schedule.warmup_num_steps
    if not isinstance(steps, (int, float)) or steps < 0:
        raise ValueError(f"warmup_num_steps must be at least 0, got {steps!r}")
    if schedule.warmup_type not in ("log", "linear"):
        logger.warning("warmup_type %r is unknown; 'log' is taken", schedule.warmup_type)
        schedule.warmup_type = "log"


def _check_total(total: int, warmup: int) -> None:
    _positive(total_num_steps=total)
    if total < warmup:
        logger.warning("total_num_steps %d ends before warmup_num_steps %d", total, warmup)

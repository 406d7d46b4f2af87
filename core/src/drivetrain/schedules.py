"""Learning rates (and momenta) as functions of the number of updates."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch.optim import Optimizer

logger = logging.getLogger(__name__)

PerGroup = float | Sequence[float]
"""One number for all groups, or one for each."""

Warmup = Literal["log", "linear"]

_BETA2 = 0.99
"""Second beta that :class:`OneCycle` writes beside the momentum."""


class Schedule(ABC):
    """A function of the iteration; the first update has the values of iteration -1.

    The engine calls :meth:`step` after every update that was applied, so skipped ones (loss scale)
    do not count.

    Args:
        optimizer: its groups' learning rates are written, now and at every step.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.last_batch_iteration = -1
        self._base = [group.setdefault("initial_lr", group["lr"]) for group in self._groups]

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
        self.last_batch_iteration = int(state_dict["last_batch_iteration"])
        self._apply()

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

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


class LRRangeTest(Schedule):
    """Raise the rate step by step to find its useful range (Smith 2017, section 3.3).

    Args:
        lr_range_test_min_lr: first rate, one for all groups or one for each.
        lr_range_test_step_size: updates per interval.
        lr_range_test_step_rate: growth per interval, as a multiple of the first rate.
        lr_range_test_staircase: grow at the end of intervals only.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_range_test_min_lr: PerGroup = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
    ) -> None:
        super().__init__(optimizer)
        _positive(lr_range_test_step_size=lr_range_test_step_size)
        self._min = self._per_group("lr_range_test_min_lr", lr_range_test_min_lr)
        self._size = lr_range_test_step_size
        self._rate = lr_range_test_step_rate
        self._staircase = lr_range_test_staircase
        self._apply()

    def rates(self, iteration: int) -> list[float]:
        interval = (iteration + 1) / self._size
        interval = math.floor(interval) if self._staircase else interval
        return [low * (1 + self._rate * interval) for low in self._min]


class OneCycle(Schedule):
    """One ramp up and down, then decay (Smith 2018, "A disciplined approach", section 4).

    Groups with ``betas`` get ``(momentum, 0.99)``, the momentum moving against the rate.

    Args:
        cycle_min_lr: rate at both ends of the cycle, one for all groups or one for each.
        cycle_max_lr: rate at its peak.
        decay_lr_rate: after the cycle, divide by ``1 + rate * (updates / decay_step_size)``.
        cycle_first_step_size: updates of the ramp up.
        cycle_second_step_size: updates of the ramp down; as many as up by default.
        cycle_first_stair_count: stairs of the ramp up; 0 for a smooth one.
        cycle_second_stair_count: stairs of the ramp down; as many as up by default.
        decay_step_size: unit of the decay, in updates; 0 keeps the end of the cycle for ever.
        cycle_momentum: move the momentum, too.
        cycle_min_mom: momentum at the peak of the rate.
        cycle_max_mom: momentum at both ends of the cycle.
        decay_mom_rate: growth of the momentum after the cycle, as ``decay_lr_rate``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        cycle_min_lr: PerGroup,
        cycle_max_lr: PerGroup,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float = 0.8,
        cycle_max_mom: float = 0.9,
        decay_mom_rate: float = 0.0,
    ) -> None:
        super().__init__(optimizer)
        down = cycle_first_step_size if cycle_second_step_size is None else cycle_second_step_size
        _positive(cycle_first_step_size=cycle_first_step_size, cycle_second_step_size=down)
        self._min = self._per_group("cycle_min_lr", cycle_min_lr)
        self._max = self._per_group("cycle_max_lr", cycle_max_lr)
        self._lengths = (cycle_first_step_size, down)
        second = cycle_second_stair_count
        self._stairs = (
            cycle_first_stair_count,
            cycle_first_stair_count if second is None else second,
        )
        self._decay_step = decay_step_size
        self._decay_lr = decay_lr_rate
        self._decay_mom = decay_mom_rate
        self._momenta = (cycle_min_mom, cycle_max_mom) if cycle_momentum else None
        self._apply()

    def rates(self, iteration: int) -> list[float]:
        height, decay = self._height(iteration), 1 + self._decay_lr * self._intervals(iteration)
        return [
            (low + (high - low) * height) / decay
            for low, high in zip(self._min, self._max, strict=True)
        ]

    def momentum(self, iteration: int) -> float | None:
        """Momentum at ``iteration``, or ``None`` when it is left alone."""
        if self._momenta is None:
            return None
        low, high = self._momenta
        growth = 1 + self._decay_mom * self._intervals(iteration)
        return (high - (high - low) * self._height(iteration)) * growth

    def get_mom(self) -> float | None:
        """Momentum of the present iteration."""
        return self.momentum(self.last_batch_iteration)

    def _apply(self) -> None:
        super()._apply()
        momentum = self.get_mom()
        for group in self._groups:
            if momentum is not None and "betas" in group:
                group["betas"] = (momentum, _BETA2)

    def _height(self, iteration: int) -> float:
        """Where on the ramps, from 0 (both ends) to 1 (the peak)."""
        up, down = self._lengths
        done = iteration + 1
        if done <= up:
            return _on_stairs(done / up, self._stairs[0])
        return 1 - _on_stairs(min((done - up) / down, 1.0), self._stairs[1])

    def _intervals(self, iteration: int) -> float:
        """Decay steps since the end of the cycle."""
        after = iteration + 1 - sum(self._lengths)
        return after / self._decay_step if after > 0 and self._decay_step > 0 else 0.0


class WarmupLR(Schedule):
    """Raise the rate to its maximum, then keep it.

    Args:
        warmup_min_lr: first rate, one for all groups or one for each.
        warmup_max_lr: rate after warm-up; each group's own by default.
        warmup_num_steps: updates of the warm-up, at least 2.
        warmup_type: ``"log"`` or ``"linear"`` growth.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: Warmup = "log",
    ) -> None:
        super().__init__(optimizer)
        highest = [float(rate) for rate in self._base] if warmup_max_lr is None else warmup_max_lr
        self._min = self._per_group("warmup_min_lr", warmup_min_lr)
        self._max = self._per_group("warmup_max_lr", highest)
        self._warmup = _checked_warmup(warmup_num_steps, warmup_type)
        self._type = warmup_type
        self._apply()

    def rates(self, iteration: int) -> list[float]:
        share = self._share(max(iteration, 0))
        return [low + (high - low) * share for low, high in zip(self._min, self._max, strict=True)]

    def _share(self, iteration: int) -> float:
        return warmup_share(iteration, self._warmup, self._type)


class WarmupDecayLR(WarmupLR):
    """:class:`WarmupLR`, then a straight line down to ``warmup_min_lr`` at ``total_num_steps``.

    Args:
        total_num_steps: updates of the whole training; other arguments as for :class:`WarmupLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: Warmup = "log",
    ) -> None:
        self._total = _checked_total(total_num_steps, warmup_num_steps)
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type)

    def _share(self, iteration: int) -> float:
        if iteration < self._warmup:
            return super()._share(iteration)
        return max(0.0, (self._total - iteration) / max(1, self._total - self._warmup))


class WarmupCosineLR(Schedule):
    """Warm-up, then half a cosine, both as a ratio of each group's own rate.

    Args:
        total_num_steps: updates of the whole training.
        warmup_min_ratio: first ratio.
        warmup_num_steps: updates of the warm-up, at least 2.
        cos_min_ratio: last ratio.
        warmup_type: ``"log"`` or ``"linear"`` growth.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 1e-4,
        warmup_type: Warmup = "log",
    ) -> None:
        super().__init__(optimizer)
        self._total = _checked_total(total_num_steps, warmup_num_steps)
        self._warmup = _checked_warmup(warmup_num_steps, warmup_type)
        self._type = warmup_type
        self._ends = (warmup_min_ratio, cos_min_ratio)
        self._apply()

    def rates(self, iteration: int) -> list[float]:
        return [float(base) * self._ratio(max(iteration, 0)) for base in self._base]

    def _ratio(self, iteration: int) -> float:
        first, last = self._ends
        if iteration < self._warmup:
            return first + (1 - first) * warmup_share(iteration, self._warmup, self._type)
        left = max(1, self._total - self._warmup)
        progress = min((iteration - self._warmup + 1) / left, 1.0)
        return last + (1 - last) * (1 + math.cos(math.pi * progress)) / 2


def warmup_share(iteration: int, steps: int, kind: Warmup) -> float:
    """How far a warm-up of ``steps`` is at ``iteration`` (from 0), from 0 to 1."""
    if iteration >= steps:
        return 1.0
    return math.log(iteration + 1) / math.log(steps) if kind == "log" else iteration / steps


def _on_stairs(share: float, stairs: int) -> float:
    return math.floor(share * stairs) / stairs if stairs else share


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _checked_warmup(steps: int, kind: str) -> int:
    if kind not in get_args(Warmup):
        raise ValueError(f"warmup_type must be 'log' or 'linear', got {kind!r}")
    return max(2, steps)


def _checked_total(total: int, warmup: int) -> int:
    _positive(total_num_steps=total)
    if total < warmup:
        logger.warning("total_num_steps %d ends before warmup_num_steps %d", total, warmup)
    return total

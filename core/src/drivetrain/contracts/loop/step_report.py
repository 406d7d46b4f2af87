"""What one optimizer step did; values are computed when they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MIB = 2**20


@dataclass(frozen=True)
class StepReport:
    """Facts about one optimizer step, the same on every rank except times and memory.

    Args:
        step: number of this step, from 1 (skipped steps count).
        applied: whether the update was applied; false after an overflow.
        samples: global samples seen so far.
        step_samples: global samples of this step.
        step_tokens: global tokens of this step, 0 where the inputs do not tell.
        learning_rates: one per group, as used in this step.
        loss_scale: current loss scale, 1.0 without scaling.
        seconds: wall-clock time since the previous step ended.
        times: seconds of this step by span: ``"data"``, ``"forward"``, ``"backward"``,
            ``"communication wait"``, ``"step"``, and whatever plugins time.
        memory: returns (bytes of tensors now, peak bytes) on this rank's device.
    """

    step: int
    applied: bool
    samples: int
    step_samples: int
    step_tokens: int
    learning_rates: tuple[float, ...]
    loss_scale: float
    seconds: float
    times: Mapping[str, float]
    memory: Callable[[], tuple[int, int]] = field(repr=False)
    loss_sum: torch.Tensor | None = field(repr=False, default=None)
    loss_count: float | torch.Tensor = 0
    norm: torch.Tensor | None = field(repr=False, default=None)
    collected: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(
        repr=False, default_factory=dict
    )

    @cached_property
    def loss(self) -> float | None:
        """The loss whose gradient this step used: the mean, by weights if there are any, over
        micro-batches and the axis ``data``; ``None`` if no loss was given. Where neither the step
        is printed nor a plugin looks at steps, it is this rank's mean.
        """
        count = float(self.loss_count)
        return None if self.loss_sum is None or not count else float(self.loss_sum) / count

    @cached_property
    def gradient_norm(self) -> float | None:
        """Global L2 norm before clipping; ``None`` when it was not computed."""
        return None if self.norm is None else float(self.norm)

    @cached_property
    def values(self) -> Mapping[str, float | list[float]]:
        """Values that layers have added (``job.values``): means over micro-batches and ``data``.

        Where neither the step is printed nor a plugin looks at steps, those of this rank. A name
        to which nothing was added in this step is left out.
        """
        found: dict[str, float | list[float]] = {}
        for name, (total, times) in self.collected.items():
            if float(times):
                mean = (total / times).tolist()
                found[name] = mean if len(mean) > 1 else mean[0]
        return found

    @property
    def samples_per_second(self) -> float:
        """Global samples of this step by its wall-clock time."""
        return self.step_samples / self.seconds if self.seconds > 0 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Global tokens of this step by its wall-clock time."""
        return self.step_tokens / self.seconds if self.seconds > 0 else 0.0

    def line(self, *, breakdown: bool = False, memory: bool = False) -> str:
        """One line for a log.

        Args:
            breakdown: append the time split.
            memory: append memory in use.
        """
        parts = [f"step {self.step}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        parts.append("lr " + ",".join(f"{rate:.3e}" for rate in self.learning_rates))
        if self.gradient_norm is not None:
            parts.append(f"norm {self.gradient_norm:.3f}")
        if self.loss_scale != 1.0:
            parts.append(f"loss scale {self.loss_scale:g}")
        if not self.applied:
            parts.append("SKIPPED (gradients not finite)")
        parts.append(f"{self.samples_per_second:.1f} samples/s")
        if self.step_tokens:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if memory:
            now, peak = self.memory()
            parts.append(f"memory {now / MIB:,.0f} MiB, peak {peak / MIB:,.0f} MiB")
        if breakdown:
            split = ", ".join(f"{name} {1e3 * t:.1f} ms" for name, t in self.times.items())
            parts.append(split)
        return " | ".join(parts)

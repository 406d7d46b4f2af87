"""The gradient noise scale: McCandlish et al. 2018, https://arxiv.org/abs/1812.06162, section A.1.

A gradient of b samples has E|g_b|^2 = |G|^2 + S / b. Two batch sizes, a rank's own and that of the
whole step, give both unknowns; S / |G|^2 is the noise scale, in samples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar
from weakref import WeakKeyDictionary

from pydantic import Field

from drivetrain.contracts import Conflict, Float, Plugin, Section, Sections, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import nn

    from drivetrain.contracts import GradientWatch, StateReader, StateWriter, StepReport
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job

PATH = "gradient_noise_scale"


class NoiseScaleSection(Section):
    """Measure the gradient noise scale."""

    decay: Annotated[Float, Field(ge=0, lt=1)] = Field(
        default=0.99, description="The share of the running averages that a step keeps."
    )


class NoiseScale(Plugin):
    """Owns ``gradient_noise_scale``."""

    name = PATH
    sections: ClassVar[Sections] = {PATH: NoiseScaleSection}

    @hookimpl
    def watch_gradients(self, job: Job) -> Sequence[GradientWatch]:
        return [_estimates.setdefault(job, Estimate()).see]

    @hookimpl
    def step_end(self, engine: Engine, report: StepReport) -> None:
        engine.get_global_grad_norm()  # whoever asks once has it computed from then on
        decay = self.section(NoiseScaleSection).decay
        _estimates[engine.job].end_step(engine, report.gradient_norm, decay)

    @hookimpl
    def save_state(self, engine: Engine, writer: StateWriter) -> None:
        estimate = _estimates[engine.job]
        writer.put(f"{PATH}/averages", [estimate.signal, estimate.noise, estimate.weight])

    @hookimpl
    def load_state(self, engine: Engine, reader: StateReader) -> None:
        estimate = _estimates[engine.job]
        averages = reader.get(f"{PATH}/averages", [0.0, 0.0, 0.0])
        estimate.signal, estimate.noise, estimate.weight = averages

    def features(self) -> Mapping[str, object]:
        return {PATH: True}

    def conflicts(self) -> Sequence[Conflict]:
        reason = "gradients are scaled by a loss scale that changes between steps"
        return [Conflict(PATH, None, "fp16.enabled", True, reason)]


class Estimate:
    """Running averages of one job."""

    def __init__(self) -> None:
        self.signal = self.noise = self.weight = 0.0
        self._squares: torch.Tensor | float = 0.0
        self._seen: dict[nn.Parameter, int] = defaultdict(int)

    def see(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Add up what this rank is about to send; asks the device for nothing."""
        import torch

        self._squares = self._squares + torch.linalg.vector_norm(gradient, dtype=torch.float32) ** 2
        self._seen[parameter] += 1

    def end_step(self, engine: Engine, norm: float | None, decay: float) -> None:
        """Compare each rank's gradients with that of the step. Collective."""
        import torch

        from drivetrain.contracts import Purpose, Tag

        squares, sent = self._squares, max(self._seen.values(), default=0)
        self._squares = 0.0
        self._seen.clear()
        if norm is None or not sent:
            return
        total = torch.as_tensor(squares, dtype=torch.float32, device=engine.device).clone()
        engine.job.communicator.all_reduce(total, "data", Tag(Purpose.CONTROL, site=PATH))
        shards = engine.job.mesh.size("data")
        # Each of them sums that many micro-batches.
        micro_batches = engine.gradient_accumulation_steps() / sent
        large = engine.train_batch_size()
        small = engine.train_micro_batch_size_per_gpu() * micro_batches
        if small >= large:
            return
        square = float(total) / (shards * sent) / micro_batches**2
        signal = (large * norm**2 - small * square) / (large - small)
        noise = (square - norm**2) / (1 / small - 1 / large)
        self.signal = decay * self.signal + (1 - decay) * signal
        self.noise = decay * self.noise + (1 - decay) * noise
        self.weight = decay * self.weight + (1 - decay)


_estimates: WeakKeyDictionary[Job, Estimate] = WeakKeyDictionary()


def gradient_noise_scale(engine: Engine) -> float | None:
    """The latest estimate in samples; ``None`` while there is none, or no signal in the noise."""
    estimate = _estimates.get(engine.job)
    if estimate is None or estimate.signal <= 0:
        return None
    return estimate.noise / estimate.signal

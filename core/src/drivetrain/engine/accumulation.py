"""Which micro-batches make one update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from drivetrain.errors import ConfigError, TrainingError
from drivetrain.sections.batch import ManagedAccumulation

if TYPE_CHECKING:
    from drivetrain.contracts.loop.batch import Batch
    from drivetrain.job.progress import Progress
    from drivetrain.optimization.facade import EngineOptimizer
    from drivetrain.plan.plan import Plan


class Accumulation:
    """The length of an engine's accumulation windows, which may change at any time.

    Args:
        plan: the batch to begin with, and whether the engine counts micro-batches.
        progress: counts the micro-batches of the window under way.

    Attributes:
        boundary: whether the window ends with this micro-batch, set by hand; ``None`` to count.
        managed: whether the engine counts micro-batches; otherwise every step is a boundary.
    """

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self.boundary: bool | None = None
        self.managed = plan.section(ManagedAccumulation).root
        self._progress = progress
        self._batch = plan.batch

    @property
    def batch(self) -> Batch:
        """The batch triple as it is now.

        Raises:
            ConfigError: the job was opened without one.
        """
        if self._batch is None:
            raise ConfigError("this job was opened without a batch size")
        return self._batch

    @property
    def counted_steps(self) -> int:
        """Micro-batches that the engine counts to an update."""
        return self.batch.accumulation_steps if self.managed else 1

    @property
    def window_steps(self) -> int:
        """Micro-batches whose mean the window under way makes.

        One that had more of them than it should when that was changed ends as the mean of all.
        """
        if not self.managed or self.boundary is not None:
            return self.counted_steps
        return max(self.counted_steps, self._progress.in_window + 1)

    @property
    def window_samples(self) -> int:
        """Samples of the window under way, over all data shards; 0 without a batch size."""
        if self._batch is None:
            return 0
        steps = self.window_steps if self.managed else self._batch.accumulation_steps
        return self._batch.micro_batch_size * self._batch.data_shards * steps

    def is_boundary(self) -> bool:
        """Whether the micro-batch under way is the last before an update."""
        if not self.managed:
            return True
        if self.boundary is not None:
            return self.boundary
        return self._progress.in_window + 1 >= self.counted_steps

    def completes(self) -> bool:
        """Whether gradients that arrive now are the window's last, as far as the engine counts."""
        return self.managed and (self._batch is None or self.is_boundary())

    def set_boundary(self, is_boundary: bool | None) -> None:
        """Decide the boundary by hand from now on; ``None`` returns to counting.

        Raises:
            TrainingError: the engine does not count.
        """
        if not self.managed:
            raise TrainingError(
                "the boundary cannot be set with managed_gradient_accumulation false: "
                "there every step() is one"
            )
        self.boundary = is_boundary

    def set_train_batch_size(self, size: int) -> None:
        """Change the global batch by changing the accumulation steps.

        Raises:
            ConfigError: it is no multiple of the micro-batch times the data shards.
        """
        batch = self.batch
        share = batch.micro_batch_size * batch.data_shards
        if size <= 0 or size % share:
            raise ConfigError(
                f"train_batch_size {size} is not a multiple of {share} = "
                f"{batch.micro_batch_size} (micro-batch) x {batch.data_shards} (data shards)"
            )
        self._batch = replace(batch, train_batch_size=size, accumulation_steps=size // share)

    def set_micro_batch_size(self, size: int) -> None:
        """Change the micro-batch, and the global batch with it.

        Raises:
            ConfigError: it is not positive.
        """
        if size <= 0:
            raise ConfigError(f"the micro-batch must have samples, got {size}")
        batch = self.batch
        total = size * batch.accumulation_steps * batch.data_shards
        self._batch = replace(batch, micro_batch_size=size, train_batch_size=total)


class EngineSettings:
    """What an engine shows of its batch, windows and progress, and of how it updates."""

    progress: Progress
    optimizer: EngineOptimizer | None
    _clipping: float
    _reducing: bool
    _accumulation: Accumulation

    @property
    def batch(self) -> Batch:
        """The batch triple as it is now."""
        return self._accumulation.batch

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro-batch under way is the last before an update."""
        return self._accumulation.is_boundary()

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Decide the boundary by hand from now on; ``None`` returns to counting."""
        self._accumulation.set_boundary(is_boundary)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Only accumulate locally in backward passes inside the block; ``step`` is illegal."""
        if not self._reducing:
            raise TrainingError("no_sync() cannot be nested")
        self._reducing = False
        try:
            yield
        finally:
            self._reducing = True

    def train_batch_size(self) -> int:
        """Samples of one step over all data shards."""
        return self.batch.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples of one forward on one data shard."""
        return self.batch.micro_batch_size

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches between two updates."""
        return self.batch.accumulation_steps

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the global batch by changing the accumulation steps, at once.

        A window that holds as many micro-batches already ends with the next, as their mean.

        Raises:
            ConfigError: it is no multiple of the micro-batch times the data shards.
        """
        self._accumulation.set_train_batch_size(train_batch_size)

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the micro-batch, and the global batch with it; loaders stay as they are.

        Raises:
            ConfigError: it is not positive.
        """
        self._accumulation.set_micro_batch_size(micro_batch_size)

    @property
    def global_steps(self) -> int:
        """Boundaries passed, skipped ones included."""
        return self.progress.steps

    @property
    def micro_steps(self) -> int:
        """Micro-batches ended."""
        return self.progress.micro_steps

    @property
    def global_samples(self) -> int:
        """Samples seen by all data shards."""
        return self.progress.samples

    @property
    def skipped_steps(self) -> int:
        """Boundaries without an update."""
        return self.progress.skipped_steps

    def gradient_clipping(self) -> float:
        """Largest global gradient norm; 0 when gradients are not clipped."""
        return self._clipping

    def get_lr(self) -> list[float]:
        """Learning rate of every group."""
        return [group.get("lr", float("nan")) for group in self._groups()]

    def get_mom(self) -> list[Any]:
        """Momentum (SGD-like) or betas (Adam-like) of every group."""
        return [group.get("momentum", group.get("betas")) for group in self._groups()]

    def get_type(self) -> str | None:
        """``optimizer.type`` as the config gives it."""
        return None if self.optimizer is None else self.optimizer.type_name

    def _groups(self) -> Iterable[dict[str, Any]]:
        return () if self.optimizer is None else self.optimizer.param_groups

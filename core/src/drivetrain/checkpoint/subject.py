"""What a checkpoint is taken of, as far as saving and loading know it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from drivetrain.contracts.state.model_states import ModelStates
    from drivetrain.job.job import Job
    from drivetrain.job.progress import Progress
    from drivetrain.optimization.facade import EngineOptimizer
    from drivetrain.precision.loss_scale import LossScaler


class Subject(Protocol):
    """An engine: one that trains, or one without an optimizer that only takes the weights.

    Attributes:
        job: mesh, communicator, hooks and random streams.
        module: its buffers are saved, and the names of its parameters.
        states: parameters, masters and optimizer states, as fragments.
        optimizer: its groups are saved; ``None`` where nothing is trained.
        lr_scheduler: has ``state_dict`` and ``load_state_dict``, or is ``None``.
        loss_scaler: the loss scale.
        progress: counters of steps, samples and tokens.
        training_dataloader: a loader with a position, or ``None``.
    """

    job: Job
    module: nn.Module
    states: ModelStates
    optimizer: EngineOptimizer | None
    lr_scheduler: Any | None
    loss_scaler: LossScaler
    progress: Progress
    training_dataloader: Any | None

    @property
    def device(self) -> torch.device:
        """The device that the module computes on."""

    @property
    def global_steps(self) -> int:
        """Boundaries passed."""

    @property
    def micro_steps(self) -> int:
        """Micro-batches ended."""

    def drop_window(self) -> None:
        """Begin a window: forget gradients, losses and tokens since the last boundary."""

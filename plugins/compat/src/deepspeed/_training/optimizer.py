"""The engine's optimizer with the attributes that scripts and frameworks read of DeepSpeed's."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from drivetrain.optimization.facade import EngineOptimizer

if TYPE_CHECKING:
    import torch

    from deepspeed._training.engine import DeepSpeedEngine


class DeepSpeedOptimizer(EngineOptimizer):
    """See :class:`drivetrain.optimization.facade.EngineOptimizer`."""

    _engine: weakref.ref[DeepSpeedEngine]

    def belong_to(self, engine: DeepSpeedEngine) -> None:
        """Tell whose optimizer this is."""
        self._engine = weakref.ref(engine)

    @property
    def engine(self) -> DeepSpeedEngine:
        """Whose optimizer this is."""
        engine = self._engine()
        assert engine is not None, "an optimizer lives no longer than its engine"
        return engine

    @property
    def overflow(self) -> bool:
        """Whether the latest boundary skipped its update because gradients were not finite."""
        return self.engine.overflowed()

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by now."""
        return self.engine.loss_scaler.scale_value

    cur_scale = loss_scale

    @property
    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale follows overflows."""
        return self.engine.loss_scaler.dynamic

    @property
    def optimizer(self) -> DeepSpeedOptimizer:
        """This object: there is no other one inside."""
        return self

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """See ``engine.backward``."""
        self.engine.backward(loss, **kwargs)

"""The engine's optimizer with the attributes that scripts and frameworks read of DeepSpeed's."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from drivetrain.optimization.facade import EngineOptimizer

if TYPE_CHECKING:
    import torch

    from deepspeed._training.engine import DeepSpeedEngine


class ParameterOffload:
    """Hooks that gather parameters, of which there are none to take away or to put back.

    Those of the engine may stay while parameters are gathered: they gather nothing twice.

    Attributes:
        module: has no parameters.
        forward_hooks: empty.
        backward_hooks: empty.
    """

    class _NoModule(nn.Module):
        def ds_external_parameters(self) -> tuple[tuple[str, nn.Parameter], ...]:
            return ()

    def __init__(self) -> None:
        self.module = self._NoModule()
        self.forward_hooks: list[Any] = []
        self.backward_hooks: list[Any] = []

    def _register_deepspeed_module(self, module: nn.Module) -> None:
        """Put nothing back."""


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

    @property
    def parameter_offload(self) -> ParameterOffload:
        """Whose hooks frameworks take away while they generate from gathered parameters."""
        return ParameterOffload()

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """See ``engine.backward``."""
        self.engine.backward(loss, **kwargs)

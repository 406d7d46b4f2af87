"""The engine's optimizer with the attributes that scripts and frameworks read of DeepSpeed's."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drivetrain.optimization.facade import EngineOptimizer

if TYPE_CHECKING:
    from deepspeed._training.engine import DeepSpeedEngine
    from drivetrain.contracts import Fragment


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


class LossScale:
    """The loss scale of an engine under the names of DeepSpeed's scalers; follows it.

    Args:
        engine: whose.
    """

    scale_factor = 2.0

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine

    @property
    def cur_scale(self) -> float:
        """What losses are multiplied by now."""
        return self._engine.loss_scaler.scale_value

    loss_scale = cur_scale

    @property
    def dynamic(self) -> bool:
        """Whether the scale follows overflows."""
        return self._engine.loss_scaler.dynamic

    dynamic_loss_scale = dynamic

    @property
    def cur_iter(self) -> int:
        """Updates so far, those that were skipped included."""
        return self._engine.global_steps

    @property
    def scale_window(self) -> int:
        """Updates without overflow after which the scale doubles."""
        return int(self._engine._config.fp16_config.loss_scale_window)

    @property
    def min_scale(self) -> float:
        """The scale never falls below it."""
        return float(self._engine._config.fp16_config.min_loss_scale)

    @property
    def delayed_shift(self) -> int:
        """The overflow from which on the scale shrinks, counted from 1."""
        return int(self._engine._config.fp16_config.hysteresis)


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
    def loss_scaler(self) -> LossScale:
        """What losses are multiplied by, and how that changes."""
        return LossScale(self.engine)

    loss_scale_config = loss_scaler

    @property
    def optimizer(self) -> DeepSpeedOptimizer:
        """This object: there is no other one inside."""
        return self

    @property
    def fp32_partitioned_groups_flat(self) -> list[torch.Tensor]:
        """Master weights of this rank, a flat copy for each group; engine.states has the originals.

        Where parameters are their own masters, it is they.
        """
        found: dict[str, list[Fragment]] = {}
        for kind in ("master", "parameter"):
            of_kind = [f for f in self.engine.states.fragments() if f.kind == kind]
            for fragment in [f for f in of_kind if f.name not in found]:
                found.setdefault(fragment.name, []).append(fragment)
        info = self.engine.job.parameters.info
        names = [[info(p).name for p in group["params"]] for group in self.param_groups]
        return [_flat([part for name in group for part in found.get(name, ())]) for group in names]

    single_partition_of_fp32_groups = fp32_groups_flat = fp32_partitioned_groups_flat

    @property
    def parameter_offload(self) -> ParameterOffload:
        """Whose hooks frameworks take away while they generate from gathered parameters."""
        return ParameterOffload()

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """See ``engine.backward``."""
        self.engine.backward(loss, **kwargs)


def _flat(parts: Sequence[Fragment]) -> torch.Tensor:
    """What fragments of this rank hold, one after another; a copy."""
    values = [part.read().detach().flatten() for part in parts]
    return torch.cat(values) if values else torch.empty(0)

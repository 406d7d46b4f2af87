"""muP: learning rates that carry over from a narrow model to a wide one.

Yang et al. 2022, "Tensor Programs V", https://arxiv.org/abs/2203.03466, table 8. Package ``mup``
gives each parameter its ``infshape`` (``mup.set_base_shapes(model, base)``, before the engine is
built), which says how many of its dimensions grow with the width, and by how much they have grown.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drivetrain.contracts import BucketView, Hyper, UpdateRule, WrappedRule
from drivetrain.errors import ConfigError
from drivetrain.optimization.factory import torch_rule

if TYPE_CHECKING:
    from drivetrain.contracts import ParameterInfo

Factors = tuple[float, float]
"""By what the learning rate and the weight decay of a parameter are multiplied."""


class WidthScaled(WrappedRule):
    """Another rule, at rates by the width of each parameter; a base class.

    Args:
        rule: the inner rule.
    """

    def __init__(self, rule: UpdateRule) -> None:
        super().__init__(rule)
        self._factors: Factors = (1.0, 1.0)
        self._scaled: dict[Factors, WidthScaled] = {}

    @abstractmethod
    def factors(self, shape: Any) -> Factors:
        """The factors of a parameter with the infshape ``shape``."""

    def rule_for(self, parameter: nn.Parameter, info: ParameterInfo) -> UpdateRule:
        """The rule with the factors of ``parameter``.

        Raises:
            ConfigError: it has no infshape, or more than two dimensions of it grow.
        """
        shape = getattr(parameter, "infshape", None)
        if shape is None:
            raise ConfigError(
                f"optimizer.type: parameter {info.name} has no infshape; call "
                "mup.set_base_shapes(model, base) before the engine is built"
            )
        if shape.ninf() > 2:
            raise ConfigError(
                f"optimizer.type: {shape.ninf()} dimensions of parameter {info.name} grow with the "
                "width, and muP is defined for two at most"
            )
        factors = self.factors(shape)
        if factors not in self._scaled:
            self._scaled[factors] = copy.copy(self)
            self._scaled[factors]._factors = factors
        return self._scaled[factors]

    def update(self, bucket: BucketView, hyper: Hyper, scale: float | torch.Tensor) -> None:
        rate, decay = self._factors
        own = {"lr": hyper["lr"] * rate, "weight_decay": hyper["weight_decay"] * decay}
        super().update(bucket, {**hyper, **own}, scale)


class MuAdam(WidthScaled):
    """Adam with weight decay in the gradient, for muP.

    The rate of matrices whose fan-in and fan-out grow is divided by how much the fan-in has grown,
    and their weight decay multiplied by it. Biases, norms and what only one dimension of grows
    keep both.

    Args:
        lr: learning rate of the narrow model.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: added to the gradient.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        given = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(torch_rule(self._kind(), given))

    @staticmethod
    def _kind() -> type[torch.optim.Optimizer]:
        return torch.optim.Adam

    def factors(self, shape: Any) -> Factors:
        mult = float(shape.width_mult()) if shape.ninf() == 2 else 1.0
        return 1.0 / mult, mult


class MuAdamW(MuAdam):
    """:class:`MuAdam` with decoupled weight decay.

    Args:
        lr: learning rate of the narrow model.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.

    Raises:
        ValueError: a value is out of range.
    """

    @staticmethod
    def _kind() -> type[torch.optim.Optimizer]:
        return torch.optim.AdamW


class MuSGD(WidthScaled):
    """SGD for muP.

    The rate of what only one dimension of grows is multiplied by how much it has grown; that of
    matrices by how much more their fan-out has grown than their fan-in. Weight decay is divided by
    the same.

    Args:
        lr: learning rate of the narrow model.
        momentum: decay of the velocity.
        dampening: part of the gradient that the velocity leaves out.
        weight_decay: added to the gradient.
        nesterov: look ahead along the velocity.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        given = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(torch_rule(torch.optim.SGD, given))

    def factors(self, shape: Any) -> Factors:
        if shape.ninf() == 1:
            mult = float(shape.width_mult())
            return mult, 1.0 / mult
        ratio = float(shape.fanin_fanout_mult_ratio()) if shape.ninf() == 2 else 1.0
        return 1.0 / ratio, ratio

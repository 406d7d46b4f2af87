"""DeepSpeed's optimizers: torch optimizers that ``initialize`` turns into Drivetrain's rules.

An object of these is a description: the optimizer's type in a config, its parameters, and the
groups. ``initialize`` hands them to the engine, which makes the rule, and builds its states where
they belong. Those that do not communicate also step without an engine, by the same rule, or by
torch's class where that computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from deepspeed._parts.alone import AloneRule

Parameters = Iterable[Any]


class _Named(type):
    """Knows the optimizer of an engine whose config names it, for ``isinstance``."""

    type_name: str
    on_host: bool

    def __instancecheck__(cls, instance: Any) -> bool:
        if super().__instancecheck__(instance):
            return True
        from deepspeed._training.optimizer import DeepSpeedOptimizer

        if not isinstance(instance, DeepSpeedOptimizer) or not hasattr(cls, "type_name"):
            return False
        engine = instance.engine
        name = (engine.optimizer_name() or "").lower()
        if (engine.optimizer_params() or {}).get("torch_adam", False):
            return False
        name = "adam" if name == "adamw" else name
        return cls.type_name.lower() == name and cls.on_host is engine.zero_cpu_offload()


class Described(torch.optim.Optimizer, metaclass=_Named):
    """An optimizer that a config could name.

    Class attributes:
        type_name: ``optimizer.type``.
        on_host: DeepSpeed makes it where optimizer states are offloaded.

    Attributes:
        params: ``optimizer.params``.
    """

    type_name: ClassVar[str]
    on_host: ClassVar[bool] = False
    params: dict[str, Any]

    @cached_property
    def _alone(self) -> AloneRule:
        from deepspeed._parts.alone import AloneRule

        return AloneRule(self.type_name, self.params)

    @cached_property
    def _needs_rule(self) -> bool:
        """Whether :meth:`step` applies the rule, and not torch's class."""
        return True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does it, but states keep the dtypes in which the rule has them."""
        super().load_state_dict(state_dict)
        if not self._needs_rule:
            return
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, own, strict=True):
            if saved := state_dict["state"].get(number):
                self._alone.take_over(parameter, self.state[parameter], saved)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update parameters without an engine, by the rule that an engine would apply."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            hyper = {key: value for key, value in group.items() if key != "params"}
            for parameter in group["params"]:
                self._alone.update(parameter, self.state[parameter], hyper)
        return loss


class FusedAdam(torch.optim.Adam, Described):
    """Adam with decoupled weight decay, unless ``adam_w_mode`` is false.

    Args:
        params: as for ``torch.optim``.
        lr: learning rate.
        bias_correction: divide the moments by ``1 - beta**step``.
        betas: decay of the moments.
        eps: added to the denominator.
        adam_w_mode: decouple weight decay from the gradient.
        weight_decay: its strength.
        amsgrad: must be false.
        set_grad_none: accepted, has no effect: gradients are the engine's.

    Raises:
        ConfigError: ``amsgrad`` is asked for.
    """

    type_name = "Adam"

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        if amsgrad:
            raise ConfigError("amsgrad is not supported; pass a torch.optim.AdamW to initialize")
        super().__init__(params, lr, betas, eps, weight_decay, decoupled_weight_decay=adam_w_mode)
        self.params = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "adam_w_mode": adam_w_mode,
            "bias_correction": bias_correction,
        }

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As ``torch.optim.Adam`` does it, or by the rule where that class cannot."""
        if self._needs_rule:
            return Described.step(self, closure)
        return torch.optim.Adam.step(self, closure)

    @cached_property
    def _needs_rule(self) -> bool:
        parameters = [p for group in self.param_groups for p in group["params"]]
        wide = self.params.get("fp32_optimizer_states", False)
        return not self.params["bias_correction"] or (
            wide and any(p.dtype != torch.float32 for p in parameters)
        )


class DeepSpeedCPUAdam(FusedAdam):
    """Adam whose update runs where its states live: on the host if the config offloads them.

    Args:
        model_params: as for ``torch.optim``.
        lr: learning rate.
        bias_correction: see :class:`FusedAdam`.
        betas: decay of the moments.
        eps: added to the denominator.
        weight_decay: its strength.
        amsgrad: must be false.
        adamw_mode: decouple weight decay from the gradient.
        fp32_optimizer_states: keep the moments in float32 whatever the weights are.
    """

    on_host = True

    def __init__(
        self,
        model_params: Parameters,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        super().__init__(
            model_params, lr, bias_correction, betas, eps, adamw_mode, weight_decay, amsgrad
        )
        self.params["fp32_optimizer_states"] = fp32_optimizer_states


class DeepSpeedCPUAdagrad(torch.optim.Adagrad, Described):
    """Adagrad whose update runs where its states live.

    Args:
        model_params: as for ``torch.optim``.
        lr: learning rate.
        eps: added to the denominator.
        weight_decay: its strength.
        amsgrad: must be false.
        fp32_optimizer_states: accepted; states have the dtype of the master weights.

    Raises:
        ConfigError: ``amsgrad`` is asked for.
    """

    type_name = "Adagrad"

    on_host = True

    def __init__(
        self,
        model_params: Parameters,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
    ) -> None:
        if amsgrad:
            raise ConfigError("Adagrad has no amsgrad; leave it out")
        super().__init__(model_params, lr, weight_decay=weight_decay, eps=eps)
        self.params = {"lr": lr, "eps": eps, "weight_decay": weight_decay}

    @cached_property
    def _needs_rule(self) -> bool:
        return False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As ``torch.optim.Adagrad`` does it, without an engine."""
        return torch.optim.Adagrad.step(self, closure)


class FusedLion(Described):
    """Lion (Chen et al. 2023, arXiv 2302.06675).

    Args:
        params: as for ``torch.optim``.
        lr: learning rate.
        betas: of the update, and of the momentum that is kept.
        weight_decay: decoupled.
        set_grad_none: accepted, has no effect: gradients are the engine's.
    """

    type_name = "Lion"

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        self.params = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay}
        super().__init__(params, dict(self.params))


class DeepSpeedCPULion(FusedLion):
    """Lion whose update runs where its states live.

    Args:
        model_params: as for ``torch.optim``.
        lr: learning rate.
        betas: see :class:`FusedLion`.
        weight_decay: decoupled.
        fp32_optimizer_states: accepted; states have the dtype of the master weights.
    """

    on_host = True

    def __init__(
        self,
        model_params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        fp32_optimizer_states: bool = True,
    ) -> None:
        super().__init__(model_params, lr, betas, weight_decay)


class FusedLamb(Described):
    """Lamb (You et al. 2020, arXiv 1904.00962).

    Args:
        params: as for ``torch.optim``.
        lr: learning rate.
        bias_correction: correct the moments for their zero start.
        betas: decay of the moments.
        eps: added to the denominator.
        eps_inside_sqrt: under the root.
        weight_decay: added to the update.
        max_grad_norm: must be 0; the config's ``gradient_clipping`` clips.
        max_coeff: upper bound of the trust ratio.
        min_coeff: lower bound of the trust ratio.
        amsgrad: must be false.

    Raises:
        ConfigError: ``max_grad_norm`` or ``amsgrad`` is asked for.
    """

    type_name = "Lamb"

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
    ) -> None:
        if max_grad_norm or amsgrad:
            name = "amsgrad" if amsgrad else "max_grad_norm"
            raise ConfigError(f"FusedLamb: {name} is not supported; use gradient_clipping to clip")
        self.params = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": tuple(betas),
            "eps": eps,
            "eps_inside_sqrt": eps_inside_sqrt,
            "weight_decay": weight_decay,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
        }
        super().__init__(params, dict(self.params))

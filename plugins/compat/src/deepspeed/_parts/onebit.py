"""1-bit optimizers: they send gradients themselves, so that only an engine steps them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from deepspeed._parts.optimizers import Described, Parameters
from drivetrain.errors import ConfigError, TrainingError


class Communicating(Described):
    """An optimizer whose update sends gradients itself, so that only an engine steps it."""

    def step(self, closure: Callable[[], Any] | None = None) -> NoReturn:
        """Refused.

        Raises:
            TrainingError: always.
        """
        raise TrainingError(
            f"{type(self).__name__} steps through an engine: pass it to deepspeed.initialize, and "
            "call engine.step()"
        )


class OnebitAdam(Communicating):
    """1-bit Adam (Tang et al. 2021, arXiv 2102.02888).

    Args:
        params: as for ``torch.optim``.
        deepspeed: accepted; the engine is the one that it is passed to.
        lr: learning rate.
        freeze_step: length of the warm-up.
        bias_correction: correct the moments for their zero start.
        betas: decay of the moments.
        eps: added to the denominator.
        weight_decay: added to the update.
        cuda_aware: accepted, has no effect.
        comm_backend_name: accepted, has no effect: the job's communicator carries the bits.
    """

    type_name = "OneBitAdam"

    def __init__(
        self,
        params: Parameters,
        deepspeed: Any | None = None,
        lr: float = 1e-3,
        freeze_step: int = 100_000,
        bias_correction: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        cuda_aware: bool = False,
        comm_backend_name: str = "nccl",
    ) -> None:
        self.params = {
            "lr": lr,
            "freeze_step": freeze_step,
            "bias_correction": bias_correction,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, dict(self.params))


class OnebitLamb(Communicating):
    """1-bit LAMB (Li et al. 2021, arXiv 2104.06069).

    Args:
        params: as for ``torch.optim``.
        deepspeed: accepted; the engine is the one that it is passed to.
        lr: learning rate.
        freeze_step: length of the warm-up.
        bias_correction: accepted, has no effect, as the algorithm has none.
        betas: decay of the moments.
        eps: added to the denominator.
        eps_inside_sqrt: must be false.
        weight_decay: added to the update.
        max_grad_norm: must be 0; the config's ``gradient_clipping`` clips.
        max_coeff: upper bound of the trust ratio.
        min_coeff: lower bound of the trust ratio.
        amsgrad: must be false.
        cuda_aware: accepted, has no effect.
        comm_backend_name: accepted, has no effect: the job's communicator carries the bits.
        coeff_beta: decay of the averaged trust ratio.
        factor_max: upper bound of what multiplies a frozen trust ratio.
        factor_min: its lower bound.
        factor_threshold: its largest relative change in one update.

    Raises:
        ConfigError: ``amsgrad``, ``max_grad_norm`` or ``eps_inside_sqrt`` is asked for.
    """

    type_name = "OneBitLamb"

    def __init__(
        self,
        params: Parameters,
        deepspeed: Any | None = None,
        lr: float = 1e-3,
        freeze_step: int = 100_000,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
        cuda_aware: bool = False,
        comm_backend_name: str = "nccl",
        coeff_beta: float = 0.9,
        factor_max: float = 4.0,
        factor_min: float = 0.5,
        factor_threshold: float = 0.1,
    ) -> None:
        if amsgrad or max_grad_norm or eps_inside_sqrt:
            raise ConfigError(
                "OnebitLamb has no amsgrad, max_grad_norm or eps_inside_sqrt; use "
                "gradient_clipping to clip"
            )
        self.params = {
            "lr": lr,
            "freeze_step": freeze_step,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
            "coeff_beta": coeff_beta,
            "factor_max": factor_max,
            "factor_min": factor_min,
            "factor_threshold": factor_threshold,
        }
        super().__init__(params, dict(self.params))


class ZeroOneAdam(Communicating):
    """0/1 Adam (Lu et al. 2022, arXiv 2202.06009).

    Args:
        params: as for ``torch.optim``.
        deepspeed: accepted; the engine is the one that it is passed to.
        lr: learning rate.
        bias_correction: accepted, has no effect, as the algorithm has none.
        betas: decay of the moments.
        eps: added to the denominator.
        eps_inside_sqrt: must be false.
        weight_decay: added to the update.
        max_grad_norm: must be 0; the config's ``gradient_clipping`` clips.
        var_freeze_step: updates in which the second moment is refreshed now and then.
        var_update_scaler: refreshes after which their distance doubles.
        local_step_scaler: later updates after which the distance of synchronisations doubles.
        local_step_clipper: its largest value.
        amsgrad: must be false.
        cuda_aware: accepted, has no effect.
        comm_backend_name: accepted, has no effect: the job's communicator carries the bits.

    Raises:
        ConfigError: ``amsgrad``, ``max_grad_norm`` or ``eps_inside_sqrt`` is asked for.
    """

    type_name = "ZeroOneAdam"

    def __init__(
        self,
        params: Parameters,
        deepspeed: Any | None = None,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        var_freeze_step: int = 100_000,
        var_update_scaler: int = 16,
        local_step_scaler: int = 32_678,
        local_step_clipper: int = 16,
        amsgrad: bool = False,
        cuda_aware: bool = False,
        comm_backend_name: str = "nccl",
    ) -> None:
        if amsgrad or max_grad_norm or eps_inside_sqrt:
            raise ConfigError(
                "ZeroOneAdam has no amsgrad, max_grad_norm or eps_inside_sqrt; use "
                "gradient_clipping to clip"
            )
        self.params = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "var_freeze_step": var_freeze_step,
            "var_update_scaler": var_update_scaler,
            "local_step_scaler": local_step_scaler,
            "local_step_clipper": local_step_clipper,
        }
        super().__init__(params, dict(self.params))

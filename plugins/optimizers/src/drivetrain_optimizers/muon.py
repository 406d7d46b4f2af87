"""Muon: momentum whose matrices are made orthogonal before they are applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from drivetrain.contracts import BucketSpec, BucketView, Hyper, StateSpec, UpdateRule
from drivetrain.errors import ConfigError
from drivetrain.optimization.checks import check_betas, check_non_negative
from drivetrain.optimization.spans import tensors
from drivetrain.optimization.torch_rule import TorchRule

if TYPE_CHECKING:
    from drivetrain.contracts import ParameterInfo

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic that inflates small singular values fastest (Jordan et al. 2024)."""

_RESTART = 2
"""Iteration at which the Gram variant recomputes X Xᵀ, before rounding in it has grown."""


class Muon(UpdateRule):
    """Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").

    Matrices get an orthogonalised momentum; other parameters an auxiliary AdamW. A parameter is
    a matrix here if its attribute ``use_muon`` says so or, without one, if it has two or more
    dimensions and neither ``embed`` nor ``lm_head`` in its name. Convolutions count as matrices
    [out, rest].

    Args:
        lr: learning rate of matrices.
        momentum: decay of the momentum.
        weight_decay: decoupled decay, for all parameters.
        nesterov: look ahead along the momentum.
        ns_steps: Newton-Schulz iterations.
        ns_method: ``"standard"`` iterates on the matrix, ``"gram"`` on the square X Xᵀ of its
            smaller side, which is cheaper for matrices that are far from square.
        muon_lr: overrides ``lr``.
        adam_lr: learning rate of the other parameters. It keeps its ratio to ``lr`` when a
            schedule changes that.
        betas: decay of AdamW's moments.
        eps: added to the root of AdamW's second moment.

    Raises:
        ValueError: a value is out of range.
    """

    grain = "tensor"

    def __init__(
        self,
        lr: float = 0.02,
        momentum: float = 0.95,
        *,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_method: Literal["standard", "gram"] = "gram",
        muon_lr: float | None = None,
        adam_lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
    ) -> None:
        lr = lr if muon_lr is None else muon_lr
        check_non_negative(lr=lr, weight_decay=weight_decay, adam_lr=adam_lr, eps=eps)
        check_betas(betas)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if ns_steps < 1:
            raise ValueError(f"ns_steps must be at least 1, got {ns_steps}")
        if ns_method not in ("standard", "gram"):
            raise ValueError(f"ns_method must be 'standard' or 'gram', got {ns_method!r}")
        self.defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "ns_method": ns_method,
            "adam_lr": adam_lr,
            "betas": tuple(betas),
            "eps": eps,
        }
        self._auxiliary = AuxiliaryAdam(lr)

    def rule_for(self, parameter: nn.Parameter, info: ParameterInfo) -> UpdateRule:
        matrix = parameter.ndim >= 2 and not any(w in info.name for w in ("embed", "lm_head"))
        chosen = getattr(parameter, "use_muon", matrix)
        if chosen and parameter.ndim < 2:
            raise ConfigError(
                f"parameter {info.name} has use_muon set, but its shape "
                f"{tuple(parameter.shape)} is no matrix"
            )
        return self if chosen else self._auxiliary

    def states(self, bucket: BucketSpec) -> Sequence[StateSpec]:
        return [StateSpec("momentum_buffer")]

    def update(self, bucket: BucketView, hyper: Hyper, scale: float | torch.Tensor) -> None:
        lr, beta = hyper["lr"], hyper["momentum"]
        for span in tensors(bucket, ["momentum_buffer"], scale):
            momentum = span.states["momentum_buffer"].lerp_(span.gradient, 1 - beta)
            ahead = span.gradient.lerp_(momentum, beta) if hyper["nesterov"] else momentum
            direction = muon_direction(ahead, hyper["ns_method"], hyper["ns_steps"])
            span.weights.mul_(1 - lr * hyper["weight_decay"])
            span.weights.sub_(direction.to(span.weights.dtype).mul_(lr))


class AuxiliaryAdam(UpdateRule):
    """AdamW on the parameters that Muon leaves; reads ``adam_lr`` from Muon's group.

    Args:
        muon_lr: the rate of matrices at which these parameters have exactly ``adam_lr``.
    """

    def __init__(self, muon_lr: float) -> None:
        self._adam = TorchRule(torch.optim.AdamW)
        self._muon_lr = muon_lr
        self.defaults = {}

    def states(self, bucket: BucketSpec) -> Sequence[StateSpec]:
        return self._adam.states(bucket)

    def update(self, bucket: BucketView, hyper: Hyper, scale: float | torch.Tensor) -> None:
        schedule = hyper["lr"] / self._muon_lr if self._muon_lr else 1.0
        inner = {key: hyper[key] for key in ("betas", "eps", "weight_decay")}
        self._adam.update(bucket, {**inner, "lr": hyper["adam_lr"] * schedule}, scale)


def muon_direction(momentum: torch.Tensor, method: str, steps: int) -> torch.Tensor:
    """The orthogonalised matrix, scaled so that tall matrices change their output as much.

    Args:
        momentum: [rows, ...], flattened to [rows, columns].
        method: ``"standard"`` or ``"gram"``.
        steps: Newton-Schulz iterations.

    Returns:
        the direction, shaped as ``momentum``.
    """
    matrix = momentum.flatten(1) if momentum.ndim > 2 else momentum
    rows, columns = matrix.shape
    unit = matrix / torch.linalg.matrix_norm(matrix).clamp(min=1e-7)
    if matrix.device.type != "cpu":
        # Several times faster there; the Gram matrix needs the longer mantissa, and stays small.
        unit = unit.to(torch.float16 if method == "gram" else torch.bfloat16)
    iterate = newton_schulz_gram if method == "gram" else newton_schulz
    orthogonal = iterate(unit.mT, steps).mT if rows > columns else iterate(unit, steps)
    return orthogonal.mul(max(1.0, rows / columns) ** 0.5).reshape(momentum.shape)


def newton_schulz(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Move the singular values of ``matrix`` [m, n], m <= n, norm <= 1, towards 1."""
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = matrix @ matrix.mT
        matrix = a * matrix + (b * gram + c * gram @ gram) @ matrix
    return matrix


def newton_schulz_gram(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """The same polynomial of ``matrix`` [m, n], iterated on m x m matrices only.

    Every iterate is X_k = Q_k X_0 with Q_k a polynomial of G_0 = X_0 X_0ᵀ, hence symmetric and
    commuting: with P = a I + b G + c G^2, Q becomes P Q and G becomes P G P.
    """
    a, b, c = COEFFICIENTS
    for begin, end in ((0, min(_RESTART, steps)), (_RESTART, steps)):
        gram = matrix @ matrix.mT
        product: torch.Tensor | None = None
        for step in range(begin, end):
            polynomial = b * gram + c * gram @ gram
            polynomial.diagonal().add_(a)
            product = polynomial if product is None else polynomial @ product
            if step + 1 < end:
                gram = polynomial @ gram @ polynomial
        if product is not None:
            matrix = product @ matrix
    return matrix

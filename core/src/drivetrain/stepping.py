"""What happens at an accumulation boundary: check, clip, update."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from drivetrain.engine import Engine

CLIP_EPSILON = 1e-6
"""Added to the norm when clipping, as in ``torch.nn.utils.clip_grad_norm_``."""


def apply_optimizer_step(engine: Engine) -> bool:
    """Finish the window of ``engine`` and update, or drop it when gradients are not finite.

    One factor turns the accumulated sums into the gradient that the rule uses: it divides by loss
    scale and by (data shards x accumulation steps), and clips. The gradients themselves are read
    once more only if their norm is needed.

    Returns:
        Whether the update was applied.

    Raises:
        TrainingError: fp16 gradients overflow though the loss scale is at its minimum.
    """
    states, scaler = engine.states, engine.loss_scaler
    with engine.job.span("communication wait"):
        states.finish_reduction()
    divide = 1.0 / (scaler.scale_value * engine.gradient_divisor())
    norm = states.gradient_norm() if engine.wants_gradient_norm() else None
    if norm is not None and engine.precision.check_finite and not bool(torch.isfinite(norm)):
        # Every rank sees the same norm, so all ranks take this branch together.
        engine.record_gradient_norm(None)
        scaler.update(overflow=True, first_nonfinite=states.first_nonfinite)
        states.discard_gradients()
        return False
    scale: float | torch.Tensor = divide
    if norm is not None:
        norm = norm * divide
        engine.record_gradient_norm(norm)
        if engine.gradient_clipping() > 0:
            limit = engine.gradient_clipping()
            scale = divide * torch.clamp(limit / (norm + CLIP_EPSILON), max=1.0)
    states.update(scale)
    scaler.update(overflow=False, first_nonfinite=states.first_nonfinite)
    return True

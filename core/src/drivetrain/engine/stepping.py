"""What happens at an accumulation boundary: check, clip, update."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import torch

from drivetrain.errors import TrainingError

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine

logger = logging.getLogger("drivetrain.engine")

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
        TrainingError: gradients are not finite, and the precision has no way to go on: fp32 has
            none, and fp16 none once the loss scale is at its minimum.
    """
    states, scaler = engine.states, engine.loss_scaler
    with engine.job.span("communication wait"):
        states.finish_reduction()
    divide = 1.0 / (scaler.scale_value * engine.gradient_divisor())
    norm = states.gradient_norm() if engine.wants_gradient_norm() else None
    # On a host looking at the norm is free; elsewhere it stalls the device.
    looks = engine.precision.check_finite or engine.device.type == "cpu"
    seen = float(norm) if norm is not None and looks else None
    if seen is not None and not math.isfinite(seen):
        # Every rank sees the same norm, so all ranks take this branch together.
        engine.record_gradient_norm(None)
        _refuse_or_note(engine)
        scaler.update(overflow=True, first_nonfinite=states.first_nonfinite)
        states.discard_gradients()
        return False
    scale: float | torch.Tensor = divide
    if norm is not None:
        norm = norm * divide
        engine.record_gradient_norm(norm)
        limit = engine.gradient_clipping()
        if limit > 0 and seen is not None:
            scale = divide * min(1.0, limit / (seen * divide + CLIP_EPSILON))
        elif limit > 0:
            # 0, for an update from zeros, where the norm is not finite; the next step tells.
            clip = torch.clamp(limit / (norm + CLIP_EPSILON), max=1.0)
            scale = divide * clip.masked_fill(~torch.isfinite(norm), 0.0)
    states.update(scale)
    scaler.update(overflow=False, first_nonfinite=states.first_nonfinite)
    return True


def _refuse_or_note(engine: Engine) -> None:
    """Say that gradients are not finite, unless the loss scale is about to deal with it."""
    if engine.loss_scaler.dynamic:
        return
    step, culprit = engine.global_steps + 1, engine.states.first_nonfinite()
    if not engine.precision.check_finite:
        raise TrainingError(
            f"the gradient norm of step {step} is not finite: {culprit}; "
            "parameters were not updated"
        )
    if engine.job.rank == 0:
        logger.warning("step %d is skipped, its gradients are not finite: %s", step, culprit)

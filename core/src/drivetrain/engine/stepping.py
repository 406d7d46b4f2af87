"""What happens at an accumulation boundary: check, divide, clip, update.

The divisor is a number, or where losses have weights the sum of these over ranks and micro-batches.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts.world.collective import Op, Purpose, Tag
from drivetrain.errors import TrainingError
from drivetrain.states.gradient_norm import accumulator

if TYPE_CHECKING:
    from drivetrain.contracts.world.axis import Axis
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job

logger = logging.getLogger("drivetrain.engine")

CLIP_EPSILON = 1e-6
"""Added to the norm when clipping, as in ``torch.nn.utils.clip_grad_norm_``."""


def apply_optimizer_step(engine: Engine) -> bool:
    """Finish the window of ``engine`` and update, or drop it when gradients are not finite.

    One factor turns the accumulated sums into the gradient that the rule uses: it divides by loss
    scale and by the engine's ``gradient_divisor``, and clips. The gradients themselves are read
    once more only if their norm is needed.

    Returns:
        Whether the update was applied.

    Raises:
        TrainingError: gradients are not finite, and the precision has no way to go on: fp32 has
            none, and fp16 none once the loss scale is at its minimum; or weights of losses make no
            positive sum.
    """
    states, scaler = engine.states, engine.loss_scaler
    with engine.job.span("communication wait"):
        states.finish_reduction()
    _tell_stages_of_weights(engine)
    # On a host looking at a number is free; elsewhere it stalls the device.
    looks = engine.precision.check_finite or engine.device.type == "cpu"
    divide = 1.0 / (scaler.scale_value * _divisor(engine, looks))
    norm = states.gradient_norm() if engine.wants_gradient_norm() else None
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


def loss_axes(job: Job) -> Axis:
    """The axes that losses are summed over: of a pipeline's stages only the last has any."""
    return "data" if job.mesh.size("pp") == 1 else ("pp", "data")


def _tell_stages_of_weights(engine: Engine) -> None:
    """Have all stages of a pipeline divide by weights if the losses of the last one have some."""
    job, states = engine.job, engine.states
    if job.mesh.size("pp") > 1:
        weighted = torch.tensor([int(bool(states.weighted))])
        tag = Tag(Purpose.CONTROL, site="weights of losses")
        job.communicator.all_reduce(weighted, "pp", tag, op=Op.MAX)
        states.weighted = bool(weighted)
    if states.weighted and job.losses.lacks_weight:
        raise TrainingError(
            "losses of this window have weights, but extra losses of this rank's layers had none: "
            "tell engine.backward_from the weight of the micro-batch, or pass no weights"
        )
    job.losses.lacks_weight = False


def checked_weight(weight: float | torch.Tensor | None) -> float | torch.Tensor | None:
    """The weight of a loss: a number where the host knows it, else a 0-d tensor.

    Raises:
        TrainingError: it is known, and no finite number from 0 on; or not one number.
    """
    if isinstance(weight, torch.Tensor):
        if weight.numel() != 1:
            raise TrainingError(
                f"the weight of a loss has shape {tuple(weight.shape)}, expected ()"
            )
        if weight.device.type != "cpu":
            return weight.detach().reshape(())
    if weight is None:
        return None
    number = float(weight)
    if not 0 <= number < math.inf:
        raise TrainingError(f"the weight of a loss is a finite number from 0 on, got {number}")
    return number


def total_weight(job: Job, weight: float | torch.Tensor | None, *, averages: bool) -> torch.Tensor:
    """Sum the weights of all ranks, a 0-d tensor; infinite if there is nothing. Collective.

    Args:
        job: its axis ``data``, and all stages, are summed over.
        weight: sum of this rank's weights since the window began; ``None`` if it had no loss.
        averages: ``False`` divides it by the number of data shards, so that their means are added.
    """
    dtype = accumulator(job.device)
    total = torch.zeros((), dtype=dtype, device=job.device)
    if weight is not None:
        total += weight
    tag = Tag(Purpose.CONTROL, site="weights of losses")
    job.communicator.all_reduce(total, loss_axes(job), tag)
    total = torch.where(total > 0, total, math.inf)
    return total if averages else total / job.mesh.size("dp")


def _divisor(engine: Engine, looks: bool) -> float | torch.Tensor:
    """The engine's divisor, a number where the host looks at numbers.

    Raises:
        TrainingError: weights of losses make no positive sum; where the host does not look, the
            update is that of zeros, and the next step raises.
    """
    divisor = engine.gradient_divisor()
    if not isinstance(divisor, torch.Tensor):
        return divisor
    if not looks:
        engine.record_divisor(divisor)
        return divisor
    if math.isfinite(number := float(divisor)):
        return number
    raise TrainingError(
        f"the weights of the losses of step {engine.global_steps + 1} have no positive sum over "
        "ranks and micro-batches, so there is no mean: parameters were not updated; call "
        "engine.skip_step() in place of step() where a step has nothing to learn from"
    )


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

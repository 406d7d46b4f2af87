"""Clipping gradients that a script keeps itself, outside of an engine."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from deepspeed._parts.accelerator import get_accelerator
from deepspeed._parts.small import is_model_parallel_parameter


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    mpu: Any | None = None,
) -> torch.Tensor:
    """Scale gradients so that their common norm is at most ``max_norm``.

    As ``torch.nn.utils.clip_grad_norm_``, but over all model-parallel ranks: parts of larger
    tensors are counted on every rank, what ranks have copies of on the first one alone. An engine
    clips by its config's ``gradient_clipping``; its gradients are not in ``parameter.grad``.

    Args:
        parameters: whose ``grad`` is scaled in place.
        max_norm: largest norm.
        norm_type: order of the norm; may be infinite.
        mpu: has ``get_model_parallel_rank()`` and ``get_model_parallel_group()``; ``None`` for one
            model-parallel rank.

    Returns:
        The norm before, 0-d, float32. Collective over the model-parallel group. As in torch, an
        infinite norm makes finite gradients zero, and one that is NaN makes all of them NaN.
    """
    found = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    gradients = [(p, p.grad) for p in found if p.grad is not None]
    tensors = [p for p, _ in gradients]
    group = None if mpu is None else mpu.get_model_parallel_group()
    first = mpu is None or mpu.get_model_parallel_rank() == 0
    counted = [grad for p, grad in gradients if first or is_model_parallel_parameter(p)]
    # Ranks without gradients communicate from where the others do.
    device = tensors[0].device if tensors else get_accelerator().current_device_name()
    norm = _norm(counted, float(norm_type)).to(device)
    if group is not None:
        norm = _over_ranks(norm, float(norm_type), group)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for _, grad in gradients:
        if grad.dtype == torch.float16:  # which has no number as small as a factor may be
            grad.copy_(grad.float() * factor.to(grad.device))
        else:
            grad.mul_(factor.to(grad.device))
    return norm


def _norm(gradients: list[torch.Tensor], order: float) -> torch.Tensor:
    """The common norm, in float32: squares of 65504 and less are infinite in float16."""
    norms = [
        torch.linalg.vector_norm(grad, order, dtype=torch.promote_types(grad.dtype, torch.float32))
        for grad in gradients
        if grad.numel()
    ]
    if not norms:
        return torch.zeros(())
    together = torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms])
    total: torch.Tensor = torch.linalg.vector_norm(together, order)
    return total


def _over_ranks(norm: torch.Tensor, order: float, group: dist.ProcessGroup) -> torch.Tensor:
    """The norm of what all ranks of a group count."""
    if math.isinf(order):
        # The maximum of NaN and a number may be either, by rank.
        both = torch.stack([norm.nan_to_num(0.0, math.inf), norm.isnan().to(norm.dtype)])
        dist.all_reduce(both, dist.ReduceOp.MAX, group)
        return torch.where(both[1] > 0, math.nan, both[0])
    power = norm.pow(order)
    dist.all_reduce(power, dist.ReduceOp.SUM, group)
    return power.pow(1.0 / order)

"""Clipping gradients that a script keeps itself, outside of an engine."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

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
        The norm before, a 0-d tensor. Collective over the model-parallel group.
    """
    found = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    gradients = [(p, p.grad) for p in found if p.grad is not None]
    tensors = [p for p, _ in gradients]
    group = None if mpu is None else mpu.get_model_parallel_group()
    first = mpu is None or mpu.get_model_parallel_rank() == 0
    counted = [grad for p, grad in gradients if first or is_model_parallel_parameter(p)]
    device = tensors[0].device if tensors else torch.device("cpu")
    norm = torch.zeros((), device=device)
    if counted:
        norm = torch.nn.utils.get_total_norm(counted, norm_type).to(device, torch.float32)
    if group is not None:
        norm = _over_ranks(norm, float(norm_type), group)
    torch.nn.utils.clip_grads_with_norm_(tensors, max_norm, norm)
    return norm


def _over_ranks(norm: torch.Tensor, order: float, group: dist.ProcessGroup) -> torch.Tensor:
    """The norm of what all ranks of a group count."""
    if math.isinf(order):
        dist.all_reduce(norm, dist.ReduceOp.MAX, group)
        return norm
    power = norm.pow(order)
    dist.all_reduce(power, dist.ReduceOp.SUM, group)
    return power.pow(1.0 / order)

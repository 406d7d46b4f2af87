"""The largest eigenvalue of a loss's Hessian over some parameters, by power iteration.

Pearlmutter 1994, "Fast Exact Multiplication by the Hessian", and Yao et al. 2020, "PyHessian",
arXiv:1912.07145, section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

Reduce = Callable[[torch.Tensor], None]
"""Averages a tensor over ranks in place."""


def largest_eigenvalue(
    gradients: Sequence[torch.Tensor],
    parameters: Sequence[torch.Tensor],
    *,
    max_iter: int = 100,
    tolerance: float = 1e-2,
    stability: float = 1e-6,
    seed: int = 0,
    reduce: Reduce | None = None,
) -> float:
    """The eigenvalue of largest magnitude of the Hessian over ``parameters``.

    One Hessian-vector product, a backward through ``gradients``, per iteration. With ``reduce`` it
    is collective, and ranks stop together; the Hessian is that of the mean of their losses.

    Args:
        gradients: of the loss, with a graph (``create_graph=True``); one for each parameter.
        parameters: leaves.
        max_iter: most products.
        tolerance: relative change of the eigenvalue at which it stops.
        stability: added to norms.
        seed: of the first vector; no other random numbers are touched.
        reduce: averages over ranks that have different samples.

    Returns:
        The eigenvalue, with its sign; 0 if a product is not finite.
    """
    device, dtype = gradients[0].device, gradients[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    vector = torch.cat(
        [torch.randn(p.numel(), generator=generator, dtype=wide) for p in parameters]
    ).to(device)
    vector /= vector.norm() + stability
    value = 0.0
    for _ in range(max_iter):
        product = _product(gradients, parameters, vector).to(wide)
        if reduce is not None:
            reduce(product)
        new = float(product @ vector)
        if not math.isfinite(new):
            return 0.0
        vector = product / (product.norm() + stability)
        if abs(new - value) <= tolerance * (abs(new) + stability):
            return new
        value = new
    return value


def _product(
    gradients: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor], vector: torch.Tensor
) -> torch.Tensor:
    parts = torch.split(vector, [p.numel() for p in parameters])
    outputs = [g for g in gradients if g.requires_grad]
    seeds = [
        part.view(g.shape).to(g.dtype)
        for g, part in zip(gradients, parts, strict=True)
        if g.requires_grad
    ]
    if not outputs:
        return torch.zeros_like(vector)
    found = torch.autograd.grad(
        outputs, list(parameters), seeds, retain_graph=True, materialize_grads=True
    )
    return torch.cat([f.reshape(-1) for f in found])


def normalised(eigenvalues: Sequence[float]) -> list[float]:
    """Magnitudes in [0, 1], the largest 1; where there is no curvature, 1."""
    largest = max((abs(value) for value in eigenvalues), default=0.0)
    return [abs(value) / largest if value else 1.0 for value in eigenvalues]

"""Seeded data for the small models: sample i is the same whatever else is asked for."""

from __future__ import annotations

import torch

Samples = tuple[torch.Tensor, torch.Tensor]
"""Inputs and targets, both with samples along dimension 0."""


def vectors(count: int) -> Samples:
    """Inputs [count, 8] and a fixed nonlinear function of them."""
    generator = torch.Generator().manual_seed(11)
    inputs = torch.randn(count, 8, generator=generator)
    return inputs, torch.sin(inputs.roll(1, dims=1) * 2) + 0.1 * inputs.sum(1, keepdim=True)


def tokens(count: int, length: int = 16, vocabulary: int = 64) -> Samples:
    """Sequences [count, length] that count up with a random stride, and their next tokens."""
    generator = torch.Generator().manual_seed(12)
    starts = torch.randint(vocabulary, (count, 2), generator=generator)
    steps = torch.arange(length + 1)
    ids = (starts[:, :1] + steps * (1 + starts[:, 1:] % 5)) % vocabulary
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def images(count: int) -> Samples:
    """Images [count, 3, 8, 8] and which of four brightness classes each one is in."""
    generator = torch.Generator().manual_seed(13)
    levels = torch.randint(4, (count,), generator=generator)
    noise = torch.randn(count, 3, 8, 8, generator=generator)
    return noise + levels.view(-1, 1, 1, 1), levels

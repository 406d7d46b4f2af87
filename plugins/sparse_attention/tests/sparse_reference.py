"""Attention with a whole mask, in plain operations and float64: what all is compared with."""

from __future__ import annotations

import torch


def dense(query, key, value, seen, scale=None, bias=None):
    """Results [b, h, s, d] of the tokens that ``seen`` [b, h, s, t] allows."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias
    hidden = ~seen.expand_as(scores)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return weights.masked_fill(hidden, 0.0) @ value


def tokens_of(layout, block, length):
    """A layout of blocks [..., rows, columns] as a mask of tokens."""
    wide = layout.bool().repeat_interleave(block, -1).repeat_interleave(block, -2)
    return wide[..., :length, :length]


def inputs(batch=2, heads=4, kv_heads=2, length=50, width=16, dtype=torch.float64, seed=0):
    """Query, key and value as models have them, heads inside of tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, length, h, width, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]


def assert_same(found, wanted, leaves, bound=1e-9):
    """Results and gradients agree, for the same gradient of the result."""
    torch.testing.assert_close(found.to(wanted.dtype), wanted, rtol=bound, atol=bound)
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad(found, leaves, gradient.to(found.dtype))
    for one, other in zip(grads, torch.autograd.grad(wanted, leaves, gradient), strict=True):
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)

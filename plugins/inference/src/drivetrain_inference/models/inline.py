"""Attention modules that compute their scores themselves, and may add ALiBi to them.

ALiBi (arXiv 2108.12409) adds ``slope * (place of the key - place of the query)`` to a score. What
depends on the query alone changes no softmax. So a key carries its place in a few more elements,
and a query its head's slope: their product is what is added, in any kernel for attention.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from drivetrain.errors import ConfigError

EXTRA = 4
"""Elements that a key and a query have more."""
_STEP = 256
"""Places are kept as a multiple of it and a rest, which numbers of 8 bits hold exactly."""


Attends = Callable[..., torch.Tensor]
"""Attention of a module: called with it, query, key, value [1, heads, tokens, dim], the factor of
scores, and places [tokens] and slopes [heads] or twice ``None``; into [1, tokens, heads, dim]."""

Forward = Callable[..., tuple[torch.Tensor, None]]
Positions = Callable[[], torch.Tensor]


def with_places(key: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Keys [1, heads, tokens, dim] that carry their ``places`` [tokens]."""
    high = torch.div(places, _STEP, rounding_mode="floor") * _STEP
    both = torch.stack([high, places - high], dim=1).to(key.dtype)
    extra = both.repeat(1, 2)[None, None].expand(1, key.shape[1], -1, -1)
    return torch.cat([key, extra], dim=3)


def with_slopes(query: torch.Tensor, slopes: torch.Tensor, scale: float) -> torch.Tensor:
    """Queries [1, heads, tokens, dim] that carry their heads' ``slopes`` [heads]."""
    wanted = slopes.double() / scale
    high = wanted.to(query.dtype)
    rest = (wanted - high.double()).to(query.dtype)
    extra = torch.stack([high, high, rest, rest], dim=1)[None, :, None]
    return torch.cat([query, extra.expand(1, -1, query.shape[2], -1)], dim=3)


def inline_modules(module: nn.Module) -> list[nn.Module]:
    """The parts of ``module`` that are known to compute scores themselves."""
    return [part for part in module.modules() if type(part).__name__ in _KINDS]


@contextmanager
def led(parts: list[nn.Module], attend: Attends, positions: Positions) -> Iterator[None]:
    """Have ``parts`` call ``attend`` instead of computing scores.

    Args:
        parts: from :func:`inline_modules`.
        attend: computes attention.
        positions: returns the places [tokens] of the forward's tokens.
    """
    changed: list[Any] = list(parts)
    try:
        for part in changed:
            part.forward = _KINDS[type(part).__name__](part, attend, positions)
        yield
    finally:
        for part in changed:
            part.__dict__.pop("forward", None)


def _bloom(module: Any, attend: Attends, positions: Positions) -> Forward:
    slopes = _bloom_slopes(module)

    def forward(
        hidden_states: torch.Tensor, residual: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, None]:
        parts = module._reshape(module.query_key_value(hidden_states))
        found = attend(module, *parts, module.inv_norm_factor, positions(), slopes)
        return module.dense(found.flatten(2)) + residual, None

    return forward


def _mpt(module: Any, attend: Attends, positions: Positions) -> Forward:
    def forward(
        hidden_states: torch.Tensor, position_bias: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, None]:
        joined = module.Wqkv(hidden_states)
        if module.clip_qkv:
            joined = joined.clamp(min=-module.clip_qkv, max=module.clip_qkv)
        heads = joined.view(1, -1, 3, module.n_heads, module.head_dim)
        parts = heads.permute(2, 0, 3, 1, 4).unbind(0)
        slopes = position_bias[:, 0, -1] - position_bias[:, 0, -2]
        found = attend(module, *parts, module.softmax_scale, positions(), slopes)
        return module.out_proj(found.flatten(2)), None

    return forward


def _falcon(module: Any, attend: Attends, positions: Positions) -> Forward:
    source = sys.modules[type(module).__module__]
    slopes = None
    if module.config.alibi:
        if module.num_heads & (module.num_heads - 1):
            raise ConfigError(
                f"FalconAttention rounds ALiBi of {module.num_heads} heads to bfloat16 in a way "
                "that no slope describes; only numbers of heads that are powers of two are served"
            )
        slopes = 2.0 ** (-8.0 / module.num_heads * torch.arange(1, module.num_heads + 1))
        slopes = slopes.bfloat16().double() * module.inv_norm_factor

    def forward(
        hidden_states: torch.Tensor, *_: object, position_embeddings: Any = None, **__: object
    ) -> tuple[torch.Tensor, None]:
        parts = module._split_heads(module.query_key_value(hidden_states))
        query, key, value = (part.transpose(1, 2) for part in parts)
        if module.new_decoder_architecture:  # keys are there once for each head that reads them
            group = module.num_heads // module.num_kv_heads
            key, value = key[:, ::group], value[:, ::group]
        places = None
        if slopes is None:
            query, key = source.apply_rotary_pos_emb(query, key, *position_embeddings)
        else:
            places = positions().bfloat16().double()  # as the model rounds them
        found = attend(module, query, key, value, module.inv_norm_factor, places, slopes)
        return module.dense(found.flatten(2)), None

    return forward


def _bloom_slopes(module: Any) -> torch.Tensor:
    source: Any = sys.modules[type(module).__module__]
    mask = torch.ones(1, 2)
    found: torch.Tensor = source.build_alibi_tensor(mask, module.num_heads, torch.float32)
    return found[:, 0, 1]


_KINDS: dict[str, Callable[[Any, Attends, Positions], Forward]] = {
    "BloomAttention": _bloom,
    "MptAttention": _mpt,
    "FalconAttention": _falcon,
}

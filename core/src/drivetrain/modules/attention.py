"""The attention of a job: torch's function with all layers around it, and how models reach it.

Models of Transformers reach it through the interface where they look up attention by name; all
others call :func:`attention`.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from drivetrain.contracts.loop.attention import Attention, AttentionFacts, MaskRule
from drivetrain.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from drivetrain.job.job import Job

logger = logging.getLogger("drivetrain.engine")

_numbers = itertools.count()
_chains: WeakKeyDictionary[nn.Module, Attention] = WeakKeyDictionary()


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    **facts: Any,
) -> torch.Tensor:
    """Attend as the job of ``module`` does it: over parts of sequences, of heads, with a cache, ...

    Outside of an engine it is plain attention on this rank.

    Args:
        module: the layer that attends, part of the engine's model.
        query: [b, h, s, d].
        key: [b, h_kv, keys, d], h a multiple of h_kv.
        value: [b, h_kv, keys, d_v].
        mask: boolean (true: may attend) or added to scores, broadcast to [b, h, s, keys].
        scale: of scores; 1 / sqrt(d) by default.
        causal: query i sees keys up to i.
        facts: other fields of :class:`~drivetrain.contracts.loop.attention.AttentionFacts`.

    Returns:
        [b, s, h, d_v].
    """
    chain = _chains.get(module, torch_attention)
    return chain(module, query, key, value, AttentionFacts(mask, scale, causal, **facts))


def torch_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    facts: AttentionFacts,
) -> torch.Tensor:
    """The innermost function: torch's, or its formula where torch's lacks something."""
    del module
    mask = dense_mask(facts, query, key.shape[2])
    groups = query.shape[1] // key.shape[1]
    grouped = groups > 1 and mask is None and key.shape[-1] == value.shape[-1] <= 256
    if groups > 1 and not grouped:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if facts.softcap is not None or facts.sinks is not None:
        return _by_formula(query, key, value, mask, facts, groups if grouped else 1)
    causal = mask is None and facts.causal and query.shape[2] > 1
    if causal and key.shape[2] > query.shape[2]:  # what no query sees
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    output = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=facts.dropout,
        is_causal=causal,
        scale=facts.scale,
        enable_gqa=grouped,
    )
    return output.transpose(1, 2).contiguous()


def dense_mask(facts: AttentionFacts, query: torch.Tensor, keys: int) -> torch.Tensor | None:
    """Mask, window, segments, slopes and bias as one tensor that broadcasts to [b, h, s, keys].

    Returns:
        ``None`` if ``causal`` is all that there is to say; otherwise the tensor has it, too.

    Raises:
        TrainingError: segments that are not those of the keys.
    """
    mask = facts.mask.tensor if isinstance(facts.mask, MaskRule) else facts.mask
    told = isinstance(facts.mask, MaskRule) and mask is not None
    causal, window = facts.causal and not told, None if told else facts.window
    length, segments, bias, slopes = query.shape[2], facts.segments, facts.bias, facts.slopes
    terms = [] if mask is None else [mask]
    if segments is not None:
        if keys != length:
            raise TrainingError(f"segments of {length} queries say nothing about {keys} keys")
        terms.append(segments[:, None, :, None] == segments[:, None, None, :])
    more = terms or bias is not None or slopes is not None
    if window is not None or slopes is not None or (causal and more):
        ahead = torch.arange(length, device=query.device)[:, None]
        ahead = ahead - torch.arange(keys, device=query.device)
        terms += [ahead >= 0] if causal else []
        terms += [ahead.abs() < window] if window is not None else []
        terms += [] if slopes is None else [(ahead.abs() * -slopes[:, None, None]).to(query.dtype)]
    terms += [] if bias is None else [bias]
    return reduce(_both, terms) if terms else None


def _both(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Two masks at once; the result is boolean if both are."""
    if a.dtype == b.dtype == torch.bool:
        return a & b
    dtype = b.dtype if a.dtype == torch.bool else a.dtype
    return _added(a, dtype) + _added(b, dtype)


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _by_formula(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    facts: AttentionFacts,
    groups: int,
) -> torch.Tensor:
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if facts.scale is None else facts.scale
    scores = query @ key.transpose(2, 3) * scale
    if facts.softcap is not None:
        scores = facts.softcap * torch.tanh(scores / facts.softcap)
    if mask is None and facts.causal:
        mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores + _added(mask, scores.dtype)
    if facts.sinks is not None:
        sinks = facts.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = weights[..., : key.shape[2]].to(value.dtype)
    weights = nn.functional.dropout(weights, facts.dropout, facts.dropout > 0)
    return (weights @ value).transpose(1, 2).contiguous()


def connect_attention(job: Job, module: nn.Module) -> Callable[[], None]:
    """Have ``module`` attend through the layers of the job's plugins, if there are any.

    Returns:
        Undoes it.

    Raises:
        ConfigError: a model of Transformers lets nobody set its attention.
    """
    layers = sorted(job.hub.wrap_attention(job), key=lambda layer: layer.phase)
    if not layers:
        return lambda: None
    chain: Attention = torch_attention
    for layer in layers:
        chain = layer.wrap(chain)
    parts = list(module.modules())
    restore = _connect_transformers(parts, chain)
    _chains.update(dict.fromkeys(parts, chain))

    def undo() -> None:
        for part in parts:
            if _chains.get(part) is chain:
                del _chains[part]
        restore()

    return undo


def _connect_transformers(parts: list[nn.Module], chain: Attention) -> Callable[[], None]:
    """Set one name for the chain in the configs of all models of Transformers among ``parts``."""
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    models = [p for p in parts if modeling is not None and isinstance(p, modeling.PreTrainedModel)]
    if not models:
        return lambda: None
    masking: Any = sys.modules["transformers.masking_utils"]
    interfaces = (modeling.AttentionInterface, masking.AttentionMaskInterface)
    before = [(model.config, model.config._attn_implementation) for model in models]
    name = f"drivetrain_{next(_numbers)}"

    def restore() -> None:
        for config, implementation in before:
            if config._attn_implementation == name:
                config._attn_implementation_internal = implementation
        for interface in interfaces:
            interface._global_mapping.pop(name, None)

    for interface, function in zip(interfaces, (_interface(chain), _mask_rule), strict=True):
        interface.register(name, function)
    for model in models:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            restore()
            raise ConfigError(
                f"{type(model).__name__} computes attention without Transformers' interface for "
                "it, so no plugin of this config that changes attention can work with it: use a "
                "model that looks its attention up there, or that calls drivetrain.attention"
            )
    return restore


def _interface(chain: Attention) -> Callable[..., tuple[torch.Tensor, None]]:
    """``chain`` as Transformers calls attention."""

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | MaskRule | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        if others.get("output_attentions"):
            raise TrainingError("attention weights are never all in memory: no output_attentions")
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        facts = AttentionFacts(
            mask=attention_mask,
            scale=scaling,
            # A tensor of theirs says all, as their own functions take it.
            causal=causal and not isinstance(attention_mask, torch.Tensor),
            window=others.get("sliding_window") if attention_mask is None else None,
            dropout=dropout,
            positions=others.get("position_ids"),
            bias=others.get("position_bias"),
            softcap=others.get("softcap"),
            sinks=others.get("s_aux"),
        )
        return chain(module, query, key, value, facts), None

    return attend


def _mask_rule(**asked: Any) -> MaskRule | None:
    """The mask that a model asks for, as its function of indices; nothing where all is plain."""
    masking: Any = sys.modules["transformers.masking_utils"]
    padding, allowed = asked.get("attention_mask"), asked["mask_function"]
    is_causal = allowed is masking.causal_mask_function and asked.get("allow_is_causal_skip")
    told_by_flags = is_causal or asked.get("allow_is_bidirectional_skip")
    if told_by_flags and padding is None and asked["q_length"] == asked["kv_length"]:
        return None
    return MaskRule(
        allowed, lambda: masking.sdpa_mask(**asked), padding, not asked.get("use_vmap", False)
    )

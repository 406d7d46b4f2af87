"""Masks that a model of several modalities makes for its language model, of whole sequences.

[Note: masks of images] Tokens of one image see each other in both directions (Gemma 3), and what is
an image is known before the language model is called, where sequences are whole. So the mask is
made there, as functions of indices of the whole sequence. Ranks ask these functions about whole
sequences as well; all that has to be told them is which tokens are padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from drivetrain.contracts import MaskRule
from drivetrain.errors import TrainingError
from drivetrain_sequence.inputs import padded
from drivetrain_sequence.layout import Layout
from drivetrain_sequence.plain import function_of

Masks = MaskRule | Mapping[str, MaskRule | None]
"""One mask for all layers, or one for each kind of layer; ``None`` where causality says all."""

_FEW = 5
"""Places of queries and of keys about which a function of numbers is asked in two ways."""


def is_of_whole(mask: Any) -> bool:
    """Whether a mask is made of functions of indices."""
    rules = mask.values() if isinstance(mask, Mapping) else [mask]
    return all(rule is None or isinstance(rule, MaskRule) for rule in rules)


def padding_of(masks: Masks) -> torch.Tensor | None:
    """The padding mask [b, S] that the client has given; ``None`` without."""
    rules = masks.values() if isinstance(masks, Mapping) else [masks]
    found = (rule.padding for rule in rules if rule is not None)
    return next((padding for padding in found if padding is not None), None)


def for_parts(masks: Masks, like: torch.Tensor, missing: int, name: str) -> Any:
    """The masks with what a rank's attention needs to ask them about all tokens.

    Args:
        masks: of the model; packed rows are part of them.
        like: [b, S, ...], the whole sequence.
        missing: tokens that are added to each row.
        name: of the model, for errors.

    Raises:
        TrainingError: a function that takes single numbers alone.
    """
    if isinstance(masks, Mapping):
        return {
            kind: None if rule is None else _for_parts(rule, like, missing, name)
            for kind, rule in masks.items()
        }
    return _for_parts(masks, like, missing, name)


def _for_parts(rule: MaskRule, like: torch.Tensor, missing: int, name: str) -> MaskRule:
    (batch, length), device = like.shape[:2], like.device
    if rule.padding is None:
        real = (torch.arange(length + missing, device=device) < length).expand(batch, -1)
    else:
        real = padded(rule.padding.bool(), missing, False)
    layout = Layout(real, added=rule.padding is None)
    attached = layout.attached(batch, length + missing, device)
    if function_of(rule) is not None:
        return replace(rule, padding=attached)
    if not rule.broadcasts and not like.is_meta:
        _check_tensors(rule, like, name)
    allowed = rule.allowed

    def within(
        sample: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> Any:
        # Of tokens that were added the model knows nothing; nobody sees them or what they see.
        return allowed(sample, head, query.clamp(max=length - 1), key.clamp(max=length - 1))

    return replace(rule, allowed=within, padding=attached, broadcasts=True)


def _check_tensors(rule: MaskRule, like: torch.Tensor, name: str) -> None:
    """Refuse a function that says something else of tensors of indices than of each index."""
    places = torch.linspace(0, like.shape[1] - 1, _FEW, device=like.device).long()
    each = [torch.arange(len(like), device=like.device), places[:1] * 0, places, places]
    grid = torch.meshgrid(*each, indexing="ij")
    ask: Any = rule.allowed
    expected = torch.vmap(ask)(*(x.flatten() for x in grid)).view(grid[0].shape)
    shaped = [x.view([-1 if i == j else 1 for j in range(4)]) for i, x in enumerate(each)]
    said = (
        f"the attention mask of {name} is a function of single indices, which cannot be asked "
        "about tokens of other ranks: this model cannot be trained with sequence_parallel_size"
    )
    try:
        found = torch.as_tensor(ask(*shaped))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise TrainingError(said) from error
    if not torch.equal(found.broadcast_to(expected.shape), expected):
        raise TrainingError(said)

"""Masks that two flags say as well, so that attention needs no tensor for them."""

from __future__ import annotations

import sys
from typing import Any, Literal

from drivetrain.contracts import MaskRule
from drivetrain_sequence.layout import Layout


def function_of(rule: MaskRule) -> Literal["causal", "all"] | None:
    """What a model's mask says beside padding and packing, if it is one of the two plain ones."""
    masking: Any = sys.modules.get("transformers.masking_utils")
    if masking is None:
        return None
    if rule.allowed is masking.causal_mask_function:
        return "causal"
    return "all" if rule.allowed is masking.bidirectional_mask_function else None


def flags_of(rule: MaskRule, layout: Layout) -> Literal["causal", "all"] | None:
    """What says the same as a mask with its layout, if no token is hidden from another by more.

    Padding that was added at the end of rows is never seen under a causal mask. Padding of the
    client's is not left out, since what it computes may count in the client's loss.
    """
    kind = function_of(rule)
    if kind is None or layout.segments is not None:
        return None
    if layout.real is None:
        return kind
    return kind if kind == "causal" and layout.added else None

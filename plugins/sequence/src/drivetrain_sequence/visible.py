"""Which keys queries see, by places in the whole sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from drivetrain.contracts import AttentionFacts, MaskRule
from drivetrain_sequence.blocks import Sight, places
from drivetrain_sequence.layout import layout_of, whole_rule
from drivetrain_sequence.plain import flags_of, function_of


@dataclass(eq=False)
class Seen:
    """What an attention's facts say of the whole sequence; implements ``blocks.Visible``.

    Args:
        like: [b, ...], on the device where tiles are made.
        causal: a query sees keys up to its own place.
        window: a query sees this many places back, its own included; as many ahead if not causal.
        rule: a mask of a model, of indices of the whole sequence.
        segments: [b, S], which of the packed sequences a token belongs to.
    """

    like: torch.Tensor
    causal: bool = False
    window: int | None = None
    rule: MaskRule | None = None
    segments: torch.Tensor | None = None

    @classmethod
    def by(cls, facts: AttentionFacts, length: int, like: torch.Tensor) -> Seen:
        """What ``facts`` say, but for segments, which are those of the tokens of ``like``."""
        mask = facts.mask
        if not isinstance(mask, MaskRule):
            return cls(like, facts.causal, facts.window)
        layout = layout_of(mask)
        if plain := flags_of(mask, layout):
            return cls(like, plain == "causal")
        causal = function_of(mask) == "causal"  # within packed sequences, as in whole ones
        rule = whole_rule(mask, layout, (length, length), like.device)  # asked by places alone
        return cls(like, causal, rule=rule)

    def of(self, queries: range, keys: range) -> Sight:
        """How much is seen of a block."""
        first, last, start, end = queries[0], queries[-1], keys[0], keys[-1]
        if self.causal and last < start:
            return Sight.NONE
        if self.window is not None:
            ahead = 0 if self.causal else start - last
            if max(first - end, ahead) >= self.window:
                return Sight.NONE
            if max(last - start, 0 if self.causal else end - first) >= self.window:
                return Sight.SOME
        if self.rule is not None or self.segments is not None:
            return Sight.SOME
        if not self.causal or first >= end:
            return Sight.ALL
        return Sight.CAUSAL if queries == keys else Sight.SOME

    def tile(self, queries: range, keys: range) -> torch.Tensor:
        """What is seen, [b or 1, 1, queries, keys]."""
        q, k = places(queries, self.like)[:, None], places(keys, self.like)
        samples = torch.arange(len(self.like), device=self.like.device).view(-1, 1, 1, 1)
        seen = torch.ones(1, 1, len(queries), len(keys), dtype=torch.bool, device=q.device)
        if self.causal:
            seen = seen & (q >= k)
        if self.window is not None:
            seen = seen & ((q - k).abs() < self.window)
        if self.segments is not None:
            seen = seen & (self.segments[samples, q] == self.segments[samples, k])
        if self.rule is not None:
            seen = seen & torch.as_tensor(self.rule.allowed(samples, samples[:1] * 0, q, k))
        return seen

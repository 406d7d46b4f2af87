"""Cut what a layer is given beside its hidden state to the tokens that are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from drivetrain.contracts import MaskRule
from drivetrain.errors import TrainingError

MASKS = ("attention_mask", "attn_mask", "mask", "causal_mask", "padding_mask", "alibi")
OTHERS = ("encoder_", "cross_", "past_key_value", "layer_past", "cache_params")
"""How arguments begin that are not about the tokens of this sequence."""


@dataclass(frozen=True)
class Cut:
    """Cuts arguments of one call.

    Args:
        kept: [b, k], rising.
        length: tokens of the sequence.
        mask_name: the attention mask's name in the config, if it has one.
    """

    kept: torch.Tensor
    length: int
    mask_name: str | None

    def __call__(self, name: str, value: Any) -> Any:
        """The argument ``name`` for the kept tokens; nested values keep their name."""
        if name.startswith(OTHERS):
            return value
        if isinstance(value, MaskRule):
            return self._rule(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(name, value)
        if isinstance(value, tuple) and type(value) is tuple:
            return tuple(self(name, item) for item in value)
        if isinstance(value, list):
            return [self(name, item) for item in value]
        if isinstance(value, Mapping) and type(value) is dict:
            return {key: self(str(key), item) for key, item in value.items()}
        if type(value).__name__ == "BlockMask":
            raise TrainingError(
                "random_ltd cannot cut a BlockMask of flex attention: use another "
                "attn_implementation, such as sdpa"
            )
        return value

    def _tensor(self, name: str, value: torch.Tensor) -> torch.Tensor:
        s, shape = self.length, value.shape
        batch, kept = self.kept.shape
        if name == "cache_position":
            return value[:kept]
        if value.dim() >= 2 and shape[-1] == shape[-2] == s:
            return _both(value, self.kept)
        if (name == self.mask_name or name in MASKS) and value.dim() >= 1 and shape[-1] == s:
            return _last(value, self.kept)
        if value.dim() >= 2 and shape[1] == s and shape[0] in (1, batch):
            return _along(value, self.kept)
        if value.dim() >= 1 and shape[0] == s:
            return value[self.kept[0]]  # all rows keep the same tokens, see `unbatched`
        return value

    def _rule(self, rule: MaskRule) -> MaskRule:
        kept = self.kept

        def allowed(b: Any, h: Any, q: Any, k: Any) -> Any:
            return rule.allowed(b, h, kept[b, q], kept[b, k])

        def build() -> torch.Tensor | None:
            whole = rule.tensor
            return None if whole is None else _both(whole, kept)

        padding = None if rule.padding is None else rule.padding.gather(1, kept)
        return replace(rule, allowed=allowed, build=build, padding=padding)


def unbatched(arguments: Mapping[str, Any], length: int, batch: int) -> bool:
    """True if a tensor has the sequence as its first dimension, and so no batch.

    Such a table (positions, rotations) has one row for each token, whatever the sample; cut for
    each sample it would get a dimension that the layer does not expect.
    """

    def found(name: str, value: Any) -> bool:
        if name.startswith(OTHERS):
            return False
        if isinstance(value, torch.Tensor):
            square = value.dim() >= 2 and value.shape[-1] == value.shape[-2] == length
            if square:
                return value.dim() == 2
            first = value.dim() >= 1 and value.shape[0] == length != batch
            return first and name not in MASKS and name != "cache_position"
        if isinstance(value, (tuple, list)):
            return any(found(name, item) for item in value)
        return isinstance(value, dict) and any(found(str(k), v) for k, v in value.items())

    return any(found(name, value) for name, value in arguments.items())


def _along(value: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Dimension 1 of [b or 1, s, ...]."""
    value = value.expand(kept.shape[0], *value.shape[1:])
    places = kept.reshape(*kept.shape, *[1] * (value.dim() - 2))
    return value.gather(1, places.expand(*kept.shape, *value.shape[2:]))


def _last(value: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The last dimension of [s], [b or 1, s] or [b or 1, ..., s]."""
    if value.dim() == 1:
        return value[kept[0]]
    value = value.expand(kept.shape[0], *value.shape[1:])
    places = kept.reshape(kept.shape[0], *[1] * (value.dim() - 2), kept.shape[1])
    return value.gather(-1, places.expand(*value.shape[:-1], kept.shape[1]))


def _both(value: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The last two dimensions of [s, s], [b or 1, s, s] or [b or 1, h, s, s]."""
    if value.dim() == 2:
        return value[kept[0]][:, kept[0]]
    value = value.expand(kept.shape[0], *value.shape[1:])
    ones = [1] * (value.dim() - 3)
    rows = kept.reshape(kept.shape[0], *ones, kept.shape[1], 1)
    value = value.gather(-2, rows.expand(*value.shape[:-2], kept.shape[1], value.shape[-1]))
    columns = kept.reshape(kept.shape[0], *ones, 1, kept.shape[1])
    return value.gather(-1, columns.expand(*value.shape[:-1], kept.shape[1]))


Forward = Callable[..., Any]

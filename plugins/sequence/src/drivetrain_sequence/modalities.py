"""Models of several modalities: their language model shares sequences, all before it does not.

[Note: fusion] Images and text of a sequence meet in its embeddings, before the language model. What
makes these (towers, projections, the merge) runs on whole inputs, on every rank of a sequence
alike, but for blocks of towers that ranks share (``towers.py``); then the language model is called,
and there the fused sequence is cut. Results of towers that the first blocks add to tokens of images
(Qwen3-VL) are cut with these tokens; of masks, see [Note: masks of images] in ``whole_masks.py``.
Each rank's gradients of a tower are those that its own tokens give, and the engine adds up what
ranks have, so towers learn from all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from drivetrain.errors import ConfigError, TrainingError
from drivetrain_sequence.inputs import LOSSES, Cutter, Labels, Prepared, padded, refuse_whole
from drivetrain_sequence.layout import Cut
from drivetrain_sequence.losses import IGNORED
from drivetrain_sequence.turn import Turn
from drivetrain_sequence.whole_masks import Masks, for_parts, is_of_whole, padding_of

_NEEDS = {"inputs_embeds", "attention_mask", "position_ids"}
_MARKS, _ROWS = "visual_pos_masks", "deepstack_visual_embeds"
"""Which tokens [b, S] are of images; and tensors with a row for each of them, in order, that the
first blocks add (DeepStack, arXiv 2406.04334)."""

_NUMBERS = "numbers of rows"
"""Stands for no argument: is cut like one."""

_TAKES = {*_NEEDS, _MARKS, _ROWS, "input_ids", "past_key_values", "use_cache", "cache_position"}
"""Arguments of a language model of which it is known how they are cut."""


def language_model_of(model: Any) -> nn.Module | None:
    """The part of a model of Transformers that takes text and what was merged into it.

    Returns:
        ``None`` for models of text alone, and of none.

    Raises:
        ConfigError: it is not known how to cut what goes into it.
    """
    modalities = getattr(model, "input_modalities", "text")
    if isinstance(modalities, str) or "text" not in modalities or len(modalities) == 1:
        return None
    found: nn.Module = model.get_decoder()
    name = type(model).__name__
    taken = inspect.signature(found.forward).parameters
    named = {n for n, p in taken.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    if found is model or not named >= _NEEDS:
        raise ConfigError(
            f"{name} takes {' and '.join(modalities)}, and has no language model that is given "
            "inputs_embeds, which ranks could share out: leave out sequence_parallel_size"
        )
    if others := sorted(named - _TAKES):
        raise ConfigError(
            f"{name} gives {' and '.join(others)} to its language model, of which it is not known "
            "how ranks share them out: leave out sequence_parallel_size"
        )
    return found


class FusedCutter(Cutter):
    """Cuts the labels of a model's batches, and leaves all else for :class:`Door`."""

    def __call__(self, arguments: Mapping[str, Any]) -> Prepared:
        given = dict(arguments)
        refuse_whole(given)
        name = next((name for name in self.tokens if name in given), None)
        if name is None:
            raise TrainingError(
                f"a batch without {' or '.join(self.tokens)} cannot be cut along its sequences; it "
                f"has {', '.join(given) or 'nothing'}"
            )
        batch, length = given[name].shape[:2]
        labels = self._labels(given, (batch, length))
        if labels is None:
            return Prepared(given)
        missing = -length % self.cut.multiple
        places = self.cut.of_rank(length + missing, self._rank).to(labels.device)
        return self._with_labels(given, padded(labels, missing, IGNORED)[:, places])

    def few(self, arguments: Mapping[str, Any], count: int) -> dict[str, Any] | None:
        """Text alone: towers see whole inputs, so there is nothing to compare."""
        known = {*self.tokens, "attention_mask"}
        return super().few({n: x for n, x in arguments.items() if n in known}, count)


class Door:
    """Cuts what a model of several modalities gives to its language model.

    Args:
        model: the whole of it.
        inner: its language model.
        turn: how sequences are shared out; is told what of the model sees whole ones.
        rank: this rank, of those of a sequence.
    """

    def __init__(self, model: nn.Module, inner: nn.Module, turn: Turn, rank: int) -> None:
        self._name = type(model).__name__
        self._turn = turn
        self._cutter = Cutter(inner, turn.cut, rank, None)
        inside = set(inner.modules())
        turn.whole = {part for part in model.modules() if part not in inside}
        self._hook = inner.register_forward_pre_hook(self._cut, with_kwargs=True)

    def undo(self) -> None:
        """Leave the language model as it was found."""
        self._hook.remove()
        self._turn.whole = set()

    def _cut(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._turn.in_parts(module):
            return None
        aside = {name: kwargs[name] for name in LOSSES if name in kwargs}
        others = {name: value for name, value in kwargs.items() if name not in aside}
        given = self._cutter.named(args, others)
        masks, rows = self._whole_masks(given), given.pop(_ROWS, None)
        if rows is not None:
            marks = given[_MARKS]
            given[_NUMBERS] = marks.flatten().cumsum(0).view(marks.shape) - 1
        self._cutter.cut = self._turn.cut
        keywords = self._cutter(given).keywords
        if masks is not None:
            like = next(given[name] for name in self._cutter.tokens if name in given)
            missing = -like.shape[1] % self._turn.cut.multiple
            keywords["attention_mask"] = for_parts(masks, like, missing, self._name)
        if rows is not None:
            own = keywords.pop(_NUMBERS)[keywords[_MARKS]]
            keywords[_ROWS] = [x[own] for x in rows]
        return (), {**keywords, **aside}

    def _whole_masks(self, given: dict[str, Any]) -> Masks | None:
        """Masks that the model has made, in whose place ``given`` has their padding afterwards.

        Raises:
            TrainingError: they are not made of functions of indices.
        """
        mask = given.get("attention_mask")
        if mask is None or isinstance(mask, torch.Tensor):
            return None
        if not is_of_whole(mask):
            raise TrainingError(
                f"{self._name} makes the attention mask of its language model itself, and not as "
                "functions of indices, so ranks cannot share its sequences: leave out "
                "sequence_parallel_size"
            )
        del given["attention_mask"]
        if (padding := padding_of(mask)) is not None:
            given["attention_mask"] = padding
        masks: Masks = mask
        return masks


def fused_cutter(
    model: nn.Module, inner: nn.Module, turn: Turn, rank: int, labels: Labels | None
) -> tuple[FusedCutter, Door]:
    """What cuts the batches of a model of several modalities; see :class:`Door`."""
    cut: Cut = turn.cut
    return FusedCutter(model, cut, rank, labels), Door(model, inner, turn, rank)

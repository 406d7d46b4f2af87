"""Batches of whole sequences, cut into the parts of ranks, in every forward of the engine."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from drivetrain.errors import TrainingError
from drivetrain_sequence.layout import Cut, Layout, segments_of
from drivetrain_sequence.losses import IGNORED, shifted

TOKENS = ("input_ids", "inputs_embeds")
"""Arguments that say what the sequence is."""

LOSSES = ("labels", "shift_labels", "num_items_in_batch")
"""Arguments that only the loss is made of."""

_ONLY_WHOLE = {
    "past_key_values": "a cache of keys and values",
    "output_attentions": "attention weights",
    "encoder_hidden_states": "states of an encoder",
}

_PLACES = ("start_positions", "end_positions")
"""Places in whole sequences, of which models that find answers in texts make their loss."""

_ENDS = {"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"}
"""Arguments of Transformers that say where the packed sequences of a row begin."""

_WITH_ROWS = 4
"""Ways of numbering tokens, of models that know places in images; the first is that in the row."""

Labels = Literal["next", "same"]
"""Labels of the token after each, as causal models have them, or of the token itself."""


@dataclass
class Prepared:
    """A batch as a rank's model takes it.

    Args:
        keywords: arguments of the model's forward.
        labels: [b, s], those of this rank's tokens, shifted if ``causal``; ``None`` without.
        counted: how many labels of this rank count.
    """

    keywords: dict[str, Any]
    labels: torch.Tensor | None = None
    counted: int | torch.Tensor = 0


class Cutter:
    """Cuts the arguments of a model of Transformers.

    Every rank of a sequence is given the same whole batch. Rows are padded to the next length that
    can be cut; padding is a key for nobody and has no label.

    Args:
        model: whose forward takes ``input_ids`` (or ``inputs_embeds``) and ``position_ids``.
        cut: how tokens are shared out.
        rank: this rank, of those of a sequence.
        labels: what labels are: those of the next token, of the token itself, or (``None``) of
            something that is no token.
    """

    tokens: tuple[str, ...] = TOKENS

    def __init__(self, model: nn.Module, cut: Cut, rank: int, labels: Labels | None) -> None:
        self._signature = inspect.signature(model.forward)
        self._model = model
        self.cut = cut
        self._rank = rank
        self._kind = labels
        self._causal = labels == "next"

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments by name, without those that are ``None``."""
        # What is missing is given here (position_ids), or missed by the model itself.
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                bound |= bound.pop(name, {})
        return {name: value for name, value in bound.items() if value is not None}

    def __call__(self, arguments: Mapping[str, Any]) -> Prepared:
        """Cut one batch.

        Raises:
            TrainingError: an argument that cannot be cut, with its name.
        """
        given = dict(arguments)
        if self.cut.cuts:
            refuse_whole(given)
        name = next((name for name in TOKENS if name in given), None)
        if name is None:
            raise TrainingError(
                f"a batch without {' or '.join(TOKENS)} cannot be cut along its sequences; it has "
                f"{', '.join(given) or 'nothing'}"
            )
        batch, length = given[name].shape[:2]
        missing = -length % self.cut.multiple
        labels = self._labels(given, (batch, length))
        if not self.cut.cuts:
            given = without_cache(self._signature, given)
            return Prepared(given) if labels is None else self._with_labels(given, labels)
        layout, positions = batch_layout(given, batch, length, missing, given[name].device)
        places = self.cut.of_rank(length + missing, self._rank).to(given[name].device)
        keywords: dict[str, Any] = {}
        for key, value in given.items():
            if isinstance(value, torch.Tensor) and value.dim() > 1:
                if value.shape[1] != length or value.shape[0] not in (1, batch):
                    raise uncut(key, value, batch, length)
                value = padded(value, missing, 0)[:, places]
            keywords[key] = value
        keywords["position_ids"] = positions[..., places]
        # Positions of tokens that are not one after the other would be taken for packed rows.
        in_order = self.cut.ring == 1 and (self.cut.chunk is None or self.cut.ranks == 1)
        if layout is not None or not in_order:
            known = layout or Layout()
            device = places.device
            keywords["attention_mask"] = known.attached(batch, length + missing, device)
        if "use_cache" in self._signature.parameters:
            keywords["use_cache"] = False
        if labels is None:
            return Prepared(keywords)
        own = padded(labels, missing, IGNORED)[:, places]
        return self._with_labels(keywords, own)

    def few(self, arguments: Mapping[str, Any], count: int) -> dict[str, Any] | None:
        """One row of ``count`` tokens for each rank, without labels.

        Returns:
            Arguments; ``None`` if the batch has too few tokens to cut.
        """
        tokens = next(arguments[name] for name in self.tokens if name in arguments)
        if not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
            return None
        multiple, length = self.cut.multiple, tokens.shape[1]
        few = min(count * multiple, length // multiple * multiple)
        if not few:
            return None
        return {
            name: value[:1, :few] if _has_tokens(value, length) else value
            for name, value in arguments.items()
            if name not in LOSSES
        }

    def _with_labels(self, keywords: dict[str, Any], own: torch.Tensor) -> Prepared:
        counted = (own != IGNORED).sum()
        if self._causal:
            return Prepared({**keywords, "labels": own, "shift_labels": own}, own, counted)
        # The mean of no losses is not finite; the mean of one is taken times 0.
        first = torch.zeros_like(own, dtype=torch.bool)
        first[0, 0] = True
        usable = torch.where(first & (counted == 0), 0, own)
        return Prepared({**keywords, "labels": usable}, own, counted)

    def _labels(self, given: dict[str, Any], shape: tuple[int, ...]) -> torch.Tensor | None:
        labels: torch.Tensor | None = given.pop("labels", None)
        ready: torch.Tensor | None = given.pop("shift_labels", None)
        found = labels if ready is None else ready
        told = [name for name in _PLACES if name in given]
        if told and self.cut.ranks > 1:
            raise TrainingError(
                f"{' and '.join(told)}: the loss of {type(self._model).__name__} is a choice among "
                "all tokens of a sequence, which several ranks share (sequence_parallel_size): "
                "leave them out and compute it of outputs"
            )
        if found is not None and self._kind is None:
            raise TrainingError(
                f"the loss of {type(self._model).__name__} is none of single tokens, so it cannot "
                "be computed over parts of sequences: leave out labels and compute it of outputs"
            )
        if found is not None and found.shape != shape:
            raise TrainingError(
                f"labels of shape {tuple(found.shape)} are not one for each of {shape[1]} tokens "
                f"of {shape[0]} rows: only losses of tokens are computed over parts of sequences"
            )
        if ready is not None and not self._causal:
            raise TrainingError(f"{type(self._model).__name__} takes labels, not shift_labels")
        return shifted(labels) if ready is None and labels is not None and self._causal else found


class OwnCutter(Cutter):
    """Cuts the arguments of a model that is not of Transformers: the same part of all of them.

    The first argument is the sequence; the model's forward takes ``position_ids``, which it uses if
    it numbers tokens, and returns the mean over the tokens that it is given.
    """

    def __init__(self, model: nn.Module, cut: Cut, rank: int) -> None:
        super().__init__(model, cut, rank, None)
        self.tokens = (next(iter(self._signature.parameters)),)

    def __call__(self, arguments: Mapping[str, Any]) -> Prepared:
        given = dict(arguments)
        tokens = given.get(self.tokens[0])
        if not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
            raise TrainingError(f"{self.tokens[0]} is no tensor [rows, tokens, ...] to cut")
        batch, length = tokens.shape[:2]
        if length % self.cut.multiple:
            raise TrainingError(
                f"{length} tokens cannot be cut into {self.cut.multiple} equal parts "
                "(sequence_parallel_size): pad the sequences, and give each loss the number of its "
                "tokens as weight"
            )
        places = self.cut.of_rank(length, self._rank).to(tokens.device)
        positions = torch.arange(length, device=tokens.device)[None]
        given.setdefault("position_ids", positions)
        for key, value in given.items():
            if isinstance(value, torch.Tensor) and value.dim() > 1:
                if value.shape[1] != length or value.shape[0] not in (1, batch):
                    raise uncut(key, value, batch, length)
                given[key] = value[:, places]
        return Prepared(given)


class Whole(OwnCutter):
    """Leaves arguments of a model as they are, where one rank computes its sequences in chunks."""

    def __call__(self, arguments: Mapping[str, Any]) -> Prepared:
        return Prepared(dict(arguments))


def _has_tokens(value: Any, length: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[1] == length


def is_of_transformers(module: nn.Module) -> bool:
    """Whether a module is a model of Transformers."""
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def without_cache(
    signature: inspect.Signature, given: Mapping[str, Any], named: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a forward is given by keyword, with no cache of keys and values if nobody asks for one.

    A model of Transformers that begins a cache does not see from ``position_ids`` that rows are
    packed, and lets tokens attend to other sequences of their row.

    Args:
        signature: of the forward.
        given: arguments by keyword.
        named: all arguments by name, if some are given by position.
    """
    asked = {"use_cache", "past_key_values"} & (given if named is None else named).keys()
    if asked or "use_cache" not in signature.parameters:
        return dict(given)
    return {**given, "use_cache": False}


def refuse_whole(given: Mapping[str, Any]) -> None:
    """Refuse arguments that are of whole sequences.

    Raises:
        TrainingError: with its name.
    """
    for name, what in _ONLY_WHOLE.items():
        if given.get(name) is not None and given.get(name) is not False:
            raise TrainingError(
                f"{name}: {what} cannot be cut along the sequence, which several ranks share "
                "(sequence_parallel_size): leave it out"
            )
    told = sorted(_ENDS & given.keys())
    if told and "position_ids" not in given:
        raise TrainingError(
            f"{' and '.join(told)} say that rows are packed, and position_ids are missing, by "
            "which ranks tell where each of their sequences begins (sequence_parallel_size): give "
            "position_ids that begin again at each packed sequence"
        )
    if isinstance(kept := given.get("logits_to_keep", 0), torch.Tensor) or kept:
        raise TrainingError("logits_to_keep picks tokens of whole sequences: leave it out")


def batch_layout(
    given: dict[str, Any], batch: int, length: int, missing: int, device: torch.device
) -> tuple[Layout | None, torch.Tensor]:
    """Take the layout and the positions of a batch out of its arguments.

    Args:
        given: may have an ``attention_mask`` [b, S] and ``position_ids`` [1 or b, S], or
            [n, 1 or b, S] of models that number tokens in several ways.
        batch: rows.
        length: tokens of a row, S.
        missing: tokens that are added to each.
        device: of the batch.

    Returns:
        The layout of the padded batch, ``None`` where all is plain, and padded positions.

    Raises:
        TrainingError: they are not of the batch.
    """
    real: torch.Tensor | None = given.pop("attention_mask", None)
    positions: torch.Tensor | None = given.pop("position_ids", None)
    if real is not None and real.shape != (batch, length):
        raise TrainingError(
            f"an attention_mask of shape {tuple(real.shape)} cannot be cut: give one for "
            f"{length} tokens of {batch} rows, or position_ids that begin again at each packed "
            "sequence"
        )
    if real is not None and not _is_padding(real):
        raise TrainingError(
            "an attention_mask has other values than 0 and 1, as masks do that number packed "
            "sequences, and these would see each other: give position_ids that begin again at each "
            "packed sequence, and a mask of 0 and 1 or none"
        )
    if positions is not None and positions.shape[-2:] not in ((batch, length), (1, length)):
        raise TrainingError(
            f"position_ids of shape {tuple(positions.shape)} are not one for each of {length} "
            f"tokens of {batch} rows"
        )
    segments = None
    if positions is None:
        positions = torch.arange(length, device=device)[None]
    elif real is None:  # else positions are what the client says, but rows are not packed
        segments = _segments(positions, batch)
    numbers = padded(positions, missing, 0, positions.dim() - 1)
    added = real is None
    if real is not None:
        real = padded(real.bool(), missing, False)
    elif missing:
        real = torch.arange(length + missing, device=device).expand(batch, -1) < length
    if segments is not None:
        segments = padded(segments, missing, -1)
        return Layout(real, _of_rows(numbers).expand(batch, -1), segments, added), numbers
    return (None if real is None else Layout(real, added=added)), numbers


def _is_padding(mask: torch.Tensor) -> bool:
    """Whether a mask says no more than which tokens are real; one without values is taken to."""
    if mask.dtype == torch.bool or mask.is_meta:
        return True
    return bool(((mask == 0) | (mask == 1)).all())


def _segments(positions: torch.Tensor, batch: int) -> torch.Tensor | None:
    """Which packed sequence tokens belong to; places in images alone do not say."""
    if positions.dim() == 3 and len(positions) != _WITH_ROWS:
        return None
    return segments_of(_of_rows(positions).expand(batch, -1))


def _of_rows(positions: torch.Tensor) -> torch.Tensor:
    return positions if positions.dim() == 2 else positions[0]


def padded(x: torch.Tensor, missing: int, value: float, dim: int = 1) -> torch.Tensor:
    """``x`` with ``missing`` more tokens along ``dim``."""
    if not missing:
        return x
    filling = x.new_full((*x.shape[:dim], missing, *x.shape[dim + 1 :]), value)
    return torch.cat([x, filling], dim)


def uncut(name: str, value: torch.Tensor, batch: int, length: int) -> TrainingError:
    """The error about an argument of which nothing says how it is cut."""
    return TrainingError(
        f"{name} of shape {tuple(value.shape)} cannot be cut along the sequence: {batch} rows of "
        f"{length} tokens are shared out over ranks (sequence_parallel_size), and nothing tells "
        "which part of it belongs to which"
    )

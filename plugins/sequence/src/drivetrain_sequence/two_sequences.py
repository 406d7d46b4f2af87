"""Models of an encoder and a decoder, each with a sequence of its own, both shared out.

Ranks have equal parts of both. Cross attention exchanges heads as any other does: queries of the
decoder's tokens, keys of the encoder's. What such models know of places by themselves, without
``position_ids``, is told them here: embeddings by place (BART), and biases of scores by distance
(T5), which a rank makes for all tokens and for its own heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from drivetrain.errors import ConfigError, TrainingError
from drivetrain_sequence.heads import HeadShare
from drivetrain_sequence.in_place_of import InPlaceOf
from drivetrain_sequence.inputs import (
    LOSSES,
    TOKENS,
    Cutter,
    Labels,
    Prepared,
    batch_layout,
    padded,
    refuse_whole,
    uncut,
)
from drivetrain_sequence.layout import Cut, Layout
from drivetrain_sequence.losses import IGNORED
from drivetrain_sequence.section import PATH
from drivetrain_sequence.turn import Turn

ENCODER, DECODER = "", "decoder_"
"""What the names of their arguments begin with."""

_NEEDS = {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
_PREPARE = "prepare_decoder_input_ids_from_labels"


class TwoSequences(Cutter):
    """Cuts the arguments of a model of Transformers with an encoder and a decoder."""

    tokens = tuple(DECODER + name for name in TOKENS)

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments by name, with the decoder's tokens, which labels say if nothing else does.

        Raises:
            TrainingError: there are no tokens for the decoder.
        """
        found = super().named(args, kwargs)
        if not any(name in found for name in self.tokens):
            prepare, labels = getattr(self._model, _PREPARE, None), found.get("labels")
            if prepare is None or labels is None or labels.dim() != 2:
                raise TrainingError(
                    f"a batch without {' or '.join(self.tokens)} or labels [rows, tokens] has no "
                    f"sequence for the decoder; it has {', '.join(found) or 'nothing'}"
                )
            found[self.tokens[0]] = prepare(labels)
        return found

    def __call__(self, arguments: Mapping[str, Any]) -> Prepared:
        given = dict(arguments)
        refuse_whole(given)
        if given.pop("encoder_outputs", None) is not None:
            raise TrainingError(
                "encoder_outputs are of whole sequences, which ranks share out "
                "(sequence_parallel_size): give the encoder's tokens"
            )
        name = next(name for name in self.tokens if name in given)
        shape, device = given[name].shape[:2], given[name].device
        labels = self._labels(given, tuple(shape))
        keywords = {**self._sequence(given, ENCODER), **self._sequence(given, DECODER)}
        for key, value in given.items():
            if isinstance(value, torch.Tensor) and value.dim() > 1:
                raise uncut(key, value, *shape)
            keywords[key] = value
        if "use_cache" in self._signature.parameters:
            keywords["use_cache"] = False
        if labels is None:
            return Prepared(keywords)
        missing = -shape[1] % self.cut.multiple
        places = self.cut.of_rank(shape[1] + missing, self._rank).to(device)
        return self._with_labels(keywords, padded(labels, missing, IGNORED)[:, places])

    def few(self, arguments: Mapping[str, Any], count: int) -> dict[str, Any] | None:
        """One row of at most ``count`` tokens of either sequence for each rank, without labels."""
        found: dict[str, Any] = {}
        for prefix in (ENCODER, DECODER):
            name = next((prefix + n for n in TOKENS if prefix + n in arguments), None)
            if name is None:
                return None
            length = arguments[name].shape[1]
            few = min(count * self.cut.multiple, length // self.cut.multiple * self.cut.multiple)
            if not few:
                return None
            own = {name, f"{prefix}attention_mask"} & arguments.keys()
            found |= {key: arguments[key][:1, :few] for key in own}
        others = {n: x for n, x in arguments.items() if n not in LOSSES and n not in found}
        return {**others, **found}

    def _sequence(self, given: dict[str, Any], prefix: str) -> dict[str, Any]:
        """The arguments of one of the two, cut; taken out of ``given``."""
        name = next((prefix + n for n in TOKENS if prefix + n in given), None)
        if name is None:
            raise TrainingError(
                f"a batch without {' or '.join(prefix + n for n in TOKENS)} cannot be cut along "
                f"its sequences; it has {', '.join(given) or 'nothing'}"
            )
        tokens, mask = given.pop(name), f"{prefix}attention_mask"
        batch, length = tokens.shape[:2]
        missing = -length % self.cut.multiple
        told = {} if given.get(mask) is None else {"attention_mask": given[mask]}
        given.pop(mask, None)
        layout, _ = batch_layout(told, batch, length, missing, tokens.device)
        places = self.cut.of_rank(length + missing, self._rank).to(tokens.device)
        attached = (layout or Layout()).attached(batch, length + missing, tokens.device)
        return {name: padded(tokens, missing, 0)[:, places], mask: attached}


class Numbered:
    """Tells an embedding of places, which numbers the tokens that it is given, where they are.

    Args:
        module: its forward takes tokens or their shape first, and ``position_ids`` [s].
        turn: how sequences are shared out.
        rank: this rank, of those of a sequence.
    """

    def __init__(self, module: nn.Module, turn: Turn, rank: int) -> None:
        self._turn, self._rank = turn, rank
        self._signature = inspect.signature(module.forward)
        self._hook = module.register_forward_pre_hook(self._number, with_kwargs=True)
        self.undo = self._hook.remove

    def _number(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._turn.in_parts(module):
            return None
        bound = self._signature.bind(*args, **kwargs).arguments
        first, given = next(iter(bound.values())), bound.get("position_ids")
        shape = first.shape if isinstance(first, torch.Tensor) else first
        own = int(shape[1] if given is None else given.shape[-1])
        weight: Any = module.weight
        cut, known = self._turn.cut, weight.shape[0] - int(getattr(module, "offset", 0))
        if own * cut.ranks > known:
            raise TrainingError(
                f"sequences of {own * cut.ranks} tokens (made a multiple of {cut.multiple} for "
                f"sequence_parallel_size) are longer than the {known} places that the model knows"
            )
        bound["position_ids"] = cut.of_rank(own * cut.ranks, self._rank).to(weight.device)
        return (), dict(bound)


class RelativeBias:
    """Has an attention make its bias by distance for all tokens and this rank's heads.

    Args:
        module: an attention with ``compute_bias(queries, keys, ...)``, which looks distances up in
            its ``relative_attention_bias`` [distances, heads].
        turn: how sequences are shared out.
        rank: this rank, of those of a sequence.
    """

    def __init__(self, module: Any, turn: Turn, rank: int) -> None:
        self._module, self._turn, self._rank = module, turn, rank
        self._table: Any = module.relative_attention_bias
        self._compute: Callable[..., torch.Tensor] = module.compute_bias
        self._look_up: Callable[[torch.Tensor], torch.Tensor] = self._table.forward
        self._replaced = (
            InPlaceOf(module, "compute_bias", self._whole),
            InPlaceOf(self._table, "forward", self._of_own_heads),
        )

    def undo(self) -> None:
        """Give the attention its functions back."""
        for each in self._replaced:
            each.undo()

    def _whole(self, queries: int, keys: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        ranks = self._turn.cut.ranks if self._turn.in_parts(self._module) else 1
        return self._compute(queries * ranks, keys * ranks, *args, **kwargs)

    def _of_own_heads(self, distances: torch.Tensor) -> torch.Tensor:
        if not self._turn.in_parts(self._module):
            return self._look_up(distances)
        weight, ranks = self._table.weight, self._turn.cut.ranks
        own = HeadShare.of(weight.shape[1], weight.shape[1], ranks).queries[self._rank]
        return nn.functional.embedding(distances, weight[:, own.start : own.stop])


class Unbiased:
    """Gives an attention without a bias by distance one that is none, for any number of tokens.

    It would make zeros for this rank's queries and keys.

    Args:
        module: an attention whose forward takes a ``position_bias``.
        turn: how sequences are shared out.
    """

    def __init__(self, module: nn.Module, turn: Turn) -> None:
        self._turn = turn
        self._hook = module.register_forward_pre_hook(self._give, with_kwargs=True)
        self.undo = self._hook.remove

    def _give(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._turn.in_parts(module) or kwargs.get("position_bias") is not None:
            return None
        like = next(module.parameters())
        return args, {**kwargs, "position_bias": like.new_zeros(1, 1, 1, 1)}


def two_sequences(
    model: Any, turn: Turn, rank: int
) -> tuple[TwoSequences, list[Callable[[], None]]]:
    """What cuts the batches of a model with an encoder and a decoder.

    Returns:
        The cutter; and functions that leave the model as it was found.

    Raises:
        ConfigError: its sequences cannot be shared out.
    """
    _check(model, turn.cut)
    labels: Labels | None = "same" if hasattr(model, _PREPARE) else None
    told = [part for each in model.modules() if (part := _told(each, turn, rank)) is not None]
    return TwoSequences(model, turn.cut, rank, labels), [part.undo for part in told]


def _check(model: Any, cut: Cut) -> None:
    name = type(model).__name__
    has = f"{name} has an encoder and a decoder with sequences of their own"
    if not inspect.signature(model.forward).parameters.keys() >= _NEEDS:
        raise ConfigError(
            f"{has}, and takes no {' and '.join(sorted(_NEEDS))}, so it is not known how ranks "
            "could share them: leave out sequence_parallel_size"
        )
    if cut.chunk is not None:
        raise ConfigError(
            f"{has}, of which one attends to the other, and keys of another sequence have no "
            f"chunks: leave out {PATH}.chunk"
        )
    biased = any(getattr(part, "has_relative_attention_bias", False) for part in model.modules())
    if biased and cut.ring > 1:
        raise ConfigError(
            f"{has}, and adds a bias to its scores, which is not computed by blocks of keys: use "
            f"{PATH}.ring_size 1"
        )


def _told(module: nn.Module, turn: Turn, rank: int) -> Numbered | RelativeBias | Unbiased | None:
    """What tells ``module`` where tokens are, if it asks."""
    biased = getattr(module, "has_relative_attention_bias", None)
    if biased is not None and hasattr(module, "compute_bias"):
        return RelativeBias(module, turn, rank) if biased else Unbiased(module, turn)
    taken = inspect.signature(module.forward).parameters
    if isinstance(module, nn.Embedding) and {"position_ids", "past_key_values_length"} <= set(
        taken
    ):
        return Numbered(module, turn, rank)
    return None

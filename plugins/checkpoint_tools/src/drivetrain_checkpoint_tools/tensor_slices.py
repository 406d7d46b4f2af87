"""Tensors that Megatron's layers cut over ranks, put together and cut again.

A checkpoint says by patterns how (``universal_checkpoint_info``); one without them follows the
names that Megatron gives to its layers. Whatever the rules, copies have to be equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from drivetrain.checkpoint.format.index import shown
from drivetrain.errors import CheckpointError
from drivetrain_checkpoint_tools.conversion import Source

How = Literal["columns", "rows", "pairs", "copies", "means"]
"""Parts of dimension 0 or 1; two halves of dimension 0, each in parts; all the same; averages."""

_INFO: Mapping[str, How] = {
    "tp_replicated_parameter_patterns": "copies",
    "parameter_to_average_patterns": "means",
    "parameter_with_2_sub_params_cat_dim_0": "pairs",
    "parameter_with_row_parallelism_patterns": "rows",
}
MEGATRON: Sequence[tuple[str, How]] = (
    (r".*norm\w*\.(weight|bias)", "copies"),
    (r".*position_embeddings\.weight", "copies"),
    (r".*(attention\.dense|dense_4h_to_h)\.bias", "copies"),
    (r".*(attention\.dense|dense_4h_to_h)\.weight", "rows"),
    (r"\d+\.(weight|bias)", "copies"),  # the last norm of a pipeline
    (r".*(query_key_value|dense_h_to_4h)\.(weight|bias)", "columns"),
    (r".*(word_embeddings|lm_head|output_layer)\.weight", "columns"),
)
_VOCABULARY = (r".*word_embeddings\.weight", r".*(lm_head|output_layer)\.weight")
_UNSUPPORTED = ("parameter_with_sub_params", "autotp_unsupported_parameter_patterns")
_UP, _DOWN = "dense_h_to_4h.", "dense_4h_to_h.weight"


@dataclass(frozen=True)
class Rules:
    """How the parameters of one checkpoint are cut.

    Args:
        patterns: matched from the start of a name, first match first.
        vocabulary: patterns of tables whose rows are tokens.
        tokens: how many of these are real; ``None`` leaves padding where it is.
        gated: whether two matrices lie in the first layer of an MLP.
        rest: how what matches no pattern is cut; ``None`` if it must not be there.
    """

    patterns: Sequence[tuple[re.Pattern[str], How]]
    vocabulary: Sequence[re.Pattern[str]] = ()
    tokens: int | None = None
    gated: bool = False
    rest: How | None = None

    @classmethod
    def of(cls, model: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Rules:
        """Those of a checkpoint.

        Args:
            model: what one of its model files holds.
            shapes: name -> shape of the parts of one rank.

        Raises:
            CheckpointError: it has rules that are not known here, or is of an old layout.
        """
        info = model.get("universal_checkpoint_info") or {}
        if float(model.get("checkpoint_version", 3.0)) < 2:
            raise CheckpointError(
                f"checkpoint_version {model['checkpoint_version']} of Megatron joins queries, keys "
                "and values in another order: load and save it with a newer Megatron first"
            )
        if unknown := [key for key in _UNSUPPORTED if info.get(key)]:
            raise CheckpointError(f"universal_checkpoint_info has {unknown[0]}, which is not known")
        tokens = info.get("original_vocab_size")
        if info and any(info.get(key) for key in _INFO):
            rules = [
                (re.compile(p), how) for key, how in _INFO.items() for p in info.get(key) or ()
            ]
            tables = [re.compile(p) for p in info.get("vocabulary_parameter_patterns") or ()]
            return cls(rules, tables, tokens, rest="columns")
        rules = [(re.compile(pattern), how) for pattern, how in MEGATRON]
        return cls(rules, [re.compile(p) for p in _VOCABULARY], tokens, _gated(shapes))

    def how(self, name: str) -> How:
        """How one parameter is cut.

        Raises:
            CheckpointError: the checkpoint does not say it, and the name is none of Megatron's.
        """
        how = next((how for pattern, how in self.patterns if pattern.match(name)), self.rest)
        if how is None:
            raise CheckpointError(
                f"how {shown(name)} is cut over tensor-parallel ranks is not known: the checkpoint "
                "has no universal_checkpoint_info, and this is no layer of Megatron's; make it "
                "universal with DeepSpeed's ds_to_universal.py first, then import that"
            )
        return "pairs" if self.gated and _UP in name else how

    def rows(self, name: str, whole: int) -> int:
        """Rows without the padding of a vocabulary."""
        is_table = any(pattern.match(name) for pattern in self.vocabulary)
        return min(whole, self.tokens) if is_table and self.tokens else whole


def how_of(name: str, *, gated: bool) -> How:
    """How Megatron cuts one of its parameters.

    Args:
        name: of the parameter.
        gated: whether two matrices lie in the first layer of an MLP.

    Raises:
        CheckpointError: Megatron has no such parameter.
    """
    return Rules([(re.compile(p), how) for p, how in MEGATRON], gated=gated).how(name)


def _gated(shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether the first layer of an MLP has twice the features that the second one reads."""
    for name, shape in shapes.items():
        if name.endswith(_UP + "weight"):
            down = shapes.get(name.replace(_UP + "weight", _DOWN))
            return down is not None and shape[0] == 2 * down[1]
    return False


def joined(rules: Rules, ranks: Sequence[Sequence[Source]], place: str) -> Iterator[Source]:
    """Whole tensors of the parts that tensor-parallel ranks have.

    Args:
        rules: how they are cut.
        ranks: the parts of each rank.
        place: for messages.

    Raises:
        CheckpointError: ranks have other tensors, or of other shapes.
    """
    tables = [{(source.kind, source.name): source for source in sources} for sources in ranks]
    every = dict.fromkeys(key for table in tables for key in table)
    for kind, name in every:
        lacking = [number for number, table in enumerate(tables) if (kind, name) not in table]
        if lacking:
            raise CheckpointError(
                f"{shown(name)} ({shown(kind)}) is not among the parts of tensor-parallel rank "
                f"{lacking[0]} in {place}"
            )
        parts = [table[kind, name] for table in tables]
        alike = not parts[0].shape or kind == "buffer"
        how: How = "copies" if alike else rules.how(name)
        yield _whole(rules, how, parts, place)


def _whole(rules: Rules, how: How, parts: Sequence[Source], place: str) -> Source:
    first, dim = parts[0], 1 if how == "rows" else 0
    shape = list(first.shape)
    same = all(p.dtype == first.dtype and len(p.shape) == len(shape) for p in parts)
    others = [p.shape[:dim] + p.shape[dim + 1 :] for p in parts]
    uneven = how == "pairs" and any(p.shape[0] % 2 for p in parts)
    if not same or uneven or dim >= max(1, len(shape)) or len(set(others)) > 1:
        raise CheckpointError(
            f"parts of {shown(first.name)} in {place} do not fit together along dimension {dim}: "
            f"{', '.join(str(list(p.shape)) for p in parts)}"
        )
    if how in ("columns", "rows", "pairs"):
        shape[dim] = sum(part.shape[dim] for part in parts)
    if shape and dim == 0:
        shape[0] = rules.rows(first.name, shape[0])
    read = partial(_read, how, parts, tuple(shape))
    return Source(first.kind, first.name, first.dtype, tuple(shape), read)


def _read(how: How, parts: Sequence[Source], shape: tuple[int, ...]) -> torch.Tensor:
    tensors = [part.read() for part in parts]
    whole = join(how, tensors)
    if how == "copies" and not all(torch.equal(tensors[0], other) for other in tensors[1:]):
        raise CheckpointError(
            f"{shown(parts[0].name)} ({shown(parts[0].kind)}) should be the same on all "
            "tensor-parallel ranks, and differs"
        )
    return whole[: shape[0]] if shape else whole


def join(how: How, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The whole of parts in the order of ranks."""
    match how:
        case "copies":
            return parts[0]
        case "means":
            return torch.stack([part.float() for part in parts]).mean(0).to(parts[0].dtype)
        case "pairs":
            halves = [part.chunk(2) for part in parts]
            return torch.cat([*(first for first, _ in halves), *(second for _, second in halves)])
        case _:
            return torch.cat(list(parts), 1 if how == "rows" else 0)


def cut(how: How, whole: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """Equal parts of a whole tensor, one for each rank.

    Raises:
        ValueError: it has no equal parts.
    """
    if how in ("copies", "means"):
        return [whole] * ranks
    dim, count = (1 if how == "rows" else 0), ranks * (2 if how == "pairs" else 1)
    if whole.shape[dim] % count:
        raise ValueError(
            f"{whole.shape[dim]} elements of dimension {dim} do not make {count} parts"
        )
    parts = whole.chunk(count, dim)
    if how == "pairs":
        return [torch.cat([parts[rank], parts[ranks + rank]]) for rank in range(ranks)]
    return [part.contiguous() for part in parts]


def first_of_each(sources: Iterable[Source]) -> list[Source]:
    """One source for each kind and name: stages of a pipeline have copies of what is tied."""
    found: dict[tuple[str, str], Source] = {}
    for source in sources:
        found.setdefault((source.kind, source.name), source)
    return list(found.values())

"""Weights between Megatron-DeepSpeed's layout and that of Transformers, both ways.

The layouts differ in names, in what is one matrix (queries, keys and values; gate and up), in the
order of rows of such a matrix, and in rows that fill up a vocabulary::

    Transformers   q: head 0, 1, 2, 3   k: head 0, 1   v: head 0, 1
    Megatron       [q 0, q 1, k 0, v 0], [q 2, q 3, k 1, v 1]     for each group of query heads

Weights of the same family have the same tables below; which one fits is told by the names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from drivetrain.checkpoint.format.index import shown
from drivetrain.checkpoint.format.reading import read_whole
from drivetrain.checkpoint.format.safetensors_file import find_weights, open_weights
from drivetrain.checkpoint.format.tensor_file import TensorEntry
from drivetrain.errors import CheckpointError
from drivetrain_checkpoint_tools.conversion import Source
from drivetrain_checkpoint_tools.deepspeed import read_saved
from drivetrain_checkpoint_tools.exporting import write_weights
from drivetrain_checkpoint_tools.tensor_slices import MEGATRON, cut, how_of

Tensors = Mapping[str, Callable[[], torch.Tensor]]
"""Name -> what reads a tensor."""


@dataclass(frozen=True)
class Sizes:
    """What names do not tell, from a model's ``config.json``.

    Args:
        heads: of queries.
        groups: heads of keys and values.
        tokens: of the vocabulary.
    """

    heads: int
    groups: int
    tokens: int

    @classmethod
    def of(cls, config: Path) -> Sizes:
        """Those of a ``config.json``.

        Raises:
            CheckpointError: it is none, or lacks a number.
        """
        try:
            values = json.loads(config.read_text("utf-8"))
            heads = values.get("num_attention_heads") or values["n_head"]
            sizes = (heads, values.get("num_key_value_heads") or heads, values["vocab_size"])
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{config} is no config.json of a model: {error!r}") from error
        if any(type(n) is not int or n < 1 for n in sizes) or sizes[0] % sizes[1]:
            raise CheckpointError(f"{config} has {sizes[0]} heads and {sizes[1]} of keys")
        return cls(*sizes)


# -- how tensors correspond ------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Tensors of both layouts that are the same.

    Args:
        megatron: name; ``#`` is the number of a layer.
        others: names of what it is made of, in Transformers.
        kind: ``plain``, ``tokens`` (rows fill up), ``heads`` (queries, keys and values) or
            ``pairs`` (gate and up).
        transposed: whether Transformers has its matrix as [in, out].
    """

    megatron: str
    others: tuple[str, ...]
    kind: str = "plain"
    transposed: bool = False


_UP, _ATTENTION, _LAYER = "mlp.dense_h_to_4h", "self_attention", "encoder.layers.#."


def _both(megatron: str, *others: str, **how: Any) -> list[Row]:
    """A row for weights, and one for biases."""
    ends = ("weight", "bias")
    return [Row(f"{megatron}.{e}", tuple(f"{o}.{e}" for o in others), **how) for e in ends]


_GATED = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "tokens"),
    *_both(f"{_LAYER}input_layernorm", "model.layers.#.input_layernorm"),
    *_both(
        f"{_LAYER}{_ATTENTION}.query_key_value",
        *(f"model.layers.#.self_attn.{n}_proj" for n in "qkv"),
        kind="heads",
    ),
    *_both(f"{_LAYER}{_ATTENTION}.dense", "model.layers.#.self_attn.o_proj"),
    *_both(f"{_LAYER}post_attention_layernorm", "model.layers.#.post_attention_layernorm"),
    *_both(
        f"{_LAYER}{_UP}",
        *(f"model.layers.#.mlp.{n}_proj" for n in ("gate", "up")),
        kind="pairs",
    ),
    *_both(f"{_LAYER}mlp.dense_4h_to_h", "model.layers.#.mlp.down_proj"),
    *_both("encoder.final_layernorm", "model.norm"),
    Row("output_layer.weight", ("lm_head.weight",), "tokens"),
)
_LEARNED_POSITIONS = (
    Row("embedding.word_embeddings.weight", ("transformer.wte.weight",), "tokens"),
    Row("embedding.position_embeddings.weight", ("transformer.wpe.weight",)),
    *_both(f"{_LAYER}input_layernorm", "transformer.h.#.ln_1"),
    *_both(
        f"{_LAYER}{_ATTENTION}.query_key_value",
        "transformer.h.#.attn.c_attn",
        kind="heads",
        transposed=True,
    ),
    *_both(f"{_LAYER}{_ATTENTION}.dense", "transformer.h.#.attn.c_proj", transposed=True),
    *_both(f"{_LAYER}post_attention_layernorm", "transformer.h.#.ln_2"),
    *_both(f"{_LAYER}{_UP}", "transformer.h.#.mlp.c_fc", transposed=True),
    *_both(f"{_LAYER}mlp.dense_4h_to_h", "transformer.h.#.mlp.c_proj", transposed=True),
    *_both("encoder.final_layernorm", "transformer.ln_f"),
)
_TABLES = (_GATED, _LEARNED_POSITIONS)
_PREFIX = "language_model."


def joined_heads(parts: Sequence[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """Queries, keys and values [heads * width, ...] as one matrix, group by group."""
    each = [part.reshape(sizes.groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(each, 1).flatten(0, 1)


def split_heads(whole: torch.Tensor, sizes: Sizes) -> list[torch.Tensor]:
    """Queries, keys and values of a matrix that has them group by group."""
    heads = sizes.heads // sizes.groups
    width = whole.shape[0] // (sizes.groups * (heads + 2))
    each = whole.reshape(sizes.groups, heads + 2, width, *whole.shape[1:])
    parts = (each[:, :heads], each[:, heads : heads + 1], each[:, heads + 1 :])
    return [part.flatten(0, 2) for part in parts]


# -- from Transformers -----------------------------------------------------------------------------


def to_megatron(
    source: str, out: str, *, ranks: int = 1, multiple: int = 128, config: Path | None = None
) -> str:
    """Write weights of Transformers as a checkpoint of Megatron-DeepSpeed's.

    Args:
        source: a folder with safetensors files.
        out: a run's folder, new or empty; it gets ``global_step0``.
        ranks: tensor-parallel ranks, each of which gets a file.
        multiple: rows of the vocabulary for each rank are a multiple of this.
        config: the model's ``config.json``; by default that beside the weights.

    Returns:
        The checkpoint's path.

    Raises:
        CheckpointError: names or sizes that do not fit, or a folder that is not empty.
    """
    folder = Path(out)
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{out} is not empty; write into a new folder")
    sizes = Sizes.of(config or Path(source, "config.json"))
    with closing(open_weights(source)) as storage:
        found = find_weights(storage)
        tensors = {name: partial(read_whole, storage, stored) for name, stored in found.items()}
        gated = any(row.kind == "pairs" for row in _table(tensors))
        place = folder / "global_step0"
        for rank in range(ranks):  # so that the parts of one are in memory at a time
            module = {
                name: _part(name, whole, ranks, rank, gated)
                for name, whole in _renamed(tensors, sizes, multiple * ranks)
            }
            place.mkdir(parents=True, exist_ok=True)
            content = _model_file(module, ranks, sizes, gated)
            torch.save(content, place / f"mp_rank_{rank:02d}_model_states.pt")
    (folder / "latest").write_text(place.name)
    return str(place)


def _table(tensors: Mapping[str, Any]) -> Sequence[Row]:
    for table in _TABLES:
        if table[0].others[0] in tensors or _PREFIX + table[0].megatron in tensors:
            return table
    raise CheckpointError(
        f"weights such as {shown(next(iter(tensors), 'none'))} are of no layout that is known: "
        f"expected {' or '.join(table[0].others[0] for table in _TABLES)}"
    )


def _renamed(tensors: Tensors, sizes: Sizes, multiple: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Megatron's names and whole tensors."""
    left = set(tensors)
    for row in _table(tensors):
        pattern = re.compile(re.escape(row.others[0]).replace(r"\#", r"(\d+)"))
        matches = [match for name in tensors if (match := pattern.fullmatch(name))]
        for match in sorted(matches, key=lambda m: [int(n) for n in m.groups()]):
            number = match[1] if match.groups() else ""
            names = [other.replace("#", number) for other in row.others]
            if lacking := [name for name in names if name not in tensors]:
                raise CheckpointError(f"the weights lack {shown(lacking[0])}")
            left -= set(names)
            parts = [tensors[name]() for name in names]
            yield _PREFIX + row.megatron.replace("#", number), _to(row, parts, sizes, multiple)
    first = _table(tensors)[0].others[0]
    if left == {"lm_head.weight"} and torch.equal(tensors["lm_head.weight"](), tensors[first]()):
        return  # tied to the embedding, as it is in Megatron
    if left:
        raise CheckpointError(f"what {shown(min(left))} is in Megatron is not known")


def _to(row: Row, parts: list[torch.Tensor], sizes: Sizes, multiple: int) -> torch.Tensor:
    if row.transposed:
        parts = [part.mT if part.dim() > 1 else part for part in parts]
    if row.kind == "heads":
        every = parts if len(parts) > 1 else list(parts[0].chunk(3))
        return joined_heads(every, sizes)
    if row.kind == "tokens":
        missing = -parts[0].shape[0] % multiple
        return torch.nn.functional.pad(parts[0], (0, 0, 0, missing))
    return torch.cat(parts).contiguous()


def _part(name: str, whole: torch.Tensor, ranks: int, rank: int, gated: bool) -> torch.Tensor:
    try:
        return cut(how_of(name, gated=gated), whole, ranks)[rank].clone()
    except ValueError as error:
        raise CheckpointError(f"{name} cannot be cut for {ranks} ranks: {error}") from error


def _model_file(
    module: dict[str, torch.Tensor], ranks: int, sizes: Sizes, gated: bool
) -> dict[str, Any]:
    """What a file of model states holds."""
    pairs = [rf".*{re.escape(_UP)}\.(weight|bias)"] if gated else []
    by_how = {key: [p for p, how in MEGATRON if how == which] for key, which in _KEYS.items()}
    return {
        "module": module,
        "buffer_names": [],
        "param_shapes": [{name: tensor.shape for name, tensor in module.items()}],
        "shared_params": {},
        "optimizer": None,
        "lr_scheduler": None,
        **dict.fromkeys(("global_steps", "global_samples", "skipped_steps"), 0),
        "dp_world_size": 1,
        "mp_world_size": ranks,
        "checkpoint_version": 3.0,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": ranks},
        "universal_checkpoint_info": {
            "universal_checkpoint_version": 0.2,
            "original_vocab_size": sizes.tokens,
            "vocabulary_parameter_patterns": [
                r".*word_embeddings\.weight",
                r".*output_layer\.weight",
            ],
            "parameter_with_2_sub_params_cat_dim_0": pairs,
            **by_how,
        },
    }


_KEYS = {
    "tp_replicated_parameter_patterns": "copies",
    "parameter_with_row_parallelism_patterns": "rows",
}


# -- to Transformers -------------------------------------------------------------------------------


def from_megatron(
    source: str, out: str, *, config: Path, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Write weights of a Megatron-DeepSpeed checkpoint as Transformers has them.

    Args:
        source: a run's folder or a checkpoint's, cut by any number of ranks and stages.
        out: a folder, new or empty.
        config: the model's ``config.json``, which is copied beside the weights.
        dtype: of what is written.

    Returns:
        Names of the files.

    Raises:
        CheckpointError: parts are missing, or names or sizes do not fit.
    """
    sizes = Sizes.of(config)
    found: dict[str, Source] = {}
    for kind in ("parameter", "master"):
        found |= {s.name: s for s in read_saved(source).sources if s.kind == kind}
    sources = _plain_names(found)
    entries: list[TensorEntry] = []
    left = set(sources)
    for row in _chosen(sources):
        pattern = re.compile(re.escape(_PREFIX + row.megatron).replace(r"\#", r"(\d+)"))
        for match in [match for name in sources if (match := pattern.fullmatch(name))]:
            left.discard(match[0])
            number = match[1] if match.groups() else ""
            names = [other.replace("#", number) for other in row.others]
            entries += _entries(row, names, sources[match[0]], sizes, dtype)
    if left:
        raise CheckpointError(f"what {shown(min(left))} is in Transformers is not known")
    return write_weights(entries, out, config=config.read_bytes())


def _entries(
    row: Row, names: Sequence[str], source: Source, sizes: Sizes, dtype: torch.dtype
) -> Iterator[TensorEntry]:
    """What is written of one tensor, which is read when its turn has come."""
    shapes = _from(row, torch.empty(source.shape, device="meta"), sizes, source.name)
    for number, (name, part) in enumerate(zip(names, shapes, strict=True)):

        def read(number: int = number) -> torch.Tensor:
            return _from(row, source.read(), sizes, source.name)[number].to(dtype).contiguous()

        yield TensorEntry(name, dtype, tuple(part.shape), read)


def _chosen(tensors: Mapping[str, Any]) -> Sequence[Row]:
    learned = any("position_embeddings" in name for name in tensors)
    if _PREFIX + _GATED[0].megatron not in tensors:
        raise CheckpointError(f"there is no {_PREFIX}{_GATED[0].megatron} in the checkpoint")
    return _LEARNED_POSITIONS if learned else _GATED


def _from(row: Row, whole: torch.Tensor, sizes: Sizes, name: str) -> list[torch.Tensor]:
    count, heads = len(row.others), sizes.heads + 2 * sizes.groups
    if row.kind == "heads" and whole.shape[0] % heads:
        raise CheckpointError(
            f"{shown(name)} has {whole.shape[0]} rows, which are not those of {sizes.heads} heads "
            f"of queries and twice {sizes.groups} of keys and values"
        )
    if row.kind == "tokens":
        if whole.shape[0] < sizes.tokens:
            raise CheckpointError(
                f"{shown(name)} has {whole.shape[0]} rows, and the config {sizes.tokens} tokens"
            )
        parts = [whole[: sizes.tokens]]
    elif row.kind == "heads":
        parts = split_heads(whole, sizes)
        parts = parts if count > 1 else [torch.cat(parts)]
    else:
        parts = list(whole.chunk(count))
    return [part.mT if row.transposed and part.dim() > 1 else part for part in parts]


_OLD = {"transformer.layers.": "encoder.layers.", ".attention.": ".self_attention."}
_OLD_LAST = {"transformer.final_layernorm.": "encoder.final_layernorm."}
_NUMBERED = re.compile(r"(\d+)\.(.+)")


def _plain_names(tensors: Mapping[str, Source]) -> dict[str, Source]:
    """Names as a model without a pipeline has them, of new and of old versions."""
    layers = [int(m[1]) for n in tensors if (m := _NUMBERED.fullmatch(n)) and "attention" in m[2]]
    numbers = {layer: number for number, layer in enumerate(sorted(set(layers)))}
    found: dict[str, Source] = {}
    for name, source in tensors.items():
        match = _NUMBERED.fullmatch(name)
        if match is not None:
            name = _of_pipeline(int(match[1]), match[2], numbers)
        for old, new in {**_OLD, **_OLD_LAST}.items():
            name = name.replace(old, new)
        found.setdefault(name if name.startswith(_PREFIX) else _PREFIX + name, source)
    return found


def _of_pipeline(layer: int, rest: str, numbers: Mapping[int, int]) -> str:
    if layer in numbers:
        return f"encoder.layers.{numbers[layer]}.{rest}"
    if rest in ("weight", "bias"):
        return f"encoder.final_layernorm.{rest}"
    if rest.startswith("final_layernorm."):
        return f"encoder.{rest}"
    return rest.replace("lm_head.", "output_layer.") if "lm_head" in rest else f"embedding.{rest}"

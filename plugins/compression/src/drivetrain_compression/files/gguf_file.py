"""GGUF files, as llama.cpp and others read them, through the package ``gguf``.

Layers on integers in groups of 32 become blocks with the very numbers that were chosen: Q4_0 and
Q8_0 (symmetric, 4 and 8 bits), Q4_1 (4 bits with zero points). What else is large is rounded to
Q8_0, Q4_K, F16 or BF16 as asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from drivetrain.errors import ConfigError
from drivetrain_compression.calibrated.grids import Integers
from drivetrain_compression.calibrated.results import Rounded
from drivetrain_compression.files import own, super_blocks

BLOCK = 32
_INTERLEAVED = ("llama",)
"""Architectures of which GGUF has the halves of rotated heads interleaved."""
_KNOWN = (*_INTERLEAVED, "qwen2", "qwen3")


def write_gguf(folder: Path, file: Path, *, rest: str = "BF16", pre: str = "default") -> None:
    """Write the compressed model in ``folder`` to a GGUF file, which appears when it is complete.

    Args:
        folder: in the layout ``drivetrain`` or ``plain``, with a config of Transformers.
        file: must not exist.
        rest: kind of matrices that are not on a grid of a block: ``BF16``, ``F16``, ``Q8_0``,
            ``Q4_0``, ``Q4_1`` or ``Q4_K``; as in llama.cpp, rows that are no multiple of 256 become
            Q5_0 in place of Q4_K.
        pre: name of llama.cpp for how the tokenizer splits text.

    Raises:
        ConfigError: the file exists, ``gguf`` is missing, or it has no such architecture.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("GGUF files need the package gguf: pip install gguf") from error
    if file.exists():
        raise ConfigError(f"{file} exists; choose another file, or remove it")
    summary, config = (_json(folder / n) for n in ("drivetrain_compression.json", "config.json"))
    if summary.get("format") not in (own.NAME, "plain"):
        raise ConfigError(f"{folder} is not in the format drivetrain or plain; compress into one")
    kind = config.get("model_type")
    if kind not in _KNOWN:
        raise ConfigError(f"GGUF: architecture {kind!r} is not known here; {', '.join(_KNOWN)} are")
    new = file.with_name(f"{file.name}.partial")
    writer = gguf.GGUFWriter(new, kind)
    _facts(writer, config)
    _vocabulary(gguf, writer, folder, config, pre)
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, made in _layers(folder, summary["layers"]):
        base, dot, end = name.rpartition(".")
        found = names.get_name(base)
        if found is None:
            raise ConfigError(f"GGUF has no place for {name} in {kind}")
        order = _order(name, config) if kind in _INTERLEAVED else None
        _add(gguf, writer, f"{found}{dot}{end}", made, order, rest)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    new.rename(file)


def blocks_of(found: Rounded) -> tuple[str, np.ndarray[Any, Any]] | None:
    """Kind and raw bytes [out, bytes] of a weight; ``None`` if no kind has its numbers."""
    grid, columns = found.grid, found.numbers.shape[1]
    fits = isinstance(grid, Integers) and found.scales.group == BLOCK and columns % BLOCK == 0
    if not fits or found.low_rank is not None or grid.bits not in (4, 8):
        return None
    if grid.bits == 8 and not grid.symmetric:
        return None
    assert isinstance(grid, Integers)
    rows = len(found.numbers)
    scale = found.scales.scale.half().numpy()[:, :, None].view(np.uint8)
    codes = (found.numbers + found.scales.spread(columns)[1]).round().to(torch.int8)
    whole = codes.view(rows, -1, BLOCK).numpy()
    if grid.bits == 8:
        return "Q8_0", np.concatenate([scale, whole.view(np.uint8)], 2).reshape(rows, -1)
    low = (whole + 8).astype(np.uint8)
    nibbles = low[:, :, :16] | (low[:, :, 16:] << 4)
    if grid.symmetric:
        return "Q4_0", np.concatenate([scale, nibbles], 2).reshape(rows, -1)
    offset = ((grid.low - found.scales.zero) * found.scales.scale).half().numpy()
    parts = [scale, offset[:, :, None].view(np.uint8), nibbles]
    return "Q4_1", np.concatenate(parts, 2).reshape(rows, -1)


def _layers(folder: Path, facts: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor | Rounded]]:
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            base, _, end = name.rpartition(".")
            if base not in facts or not end.startswith("weight"):
                yield name, tensor
            elif end == "weight_codes":
                yield f"{base}.weight", own.read(base, facts[base], tensors)


def _add(gguf: Any, writer: Any, name: str, made: Any, order: Any, rest: str) -> None:
    blocks = blocks_of(made) if isinstance(made, Rounded) else None
    if blocks is not None:
        kind, raw = blocks
        raw = raw if order is None else raw[order.numpy()]
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
        return
    whole = made.weight(torch.float32) if isinstance(made, Rounded) else made.float()
    values = (whole if order is None else whole[order]).numpy()
    if values.ndim < 2:
        writer.add_tensor(name, values)
        return
    if rest == "Q4_K" and values.shape[-1] % super_blocks.BLOCK:
        rest = "Q5_0"
    kind = gguf.GGMLQuantizationType[rest]
    if rest == "Q4_K":  # which the package unpacks only
        writer.add_tensor(name, super_blocks.q4_k(torch.from_numpy(values)), raw_dtype=kind)
        return
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def _order(name: str, config: Mapping[str, Any]) -> torch.Tensor | None:
    """Rows of queries and keys as GGUF has them: the halves of each head interleaved."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    number = {"q_proj": heads, "k_proj": config.get("num_key_value_heads") or heads}
    for part, count in number.items():
        if f".{part}." in name:
            rows = torch.arange(count * width)
            return rows.view(count, 2, width // 2).transpose(1, 2).flatten()
    return None


def _facts(writer: Any, config: Mapping[str, Any]) -> None:
    heads = config["num_attention_heads"]
    rotation = config.get("rope_parameters") or {}
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(rotation.get("rope_theta", config.get("rope_theta", 10000.0))))
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])


def _vocabulary(gguf: Any, writer: Any, folder: Path, config: Mapping[str, Any], pre: str) -> None:
    if not (folder / "tokenizer.json").exists():
        return
    tokenizer = _json(folder / "tokenizer.json")
    kind, size = tokenizer["model"].get("type"), config["vocab_size"]
    if kind != "BPE":
        raise ConfigError(f"{folder}: a tokenizer of the kind {kind} cannot be put into GGUF here")
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[number], types[number] = token, int(gguf.TokenType.NORMAL)
    for added in tokenizer.get("added_tokens", ()):
        special = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(special)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=size).add_to_gguf(writer)


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ConfigError(f"{path} is missing")
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found

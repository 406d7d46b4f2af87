"""Files of Megatron-DeepSpeed's layout, written row by row with plain torch."""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY, PADDED, WIDTH, INNER, HEADS, GROUPS, LAYERS = 50, 64, 16, 24, 4, 2, 2
EACH = WIDTH // HEADS
Weights = dict[str, torch.Tensor]


def gated(tied: bool = False) -> Any:
    """A decoder with rotary positions, fewer key-value heads than heads, and gates."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        tie_word_embeddings=tied,
        attention_bias=True,
    )
    return randomised(transformers.LlamaForCausalLM(config))


def learned() -> Any:
    """A decoder with learned positions and biases."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=8
    )
    return randomised(transformers.GPT2LMHeadModel(config))


def randomised(model: Any) -> Any:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def padded(table: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    rows = [table[i] if i < VOCABULARY else torch.zeros(WIDTH) for i in range(PADDED)]
    each = PADDED // ranks
    return torch.stack(rows[rank * each : (rank + 1) * each])


def heads_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rank: int, ranks: int, groups: int
) -> torch.Tensor:
    """Rows of the groups of one rank: queries of the group, its keys, its values."""
    found = []
    for group in range(rank * groups // ranks, (rank + 1) * groups // ranks):
        for head in range(group * HEADS // groups, (group + 1) * HEADS // groups):
            found += [q[head * EACH + i] for i in range(EACH)]
        found += [k[group * EACH + i] for i in range(EACH)]
        found += [v[group * EACH + i] for i in range(EACH)]
    return torch.stack(found)


def part(x: torch.Tensor, rank: int, ranks: int, dim: int = 0) -> torch.Tensor:
    each = x.shape[dim] // ranks
    return x.narrow(dim, rank * each, each).clone()


def gated_layers(model: Any, rank: int, ranks: int) -> list[Weights]:
    """Tensors of one rank: the embedding, each block, the last norm, the head."""
    w = {name: p.detach() for name, p in model.named_parameters()}
    layers: list[Weights] = [
        {"word_embeddings.weight": padded(w["model.embed_tokens.weight"], rank, ranks)}
    ]
    for number in range(LAYERS):
        at = f"model.layers.{number}."
        own: Weights = {"input_layernorm.weight": w[f"{at}input_layernorm.weight"]}
        for end in ("weight", "bias"):
            q, k, v = (w[f"{at}self_attn.{n}_proj.{end}"] for n in "qkv")
            name = f"self_attention.query_key_value.{end}"
            own[name] = heads_of(q, k, v, rank, ranks, GROUPS)
        own["self_attention.dense.weight"] = part(w[f"{at}self_attn.o_proj.weight"], rank, ranks, 1)
        own["self_attention.dense.bias"] = w[f"{at}self_attn.o_proj.bias"]
        own["post_attention_layernorm.weight"] = w[f"{at}post_attention_layernorm.weight"]
        gate, up = (part(w[f"{at}mlp.{n}_proj.weight"], rank, ranks) for n in ("gate", "up"))
        own["mlp.dense_h_to_4h.weight"] = torch.cat([gate, up])
        own["mlp.dense_4h_to_h.weight"] = part(w[f"{at}mlp.down_proj.weight"], rank, ranks, 1)
        layers.append(own)
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return [
        *layers,
        {"weight": w["model.norm.weight"]},
        {"lm_head.weight": padded(head, rank, ranks)},
    ]


def learned_layers(model: Any, rank: int, ranks: int) -> list[Weights]:
    w = {name: p.detach() for name, p in model.named_parameters()}
    first = {
        "word_embeddings.weight": padded(w["transformer.wte.weight"], rank, ranks),
        "position_embeddings.weight": w["transformer.wpe.weight"],
    }
    layers = [first]
    for number in range(LAYERS):
        at, own = f"transformer.h.{number}.", Weights()
        for end in ("weight", "bias"):
            own[f"input_layernorm.{end}"] = w[f"{at}ln_1.{end}"]
            own[f"post_attention_layernorm.{end}"] = w[f"{at}ln_2.{end}"]
            q, k, v = (
                w[f"{at}attn.c_attn.{end}"].t().split(WIDTH)
                if end == "weight"
                else w[f"{at}attn.c_attn.{end}"].split(WIDTH)
            )
            name = f"self_attention.query_key_value.{end}"
            own[name] = heads_of(q, k, v, rank, ranks, HEADS)
        own["self_attention.dense.weight"] = part(w[f"{at}attn.c_proj.weight"].t(), rank, ranks, 1)
        own["self_attention.dense.bias"] = w[f"{at}attn.c_proj.bias"]
        own["mlp.dense_h_to_4h.weight"] = part(w[f"{at}mlp.c_fc.weight"].t(), rank, ranks)
        own["mlp.dense_h_to_4h.bias"] = part(w[f"{at}mlp.c_fc.bias"], rank, ranks)
        own["mlp.dense_4h_to_h.weight"] = part(w[f"{at}mlp.c_proj.weight"].t(), rank, ranks, 1)
        own["mlp.dense_4h_to_h.bias"] = w[f"{at}mlp.c_proj.bias"]
        layers.append(own)
    last = {end: w[f"transformer.ln_f.{end}"] for end in ("weight", "bias")}
    return [*layers, last, {}]


def named(layers: list[Weights]) -> Weights:
    """One state dict, as a model without a pipeline has it."""
    embedding, *blocks, last, head = layers
    at = "language_model."
    found = {f"{at}embedding.{name}": x for name, x in embedding.items()}
    for number, block in enumerate(blocks):
        found |= {f"{at}encoder.layers.{number}.{name}": x for name, x in block.items()}
    found |= {f"{at}encoder.final_layernorm.{name}": x for name, x in last.items()}
    return found | {f"{at}output_layer.weight": x for x in head.values()}


def model_file(module: Weights | None, **more: Any) -> dict[str, Any]:
    return {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{name: x.shape for name, x in (module or {}).items()}],
        "frozen_param_shapes": None,
        "shared_params": {},
        "global_steps": 7,
        "global_samples": 28,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 2,
        "ds_version": "0.19.6",
        "args": argparse.Namespace(lr=0.1, params_dtype=torch.float16),
        "checkpoint_version": 3.0,
        **more,
    }


INFO: Mapping[str, Any] = {"original_vocab_size": VOCABULARY, "universal_checkpoint_version": 0.2}


def write_whole(folder: Path, layers_of: Any, model: Any, ranks: int, **more: Any) -> Path:
    """``mp_rank_XX`` files, without optimizer."""
    place = folder / "global_step7"
    place.mkdir(parents=True)
    for rank in range(ranks):
        module = named(layers_of(model, rank, ranks))
        content = model_file(module, universal_checkpoint_info=INFO, **more)
        torch.save(content, place / f"mp_rank_{rank:02d}_model_states.pt")
    (folder / "latest").write_text("global_step7")
    return place


def write_pipeline(folder: Path, layers_of: Any, model: Any, ranks: int, stages: int) -> Path:
    """``layer_XX-model_YY`` files; functions without parameters lie before the blocks."""
    place = folder / "global_step7"
    place.mkdir(parents=True)
    for rank in range(ranks):
        for number, layer in enumerate(layers_of(model, rank, ranks)):
            at = 1 if number == 0 else number + 2
            torch.save(layer, place / f"layer_{at:02d}-model_{rank:02d}-model_states.pt")
    for number in range(ranks * stages):
        content = model_file(None, universal_checkpoint_info=INFO)
        torch.save(content, place / f"mp_rank_{number:02d}_model_states.pt")
    (folder / "latest").write_text("global_step7")
    return place


# -- ZeRO's partitions -----------------------------------------------------------------------------


@dataclass
class fragment_address:
    numel: int
    start: int


@contextmanager
def library() -> Iterator[None]:
    """Let the class of addresses be saved under the name that it has in the library."""
    name = "deepspeed.utils.tensor_fragment"
    fragment_address.__module__ = name
    fragment_address.__qualname__ = "fragment_address"
    before = {n: sys.modules.get(n) for n in ("deepspeed", "deepspeed.utils", name)}
    for each in before:
        sys.modules[each] = types.ModuleType(each)
    sys.modules[name].fragment_address = fragment_address  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for each, module in before.items():
            sys.modules.pop(each)
            if module is not None:
                sys.modules[each] = module


def partition(tensors: Mapping[str, Weights], shards: int, step: int) -> Iterator[dict[str, Any]]:
    """Optimizer states of stage 1 of one model-parallel rank: kind -> name -> tensor."""
    names = list(tensors["master"])
    flat = {kind: torch.cat([x[n].flatten() for n in names]) for kind, x in tensors.items()}
    total = flat["master"].numel()
    size = -(-total // (2 * shards)) * 2
    for shard in range(shards):
        begin, end = shard * size, min((shard + 1) * size, total)
        addresses, at = {}, 0
        for name in names:
            numel = tensors["master"][name].numel()
            first, last = max(at, begin), min(at + numel, end)
            if first < last:
                addresses[name] = fragment_address(last - first, first - begin)
            at += numel
        missing = size - (end - begin)
        state = {
            kind: torch.nn.functional.pad(x[begin:end], (0, missing))
            for kind, x in flat.items()
            if kind != "master"
        }
        yield {
            "zero_stage": 1,
            "loss_scaler": None,
            "base_optimizer_state": {
                "state": {0: {"step": step, **state}},
                "param_groups": [{"lr": 0.1, "params": [0]}],
            },
            "single_partition_of_fp32_groups": [flat["master"][begin:end].clone()],
            "group_paddings": [missing],
            "partition_count": [shards],
            "param_slice_mappings": [addresses],
        }

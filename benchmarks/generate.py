"""Generation beside Transformers' own: one stream, and many requests at once.

    python benchmarks/generate.py                      # a decoder of SmolLM2-135M's shape
    python benchmarks/generate.py --model FOLDER_OR_GGUF_FILE

Both sides run in one process and take turns; figures are medians. Texts do not end early, so that
both generate the same number of tokens. ``read_share`` is the part of the memory's speed that one
stream has: bytes of the weights that a token reads, times tokens per second, over the best of some
sums of a large tensor.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from drivetrain_inference import SamplingParams, load_model, serve
from torch import nn

from drivetrain.plan.registry import Registry

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}  # fmt: skip


def model_of(path: str | None, dtype: torch.dtype) -> nn.Module:
    """The model at ``path``, or a random one of the usual shape."""
    if path is not None:
        return load_model(Path(path), dtype)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype).eval()


def requests(number: int) -> list[tuple[list[int], int]]:
    """(prompt, new tokens): mixed lengths, 323 and 76 on average."""
    draw = random.Random(0)  # noqa: S311 - the same requests every time
    return [
        (
            [draw.randrange(100, 40000) for _ in range(draw.randrange(64, 583))],
            draw.randrange(24, 129),
        )
        for _ in range(number)
    ]


def by_transformers(model: nn.Module, work: list[tuple[list[int], int]]) -> float:
    """Seconds in padded batches of 8, each as long as its longest request."""
    began = time.perf_counter()
    for start in range(0, len(work), 8):
        batch = work[start : start + 8]
        width, new = max(len(p) for p, _ in batch), max(n for _, n in batch)
        ids = torch.tensor([[0] * (width - len(p)) + p for p, _ in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in batch])
        generate: Any = model.generate
        generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                 pad_token_id=0)  # fmt: skip
    return time.perf_counter() - began


def by_engine(engine: Any, work: list[tuple[list[int], int]]) -> float:
    """Seconds with all requests at once."""
    params = [SamplingParams(max_new_tokens=new, ignore_eos=True) for _, new in work]
    engine.scheduler.blocks.forget()
    began = time.perf_counter()
    results = engine.generate([prompt for prompt, _ in work], params)
    seconds = time.perf_counter() - began
    assert [len(each[0].tokens) for each in results] == [new for _, new in work]
    return seconds


def read_speed(rounds: int = 8) -> float:
    """Bytes a second at which torch's threads read memory that no cache holds."""
    values, best = torch.ones(1 << 27), 0.0
    for _ in range(rounds):
        began = time.perf_counter()
        values.sum()
        best = max(best, values.nbytes / (time.perf_counter() - began))
    return best


def bytes_read(model: nn.Module, form: str, head: bool) -> int:
    """Bytes of weights that one token reads: all matrices, of the embedding one row alone.

    Those of a compressed folder are packed already, in layers of another class.
    """
    entry = Registry.installed().find("weight_formats", form)
    packed = entry.load()() if entry is not None else None
    total = 0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            stays = packed is None or (name == "lm_head" and not head)
            total += layer.weight.nbytes if stays else packed.bytes(layer.weight.shape)
        elif hasattr(layer, "in_features"):
            stored: Any = layer.weight
            total += stored.stored.nbytes
    return total


def side_by_side(
    sides: dict[str, Callable[[], float]], pairs: int, tokens: int
) -> dict[str, float]:
    """Tokens per second of each side, and the ratio of medians."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(pairs):
        for name, run in sides.items():
            found[name].append(tokens / run())
            sys.stderr.write(f"{name}: {found[name][-1]:.1f} tokens/s\n")
    medians = {name: round(statistics.median(values), 1) for name, values in found.items()}
    first, *others = medians
    ratios = {f"ratio_to_{name}": round(medians[first] / medians[name], 3) for name in others}
    return {**medians, **ratios}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or GGUF file; a random model by default")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--weight-format", default="")
    parser.add_argument("--quantize-head", action="store_true", help="the matrix of logits, too")
    parser.add_argument("--cache-format", default="")
    parser.add_argument("--requests", type=int, default=64, help="0: the single stream alone")
    parser.add_argument("--tokens", type=int, default=100, help="new tokens of the single stream")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch; as many as there are cores")
    parser.add_argument("--alone", action="store_true", help="leave Transformers out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    model = model_of(options.model, getattr(torch, options.dtype))
    section = {
        "weight_format": options.weight_format, "quantize_head": options.quantize_head,
        "cache_format": options.cache_format, "max_context": 1024,
    }  # fmt: skip
    single = [(requests(1)[0][0][:32], options.tokens)]
    many = requests(options.requests)
    with serve(model, {"inference": section}) as engine:
        by_engine(engine, [(list(range(200, 232)), 8)])  # kernels are built, memory is touched
        found = {}
        for name, work in (("single", single), ("many", many)):
            if not work:
                continue
            sides = {"drivetrain": lambda work=work: by_engine(engine, work)}
            if not options.alone:
                sides["transformers"] = lambda work=work: by_transformers(model, work)
            tokens = sum(new for _, new in work)
            found[name] = side_by_side(sides, options.pairs, tokens)
        prompt = sum(len(p) for p, _ in many)
        report = {"systems": found, "fast": engine.fast, "prompt_tokens": prompt}
    if options.weight_format != "gguf":  # whose weights depend on the file
        read, speed = bytes_read(model, options.weight_format, options.quantize_head), read_speed()
        share = found["single"]["drivetrain"] * read / speed
        report |= {"bytes_a_token": read, "read_speed": round(speed), "read_share": round(share, 3)}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

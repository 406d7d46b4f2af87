"""Time the drop-in's encoder layer beside BERT's of Transformers, forward and backward.

    python benchmarks/bert_layer.py

Prints JSON: processor time in milliseconds, and medians over rounds of the ratio of our time to
that of Transformers' layer with attention written out (``eager``) and with torch's (``sdpa``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from deepspeed import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer
from torch import nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

WIDTH, HEADS, BATCH, SEQUENCE = 256, 4, 4, 128


def layers() -> dict[str, nn.Module]:
    """The layers by name, with dropout in front of residuals alone."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 2}
    ours = DeepSpeedTransformerConfig(
        **sizes,
        heads=HEADS,
        attn_dropout_ratio=0.0,
        hidden_dropout_ratio=0.1,
        initializer_range=0.02,
        pre_layer_norm=False,
    )
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0}
    found: dict[str, nn.Module] = {"drop-in": DeepSpeedTransformerLayer(ours)}
    for name in ("eager", "sdpa"):
        config = BertConfig(**sizes, **rates, num_attention_heads=HEADS, attn_implementation=name)
        found[name] = BertLayer(config)
    return found


def step(layer: nn.Module, states: torch.Tensor, mask: torch.Tensor) -> float:
    """Milliseconds of processor time of one forward and backward."""
    start = time.process_time()
    output = layer(states, mask)
    (output[0] if isinstance(output, tuple) else output).sum().backward()
    layer.zero_grad()
    return 1e3 * (time.process_time() - start)


def main() -> None:
    """Take turns, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=80)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    systems = layers()
    states = torch.randn(BATCH, SEQUENCE, WIDTH, requires_grad=True)
    mask = torch.zeros(BATCH, 1, 1, SEQUENCE)
    rows = [[step(layer, states, mask) for layer in systems.values()] for _ in range(rounds + 3)]
    rows = rows[3:]
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    ratios = {
        name: statistics.median(row[0] / row[place] for row in rows)
        for place, name in enumerate(systems)
        if place
    }
    times = dict(zip(systems, medians, strict=True))
    print(json.dumps({"milliseconds": times, "ratio": ratios}, indent=1))


if __name__ == "__main__":
    main()

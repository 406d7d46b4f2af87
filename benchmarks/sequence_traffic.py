"""Elements that leave a rank in one layer of attention, beside the formulas, by the job's byte log.

Ranks up to 8 are real processes; beyond them (1,024) a job of tensors without memory is rehearsed,
with collectives of torch's fake process group. There are as many heads as ranks, and tokens grow
with the ranks, ``--tokens`` for each. Prints JSON: by ranks and method what was sent forward and
backward, what the formulas of the README say, and the largest difference of all.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from drivetrain_cli.rehearsal import rehearsal
from torch import nn

import drivetrain
from drivetrain.contracts import Purpose
from drivetrain.engine.engine import Engine
from drivetrain.testing import run_distributed

WIDTH, LAYERS, MOST_PROCESSES = 4, 2, 8


class Layer(nn.Module):
    """Causal attention with a weight for each unit of its queries, so that it trains."""

    def __init__(self, heads: int, key_heads: int) -> None:
        super().__init__()
        self.heads, self.key_heads = heads, key_heads
        self.query = nn.Parameter(torch.ones(heads * WIDTH))
        self.key = nn.Parameter(torch.ones(key_heads * WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From [b, s, width] to the same."""
        query = (x * self.query).unflatten(2, (self.heads, WIDTH)).transpose(1, 2)
        key = (x[..., : self.key_heads * WIDTH] * self.key).unflatten(2, (self.key_heads, WIDTH))
        key = key.transpose(1, 2)
        return drivetrain.attention(self, query, key, key, causal=True).flatten(2)


class Model(nn.Module):
    """Layers of attention and nothing else."""

    def __init__(self, heads: int, key_heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer(heads, key_heads) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """The mean over the tokens."""
        for block in self.blocks:
            x = block(x)
        return x.mean()


def heads_of(ranks: int) -> tuple[int, int]:
    """Heads of queries, twice the ranks; and of keys, as many as they are."""
    return 2 * ranks, ranks


def config_of(ranks: int, ring: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "sequence_parallel_size": ranks,
        "sequence_parallel": {"probe": False, "ring_size": ring},
    }


def sent(engine: Engine, ranks: int, tokens: int) -> list[float]:
    """Elements that leave the rank in a layer, forward and backward, of a second step."""
    x = torch.ones(1, tokens * ranks, 2 * ranks * WIDTH, device=engine.device)
    engine.backward(engine(x))  # the first one compares the ranks' batches, too
    engine.job.byte_log.reset()
    found = []
    for part in ("forward", "backward"):
        before = engine.job.byte_log.total(purpose=Purpose.ACTIVATION).sent_bytes
        if part == "forward":
            loss = engine(x)
        else:
            engine.backward(loss)
        after = engine.job.byte_log.total(purpose=Purpose.ACTIVATION).sent_bytes
        found.append((after - before) / 4 / LAYERS)
    return found


def of_a_process(ranks: int, ring: int, tokens: int) -> list[float]:
    engine, *_ = drivetrain.initialize(model=Model(*heads_of(ranks)), config=config_of(ranks, ring))
    found = sent(engine, ranks, tokens)
    engine.destroy()
    return found


def measured(ranks: int, ring: int, tokens: int) -> list[float]:
    """What every rank sends; they are asked whether they send alike."""
    if ranks <= MOST_PROCESSES:
        each = run_distributed(of_a_process, ranks, ranks, ring, tokens, timeout=600)
        assert all(found == each[0] for found in each)
        return list(each[0])
    with torch.device("meta"):
        model = Model(*heads_of(ranks))
    config = config_of(ranks, ring)
    with rehearsal(config, model, ranks=ranks, ranks_on_host=8, on_cpu=True) as engine:
        return sent(engine, ranks, tokens)


def formulas(ranks: int, ring: int, tokens: int) -> list[float]:
    """Forward and backward; N tokens, P ranks, R of them in a ring, widths h and h_kv.

    The exchange of heads is (2h + 2h_kv)(N/P)(H-1)/H with H = P/R, the same in backward. Keys and
    values of the N/H tokens that a ring shares go to R-1 others; in backward they go round again,
    and their gradients with them and one step further, home.
    """
    h, h_kv = (n * WIDTH for n in heads_of(ranks))
    heads, length = ranks // ring, tokens * ranks
    exchanged = (2 * h + 2 * h_kv) * length / ranks * (heads - 1) / heads
    passed = 2 * length / heads * h_kv * (ring - 1) / ring
    home = 2 * length / heads * h_kv if ring > 1 else 0
    return [exchanged + passed, exchanged + passed + home]


def main() -> None:
    """Print a table of all numbers of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 1024])
    parser.add_argument("--tokens", type=int, default=8, help="of each rank")
    options = parser.parse_args()
    rows, worst = {}, 0.0
    for ranks in options.ranks:
        rings = {"heads": 1, "ring": ranks} | ({"both": 2} if ranks > 2 else {})
        for method, ring in rings.items():
            found = measured(ranks, ring, options.tokens)
            expected = formulas(ranks, ring, options.tokens)
            for ours, theirs in zip(found, expected, strict=True):
                worst = max(worst, abs(ours / theirs - 1))
            rows[f"{ranks} {method}"] = {"sent": found, "formulas": expected}
    print(json.dumps({"elements": rows, "largest_difference": worst}, indent=1))


if __name__ == "__main__":
    main()

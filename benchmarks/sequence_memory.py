"""Peak memory of one training step by length of the sequence: plain, in tiles, on two ranks.

Each figure is of a process of its own: the peak of resident memory during the second step, less
what was resident before the first. Prints JSON; ``--picture FILE`` draws it as well.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from typing import Any

MIB = 2**20
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "recompute": {"activation_checkpointing": {"recompute": "all"}},
    "tiles": {
        "activation_checkpointing": {"recompute": "all"},
        "sequence_parallel": {"loss_tile": 512, "mlp_tile": 512},
    },
    "tiles, 2 ranks": {
        "activation_checkpointing": {"recompute": "all"},
        "sequence_parallel": {"loss_tile": 512, "mlp_tile": 512, "probe": False},
        "sequence_parallel_size": 2,
    },
}


def step(way: str, length: int) -> float:
    """MiB that one step takes in this process beyond the model and its states."""
    import torch
    import transformers

    import drivetrain

    config = transformers.LlamaConfig(
        vocab_size=50257,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=length,
    )
    torch.manual_seed(0)
    engine, *_ = drivetrain.initialize(
        model=transformers.LlamaForCausalLM(config),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
            **WAYS[way],
        },
    )

    def train(tokens: torch.Tensor) -> None:
        engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
        engine.step()

    train(torch.randint(50257, (1, 64)))  # buffers that every step needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train(torch.randint(50257, (1, length), generator=torch.Generator().manual_seed(0)))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    engine.destroy()
    return (after - before) * 1024 / MIB


def measure(way: str, length: int) -> float | None:
    """The largest of the ranks' figures; ``None`` if the step does not fit into memory."""
    ranks = 2 if "2 ranks" in way else 1
    command = [sys.executable, __file__, "--one", way, "--lengths", str(length)]
    base = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
    base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29617", "MALLOC_MMAP_THRESHOLD_": "65536"}
    processes = [
        subprocess.Popen(
            command,
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        return None
    return max(float(output.splitlines()[-1]) for output in outputs)


def draw(found: dict[str, dict[str, float | None]], path: str) -> None:
    """A picture of all ways."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for way, by_length in found.items():
        points = [(int(length), mib) for length, mib in by_length.items() if mib is not None]
        axes.plot(*zip(*points, strict=True), marker="o", label=way)
    axes.set(xlabel="tokens of a sequence", ylabel="MiB of one step, per rank", yscale="log")
    axes.set_xscale("log", base=2)
    axes.legend()
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    """Measure all ways at all lengths."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--one", choices=WAYS, help="one step in this process")
    parser.add_argument("--picture")
    options = parser.parse_args()
    if options.one:
        print(step(options.one, options.lengths[0]))
        return
    found = {
        way: {str(length): measure(way, length) for length in options.lengths}
        for way in options.ways
    }
    ratios = {
        length: plain / tiled
        for length, plain in found.get("plain", {}).items()
        if plain is not None and (tiled := found.get("tiles", {}).get(length))
    }
    print(json.dumps({"mib": found, "plain_over_tiles": ratios}, indent=1))
    if options.picture:
        draw(found, options.picture)


if __name__ == "__main__":
    main()

"""Peak memory of one training step by length of the sequence: plain, in tiles, chunks, on ranks.

Each figure is of processes of their own, one per rank: the peak of resident memory during the
second step, less what was resident before it; the largest of the ranks' counts. With ``--limit``,
the longest sequence whose processes stay below so many MiB each, all that Python and torch take
included, or, with ``--lengths``, whether those do; ``RLIMIT_DATA`` holds each to that, so what is
too long fails as it would in a cgroup.
``--shapes-only`` leaves out the arithmetic of fused attention, and makes its results as zeros:
memory is the same, and time grows with the length instead of its square. ``--predict`` ways are not
run: a rehearsal of their job foretells them, for any number of ranks. Prints JSON; ``--picture
FILE`` draws it as well. ``--one WAY --trace FILE`` draws the memory of one step over time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TILES = {"loss_tile": 512, "mlp_tile": 512, "probe": False}
CHUNKS = {"loss_tile": 512, "chunk": 1024, "probe": False}
AGAIN = {"activation_checkpointing": {"recompute": "all"}}
FILES = {"activation_offload": {"enabled": True, "device": "nvme", "min_bytes": 2**18}}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "recompute": AGAIN,
    "tiles": AGAIN | {"sequence_parallel": TILES},
    "tiles, files": AGAIN | FILES | {"sequence_parallel": TILES},
    "chunks": {"sequence_parallel": CHUNKS},
    "chunks, files": FILES | {"sequence_parallel": CHUNKS},
    "chunks, recompute": AGAIN | {"sequence_parallel": CHUNKS},
}
"""What a config has for each way; ``transformers`` beside them is a loop without Drivetrain."""

LENGTHS = (1024, 2048, 4096, 8192)

RANKS = (1, 2, 4)
"""Ranks that share a sequence; a way's name ends with them where they are several."""

ALONE = "transformers"
NAMES = [ALONE, *WAYS] + [f"{way}, {ranks} ranks" for ranks in RANKS[1:] for way in WAYS]


def ranks_of(way: str) -> tuple[str, int]:
    """A way's config by name, and how many ranks share its sequences."""
    name, _, ranks = way.removesuffix(" ranks").rpartition(", ")
    return (name, int(ranks)) if way.endswith(" ranks") else (way, 1)


def model_of(length: int, tied: bool) -> Any:
    """A Llama of 4 layers, width 256."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=50257,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=length,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def config_of(way: str, chunk: int | None = None) -> dict[str, Any]:
    """The config of a way of Drivetrain, with another size of chunks if one is given."""
    name, ranks = ranks_of(way)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
        "sequence_parallel_size": ranks,
        **WAYS[name],
    }
    if chunk is not None and "chunk" in config.get("sequence_parallel", {}):
        config["sequence_parallel"] = {**config["sequence_parallel"], "chunk": chunk}
    return config


def trainer(
    way: str, length: int, options: argparse.Namespace, folder: str
) -> Callable[[Any], None]:
    """A function that trains on one batch of tokens."""
    import torch

    if way == ALONE:
        model = model_of(length, options.tied)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

        def alone(tokens: Any) -> None:
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return alone
    import drivetrain

    config = config_of(way, options.chunk)
    if "activation_offload" in config:
        config["activation_offload"] = {**config["activation_offload"], "nvme_path": folder}
    engine, *_ = drivetrain.initialize(model=model_of(length, options.tied), config=config)

    def train(tokens: Any) -> None:
        engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
        engine.step()

    return train


def without_arithmetic() -> None:
    """Have blocks of attention make their results without computing them."""
    import torch
    from drivetrain_sequence import fused

    def forward(query: Any, key: Any, value: Any, *_: Any) -> Any:
        return torch.zeros_like(query), query.new_zeros(query.shape[:3])

    def backward(known: Any, query: Any, key: Any, value: Any, *_: Any) -> Any:
        return tuple(torch.zeros_like(x) for x in (query, key, value))

    fused.forward, fused.backward = forward, backward


class Trace:
    """Samples resident memory beside the work, twice a second.

    Attributes:
        samples: seconds since the start, and MiB.
    """

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Trace:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        begin = time.perf_counter()
        while not self._ended.wait(0.5):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            mib = pages * resource.getpagesize() / 2**20
            self.samples.append((round(time.perf_counter() - begin, 1), round(mib, 1)))


def step(way: str, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """MiB of this process in one step and in all; seconds of the step, by clock and processor."""
    import torch

    if options.limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(options.limit * 2**20),) * 2)
    if options.shapes_only:
        without_arithmetic()
    trace = Trace()
    with tempfile.TemporaryDirectory() as folder:
        train = trainer(way, length, options, folder)
        train(torch.randint(50257, (1, 64)))  # buffers that every step needs
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tokens = torch.randint(50257, (1, length), generator=torch.Generator().manual_seed(0))
        begin, used = time.perf_counter(), time.process_time()
        with trace:
            train(tokens)
        seconds, used = time.perf_counter() - begin, time.process_time() - used
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"step": (after - before) / 1024, "process": after / 1024, "seconds": seconds}
    found["processor"] = used
    return {name: round(value, 1) for name, value in found.items()} | {"trace": trace.samples}


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def foretold(way: str, length: int, tied: bool) -> float:
    """MiB of one step of a rank, by a rehearsal: what it needs beyond a step of 64 tokens."""
    import torch
    from drivetrain_cli.memory import Ranks
    from drivetrain_cli.planning.rehearsed import rehearse
    from drivetrain_cli.planning.subject import Subject
    from drivetrain_cli.stand_in import without_memory

    def inputs(samples: int, tokens: int) -> dict[str, Any]:
        ids = torch.zeros(samples, tokens, dtype=torch.int64)
        return {"input_ids": ids, "labels": ids.clone(), "use_cache": False}

    def mib(tokens: int) -> float:
        subject = Subject(
            lambda: without_memory(lambda: model_of(tokens, tied), "llama"),
            "llama",
            tokens,
            inputs,
            [],
        )
        _, ranks = ranks_of(way)
        return rehearse(config_of(way), subject, Ranks(ranks, 1, True)).reserved / 2**20

    return round(mib(length) - mib(64), 1)


def measure(way: str, length: int, options: argparse.Namespace) -> dict[str, Any] | None:
    """The largest of the ranks' figures; ``None`` if the step does not fit into memory."""
    _, ranks = ranks_of(way)
    command = [sys.executable, __file__, "--one", way, "--lengths", str(length)]
    command += [
        f"--{name}" for name in ("shapes-only", "tied") if vars(options)[name.replace("-", "_")]
    ]
    command += [] if options.limit is None else ["--limit", str(options.limit)]
    command += [] if options.chunk is None else ["--chunk", str(options.chunk)]
    base = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
    base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    base |= {"MALLOC_MMAP_THRESHOLD_": "65536"}
    with tempfile.TemporaryFile("w+") as errors:
        processes = [
            subprocess.Popen(
                command,
                env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            for rank in range(ranks)
        ]
        outputs = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            errors.seek(0)
            said = errors.read().strip().splitlines()
            print(way, length, *said[-1:], sep=": ", file=sys.stderr, flush=True)
            return None
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    keys = ("step", "process", "seconds", "processor")
    most = {key: max(each[key] for each in found) for key in keys}
    return most | {"trace": found[0]["trace"]}


def longest(way: str, options: argparse.Namespace) -> dict[str, float]:
    """The longest sequence, a multiple of 1,024, whose process stays below ``limit`` MiB.

    Memory grows with the length, so a line through two lengths says where to look.
    """
    limit: float = options.limit
    points: dict[int, float] = {}
    length, low = 2048, 0
    for _ in range(6):
        found = measure(way, length, options)
        _show(way, length, found)
        points[length] = limit * 2 if found is None else found["process"]
        low = max([n for n, mib in points.items() if mib <= limit], default=0)
        if len(points) == 1:
            length *= 2
            continue
        (a, first), (b, last) = sorted(points.items())[-2:]
        above = min((n for n, mib in points.items() if mib > limit), default=None)
        slope = (last - first) / (b - a)
        length = int((a + (limit - first) / slope) // 1024 * 1024)
        length = min(length, 4 * max(points)) if above is None else min(length, above - 1024)
        if length <= low or length in points:
            break
    return {"tokens": low, "process": points.get(low, 0.0)}


def _show(way: str, length: int, found: dict[str, Any] | None) -> None:
    figures = found and {name: value for name, value in found.items() if name != "trace"}
    print(way, length, figures, file=sys.stderr, flush=True)


def draw(
    found: dict[str, dict[str, float | None]],
    expected: dict[str, dict[str, float]],
    path: str,
) -> None:
    """A picture of all ways; what is foretold is dashed."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for way, by_length in found.items():
        points = [(int(length), mib) for length, mib in by_length.items() if mib is not None]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), marker="o", label=way)
    for way, foretold_by_length in expected.items():
        known = [(int(length), mib) for length, mib in foretold_by_length.items()]
        axes.plot(*zip(*known, strict=True), "--", marker=".", label=f"{way}, foretold")
    axes.set(xlabel="tokens of a sequence", ylabel="MiB of one step, per rank", yscale="log")
    axes.set_xscale("log", base=2)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, bbox_inches="tight")


def draw_trace(samples: list[tuple[float, float]], path: str) -> None:
    """A picture of one step's memory over time."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3))
    axes.plot(*zip(*samples, strict=True))
    axes.set(xlabel="seconds of the step", ylabel="MiB of the process", ylim=(0, None))
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    """Measure all ways at all lengths."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a sequence")
    parser.add_argument("--ways", nargs="+", choices=NAMES, default=[ALONE, *WAYS])
    parser.add_argument("--one", choices=NAMES, help="one step in this process")
    parser.add_argument("--limit", type=float, help="MiB of a process")
    parser.add_argument("--chunk", type=int, help="tokens of a chunk, of all ranks together")
    parser.add_argument("--shapes-only", action="store_true", help="no arithmetic of attention")
    parser.add_argument("--tied", action="store_true", help="one matrix for embedding and head")
    parser.add_argument(
        "--predict", nargs="+", choices=NAMES[1:], default=[], help="ways to foretell"
    )
    parser.add_argument("--picture", help="draw what is measured into this file")
    parser.add_argument("--trace", help="draw the memory of --one over time into this file")
    options = parser.parse_args()
    if options.one:
        run = measure if options.trace else step
        one = run(options.one, options.lengths[0], options)
        if one is not None and options.trace:
            draw_trace(one.pop("trace"), options.trace)
        print(json.dumps(one))
        return
    if options.limit is not None and options.lengths is None:
        print(
            json.dumps(
                {way: longest(way, options) for way in options.ways},
                indent=1,
            )
        )
        return
    found: dict[str, dict[str, float | None]] = {way: {} for way in options.ways}
    for way in options.ways:
        for length in options.lengths or LENGTHS:
            one = measure(way, length, options)
            _show(way, length, one)
            found[way][str(length)] = None if one is None else one["step"]
    ratios = {
        length: plain / tiled
        for length, plain in found.get("plain", {}).items()
        if plain is not None and (tiled := found.get("tiles", {}).get(length))
    }
    expected = {
        way: {str(n): foretold(way, n, options.tied) for n in options.lengths or LENGTHS}
        for way in options.predict
    }
    print(json.dumps({"mib": found, "plain_over_tiles": ratios, "foretold": expected}, indent=1))
    if options.picture:
        draw(found, expected, options.picture)


if __name__ == "__main__":
    main()

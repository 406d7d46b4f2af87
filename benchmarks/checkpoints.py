"""Measure saving, loading, background saves and planning, and print the figures as JSON.

    python benchmarks/checkpoints.py disk --gigabytes 4 --folder /path/on/the/disk
    python benchmarks/checkpoints.py background --gigabytes 1 --folder /path/on/the/disk
    python benchmarks/checkpoints.py planning --ranks 1024

``disk`` writes and reads a model's states with core's code, one process per rank, and in between as
many bytes with ``dd`` (``conv=fsync`` for writing, after the page cache was asked to forget the
files for reading). ``planning`` lays the fragments of a model with 1 billion parameters out over
ranks that do not exist, cut as ZeRO-3 cuts them, and times what each kind of rank has to plan; no
tensor is ever there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from drivetrain.checkpoint.format import index
from drivetrain.checkpoint.format.commit import PendingSave, SavedBox, merge
from drivetrain.checkpoint.format.index import DataFile, Stored, StoredTensor
from drivetrain.checkpoint.format.reading import check_coverage, restore
from drivetrain.checkpoint.format.storage import LocalStorage
from drivetrain.checkpoint.format.tensor_file import TensorEntry, WrittenFile
from drivetrain.contracts import Fragment, interval_boxes

KINDS = {"parameter": torch.bfloat16}
KINDS |= dict.fromkeys(("master", "exp_avg", "exp_avg_sq"), torch.float32)
REPEATS = 3


def shapes(width: int, layers: int, vocabulary: int = 32_000) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a decoder's parameters."""
    found: dict[str, tuple[int, ...]] = {"embed": (vocabulary, width)}
    for layer in range(layers):
        block = {"qkv": (3 * width, width), "out": (width, width), "norm": (width,)}
        block |= {"up": (4 * width, width), "down": (width, 4 * width), "bias": (4 * width,)}
        found |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return found


def layout(
    model: dict[str, tuple[int, ...]], rank: int, world: int, memory: torch.Tensor | None = None
) -> list[Fragment]:
    """A rank's fragments: of every tensor an equal share; in ``memory``, if there is any."""
    found, at = [], 0
    for kind, dtype in KINDS.items():
        for name, shape in model.items():
            numel = torch.Size(shape).numel()
            share = -(-numel // world)
            begin, end = min(rank * share, numel), min((rank + 1) * share, numel)
            flat = torch.empty(0, dtype=dtype)
            if memory is not None:
                nbytes = (end - begin) * dtype.itemsize
                flat = memory[at : at + nbytes].view(dtype)
                at += -(-nbytes // 64) * 64
            boxes = tuple(interval_boxes(shape, begin, end))
            read, write = _access(flat)
            found.append(Fragment(name, kind, shape, dtype, boxes, True, "host", read, write))
    return found


def _access(flat: torch.Tensor) -> tuple[Callable[[], torch.Tensor], Callable[..., None]]:
    return lambda: flat, lambda values: None


def saved_boxes(fragments: list[Fragment]) -> list[SavedBox]:
    return [
        SavedBox(
            TensorEntry(
                f"{f.kind}/{f.name}@{','.join(map(str, box.global_offset))}",
                f.dtype,
                box.size,
                lambda f=f, box=box: box.of_storage(f.read()),  # type: ignore[misc]
            ),
            f"{f.kind}/{f.name}",
            f.global_shape,
            box.global_offset,
        )
        for f in fragments
        for box in f.boxes
    ]


def pending(folder: Path, fragments: list[Fragment], rank: int, world: int) -> PendingSave:
    manifest = {
        "format": index.FORMAT,
        **{key: {} for key in ("versions", "axes", "state", "client_state")},
        "guarantee": {"promise": ""},
        "saved_at": "",
        "world_size": world,
        "step": 1,
        "excluded": [],
    }
    return PendingSave(
        storage=LocalStorage(str(folder)),
        tag="t",
        id="0123abcd",
        rank=rank,
        world_size=world,
        boxes=sorted(saved_boxes(fragments), key=lambda box: -box.entry.dtype.itemsize),
        empty={},
        manifest=manifest,
    )


# -- disk ------------------------------------------------------------------------------------------


def disk(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Bandwidths, alternating with dd's, and the memory that loading takes beside the states."""
    folder = options.folder / "checkpoint-benchmark"
    model = shapes(1024, max(1, int(options.gigabytes * 1e9 / 14 / (12 * 1024**2)) - 3))
    numel = sum(torch.Size(shape).numel() for shape in model.values())
    nbytes = numel * sum(dtype.itemsize for dtype in KINDS.values())
    rows: dict[str, list[float]] = {}
    busy: dict[str, list[float]] = {}
    for _ in range(REPEATS):
        for what in ("dd write", "save", "dd read", "load", "load reshaped"):
            seconds, used = _timed(what, options, folder, nbytes)
            rows.setdefault(what, []).append(nbytes / seconds / 1e6)
            busy.setdefault(what, []).append(used / nbytes * 1e9)
    shutil.rmtree(folder)
    medians = {what: statistics.median(values) for what, values in rows.items()}
    processor = {what: statistics.median(values) for what, values in busy.items()}
    yield {"bytes": nbytes, "ranks": options.ranks, "MB/s": medians}
    yield {"processor seconds per GB": processor}
    yield {
        "save / dd write": medians["save"] / medians["dd write"],
        "load / dd read": medians["load"] / medians["dd read"],
        "load reshaped, times the load": medians["load"] / medians["load reshaped"],
    }


def _timed(
    what: str, options: argparse.Namespace, folder: Path, nbytes: int
) -> tuple[float, float]:
    blob, blocks = folder / "blob", nbytes >> 20
    folder.mkdir(exist_ok=True)
    if what == "dd write":
        command = ["dd", "if=/dev/zero", f"of={blob}", "bs=1M", f"count={blocks}", "conv=fsync"]
        return _seconds([command])
    if what == "dd read":
        _forget(folder)
        seconds = _seconds([["dd", f"if={blob}", "of=/dev/null", "bs=1M"]])
        blob.unlink()
        return seconds
    if what == "save":  # neither it nor dd's has an earlier file to cut off
        shutil.rmtree(folder / "t", ignore_errors=True)
    else:
        _forget(folder)
    ranks = options.ranks + (what == "load reshaped")
    worker = [sys.executable, __file__, "worker", what.partition(" ")[0], str(options.gigabytes)]
    return _seconds([[*worker, str(folder), str(rank), str(ranks)] for rank in range(ranks)])


def _seconds(commands: list[list[str]]) -> tuple[float, float]:
    """Wall time of the slowest process and processor time of all, without start and end."""
    if commands[0][0] == "dd":
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(commands[0], stderr=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return time.perf_counter() - begin, used
    workers = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )
        for command in commands
    ]
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.readline()
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    answers = [json.loads(worker.communicate()[0]) for worker in workers]
    return max(a["wall"] for a in answers), sum(a["processor"] for a in answers)


def _forget(folder: Path) -> None:
    """Ask the page cache to drop the files."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def worker(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One rank that saves or loads its share when it is told."""
    model = shapes(1024, max(1, int(options.gigabytes * 1e9 / 14 / (12 * 1024**2)) - 3))
    numel = sum(torch.Size(shape).numel() for shape in model.values())
    memory = torch.ones(numel * 14 // options.ranks + (1 << 20) * 64, dtype=torch.uint8)
    fragments = layout(model, options.rank, options.ranks, memory)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin, processor = time.perf_counter(), time.process_time()
    if options.action == "save":
        save = pending(options.folder, fragments, options.rank, options.ranks)
        save.write()
        if options.rank == 0:
            while save.missing_votes():
                time.sleep(0.01)
            save.commit()
    else:
        stored = Stored(LocalStorage(str(options.folder)), "t")
        restore(stored.storage, list(_work(stored, fragments)))
    extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    wall = time.perf_counter() - begin
    yield {"extra KiB": extra, "wall": wall, "processor": time.process_time() - processor}


def _work(stored: Stored, fragments: list[Fragment]) -> Iterator[tuple[Fragment, StoredTensor]]:
    for fragment in fragments:
        source = stored.find(fragment.kind, fragment.name)
        assert source is not None
        check_coverage(fragment, source, stored.place)
        yield fragment, source


# -- background ------------------------------------------------------------------------------------


def background(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """How long a background save keeps training waiting, against a copy of the same memory."""
    from drivetrain_checkpoint_tools.background import BackgroundWriter

    folder = options.folder / "checkpoint-benchmark"
    model = shapes(1024, max(1, int(options.gigabytes * 1e9 / 14 / (12 * 1024**2)) - 3))
    numel = sum(torch.Size(shape).numel() for shape in model.values())
    memory = torch.ones(numel * 14 + (1 << 20) * 64, dtype=torch.uint8)
    other = torch.ones_like(memory)
    fragments = layout(model, 0, 1, memory)
    writer = BackgroundWriter(torch.device("cpu"), 60.0)
    copies, stalls = [], []
    for number in range(1 + REPEATS):
        begin = time.perf_counter()
        other.copy_(memory)
        copies.append(time.perf_counter() - begin)
        save = pending(folder, fragments, 0, 1)
        begin = time.perf_counter()
        writer.submit(save)
        stalls.append(time.perf_counter() - begin)
        writer.wait()
        assert number >= 0
    shutil.rmtree(folder)
    yield {
        "bytes": save.nbytes,
        "copy s": statistics.median(copies[1:]),
        "first save stalls s": stalls[0],
        "save stalls s": statistics.median(stalls[1:]),
        "times a copy": statistics.median(stalls[1:]) / statistics.median(copies[1:]),
    }


# -- planning --------------------------------------------------------------------------------------


def planning(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds of a processor that planning takes, for 1.27 billion parameters with AdamW."""
    world, model = options.ranks, shapes(2048, 24)
    numel = sum(torch.Size(shape).numel() for shape in model.values())
    seconds: dict[str, float] = {}
    file = DataFile("f", "f", 1 << 62)

    begin = time.process_time()
    parts = [_part(model, rank, world) for rank in range(world)]
    seconds["one rank: plan a save"] = (time.process_time() - begin) / world
    texts = [json.dumps(part).encode() for part in parts]

    begin = time.process_time()
    whole = merge(json.loads(text) for text in texts)
    text = json.dumps(whole, separators=(",", ":")).encode()
    seconds["rank 0: merge all votes"] = time.process_time() - begin
    boxes = sum(len(raw["rank"]) for raw in whole["tensors"].values())

    for target in (world, world * 3 // 4, 8):
        begin = time.process_time()
        stored = json.loads(text)["tensors"]
        for fragment in layout(model, target // 2, target):
            raw = stored[f"{fragment.kind}/{fragment.name}"]
            source = StoredTensor(
                fragment.name, fragment.dtype, fragment.global_shape, raw, lambda _: file
            )
            check_coverage(fragment, source, "benchmark")
        seconds[f"one rank: plan a load on {target} ranks"] = time.process_time() - begin
    yield {"parameters": numel, "ranks": world, "boxes": boxes, "index bytes": len(text)}
    yield {"seconds": seconds}


def _part(model: dict[str, tuple[int, ...]], rank: int, world: int) -> dict[str, Any]:
    save = pending(Path(), layout(model, rank, world), rank, world)
    places, at = [], 1024
    for box in save.boxes:
        blocks = -(-box.entry.nbytes // (1 << 20))
        places.append((at, "0123abcd" * blocks))
        at += box.entry.nbytes
    return save._part(WrittenFile(at, 1024, "0123abcd", places))


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description="Measure checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in {"disk": disk, "background": background}.items():
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("--gigabytes", type=float, default=2.0)
        command.add_argument("--folder", type=Path, default=Path())
        command.add_argument("--ranks", type=int, default=2)
    command = commands.add_parser("planning")
    command.set_defaults(function=planning)
    command.add_argument("--ranks", type=int, default=1024)
    command = commands.add_parser("worker")
    command.set_defaults(function=worker)
    command.add_argument("action", choices=["save", "load"])
    command.add_argument("gigabytes", type=float)
    command.add_argument("folder", type=Path)
    command.add_argument("rank", type=int)
    command.add_argument("ranks", type=int)
    options = parser.parse_args()
    for row in options.function(options):
        print(json.dumps(row, indent=None if options.command == "worker" else 1))


if __name__ == "__main__":
    main()

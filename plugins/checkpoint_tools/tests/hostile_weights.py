"""Hostile safetensors files, whole and in shards."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from drivetrain_checkpoint_tools import import_weights
from hostile_cases import Case, mutants
from safetensors.torch import save_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write(path: Path, header: Any, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    claimed = len(text) if length is None else length
    path.write_bytes(claimed.to_bytes(8, "little") + text + data)


def entry(begin: int, end: int, dtype: str = "F32", shape: Any = None) -> dict[str, Any]:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def cases(base: Path, outside: Path) -> Iterator[Case]:
    whole, sharded = base / "whole", base / "sharded"
    whole.mkdir()
    sharded.mkdir()
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    save_file(tensors, whole / SINGLE)
    for name, tensor in tensors.items():
        save_file({name: tensor}, sharded / f"{name}.safetensors")
    index = {"metadata": {}, "weight_map": {name: f"{name}.safetensors" for name in tensors}}
    (sharded / INDEX).write_text(json.dumps(index))
    for sound in (whole, sharded):
        read(sound, base / f"out-{sound.name}")
    data = (whole / SINGLE).read_bytes()
    header = json.loads(data[8 : (begin := 8 + int.from_bytes(data[:8], "little"))])
    draw = random.Random(12)
    for name, changed in draw.sample(list(mutants(header)), 40):
        yield Case(
            f"weights: header {name}",
            whole,
            lambda f, c=changed: write(f / SINGLE, c, data[begin:]),
            read,
        )
    for name, changed in draw.sample(list(mutants(index)), 20):
        yield Case(
            f"weights: index {name}",
            sharded,
            lambda f, c=changed: (f / INDEX).write_text(json.dumps(c)),
            read,
        )
    for name, change in _constructions(outside).items():
        yield Case(f"weights: {name}", whole, change, read, must_fail=True)
    for name, changed in _maps().items():
        yield Case(
            f"weights: {name}",
            sharded,
            lambda f, c=changed: (f / INDEX).write_text(json.dumps(c)),
            read,
            must_fail=True,
        )


def read(folder: Path, out: Path) -> None:
    import_weights(str(folder), str(out))


def _maps() -> dict[str, Any]:
    return {
        "a map that leads out": {"weight_map": {"a": "../outside/secret"}},
        "a map to an absolute path": {"weight_map": {"a": "/etc/passwd"}},
        "a map of lists": {"weight_map": {"a": ["a.safetensors"]}},
        "a map that is none": {"weight_map": ["a"]},
        "a map of what is not there": {"weight_map": {"a": "none.safetensors"}},
        "a map with names that are not there": {"weight_map": {"\x1b[31m\n": "a.safetensors"}},
    }


def _constructions(outside: Path) -> dict[str, Callable[[Path], object]]:
    kib = b"\0" * 1024

    def made(header: Any, data: bytes = kib, length: int | None = None) -> Callable[[Path], object]:
        return lambda folder: write(folder / SINGLE, header, data, length)

    def link(target: Path) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            (folder / SINGLE).unlink()
            (folder / SINGLE).symlink_to(target)

        return change

    def pipe(folder: Path) -> None:
        (folder / SINGLE).unlink()
        os.mkfifo(folder / SINGLE)

    def sparse(folder: Path) -> None:
        write(folder / SINGLE, {"a": entry(0, 8 << 30)}, b"")
        os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size + (8 << 30))

    def elsewhere(folder: Path) -> None:
        (folder / SINGLE).rename(outside / "weights")
        (folder / SINGLE).symlink_to(outside / "weights")

    return {
        "tensors of the same bytes": made({f"t{n}": entry(0, 1024) for n in range(20_000)}),
        "tensors that overlap": made({"a": entry(0, 1024), "b": entry(512, 1024)}),
        "a gap": made({"a": entry(0, 512), "b": entry(768, 1024)}),
        "bytes behind the last": made({"a": entry(0, 512)}),
        "an offset before the first": made({"a": entry(-4, 1020)}),
        "a shape that overflows": made({"a": entry(0, 1024, shape=[1 << 62, 1 << 62, 4])}),
        "a shape of many dimensions": made({"a": entry(0, 1024, shape=[1] * 100_000 + [256])}),
        "a shape of great numbers": made({"a": entry(0, 1024, shape=[10**4000] * 3000)}),
        "a shape of negative numbers": made({"a": entry(0, 1024, shape=[-16, -16])}),
        "a shape of texts": made({"a": entry(0, 1024, shape=["256"])}),
        "a dtype of objects": made({"a": entry(0, 1024, dtype="OBJECT")}),
        "a header of 2^63 bytes": made({}, length=1 << 63),
        "a header that is longer than the file": made({}, length=2000),
        "a header of deep JSON": made(b"[" * 100_000),
        "a header of a long number": made(b'{"a": ' + b"9" * 5000 + b"}"),
        "a header that is no text": made(b"\xff\xfe\x00"),
        "a file of nothing": lambda folder: (folder / SINGLE).write_bytes(b""),
        "a pipe": pipe,
        "8 GiB of holes": sparse,
        "a link to a secret": link(outside / "secret"),
        "a link to /dev/zero": link(Path("/dev/zero")),
        "weights that are elsewhere": elsewhere,
    }

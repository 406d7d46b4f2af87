"""Hostile checkpoints of our own format, with checksums that are right."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from drivetrain_checkpoint_tools import export, inspect, verify
from hostile_cases import Case, mutants
from torch import nn

import drivetrain
from drivetrain.checkpoint.format.index import seal
from drivetrain.checkpoint.opening import opened
from drivetrain.errors import CheckpointError

TAG = "global_step1"


def engine_of(steps: int) -> drivetrain.engine.engine.Engine:
    torch.manual_seed(1)
    engine, *_ = drivetrain.initialize(
        model=nn.Linear(6, 5),
        config={
            "train_batch_size": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
            "bf16": {"enabled": True},
        },
    )
    for _ in range(steps):
        engine.backward(engine(torch.ones(1, 6, dtype=torch.bfloat16)).float().square().mean())
        engine.step()
    return engine


def file(folder: Path, pattern: str) -> Path:
    return next((folder / TAG).glob(pattern))


MANIFEST, INDEX, DATA = "manifest.json", "index-*.json", "rank*.safetensors"


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the index as one would who knows the format."""
    content = json.loads(file(folder, INDEX).read_text())
    content = change(content) or content
    data = json.dumps(content).encode()
    file(folder, INDEX).write_bytes(data)
    edit_manifest(
        folder,
        lambda manifest: manifest.update(
            index={"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        ),
    )


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads(file(folder, MANIFEST).read_text())["manifest"]
    manifest = change(manifest) or manifest
    file(folder, MANIFEST).write_bytes(seal(manifest))


def cases(base: Path, outside: Path) -> Iterator[Case]:
    engine = engine_of(1)
    engine.save_checkpoint(base, client_state={"note": ["x", 1]})

    def load(folder: Path, out: Path) -> None:
        """Have all that reads checkpoints read it: the command's tools, and an engine."""
        problems: list[str] = []
        with opened(str(folder)) as stored:
            problems = verify(stored)
            inspect(stored, values=True, hashes=True)
            export(stored, str(out))
        engine.load_checkpoint(folder, TAG)
        if problems:
            raise CheckpointError(problems[0])

    load(base, base.parent / "sound")  # a sound one is read

    made = [*_mutations(base), *_constructions(outside)]
    for name, change, must_fail in made:
        yield Case(f"checkpoint: {name}", base, change, load, must_fail)
        if "index" not in name and "manifest" not in name:
            yield Case(
                f"engine: {name}",
                base,
                change,
                lambda folder, _: engine.load_checkpoint(folder, TAG),
                must_fail,
            )


Made = tuple[str, Callable[[Path], object], bool]


def _mutations(base: Path) -> Iterator[Made]:
    draw = random.Random(11)
    index = json.loads(file(base, INDEX).read_text())
    manifest = json.loads(file(base, MANIFEST).read_text())["manifest"]
    for name, changed in draw.sample(list(mutants(index)), 50):
        yield f"index {name}", lambda f, c=changed: edit_index(f, lambda _: c), False
    for name, changed in draw.sample(list(mutants(manifest)), 40):
        yield f"manifest {name}", lambda f, c=changed: edit_manifest(f, lambda _: c), False
    for pattern, number in itertools.product((MANIFEST, INDEX, DATA), range(3)):
        at = draw.random()

        def flip(folder: Path, pattern: str = pattern, at: float = at) -> None:
            path = file(folder, pattern)
            data = bytearray(path.read_bytes())
            data[int(at * len(data))] ^= 4
            path.write_bytes(data)

        yield f"flipped bit {number} of {pattern}", flip, pattern != MANIFEST


def _weight(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["tensors"]["master/weight"]
    return found


def _boxes(*rows: tuple[int, int]) -> Callable[[Path], None]:
    """Cut a tensor of 5 rows into boxes of rows, which need not be all of it."""

    def change(content: dict[str, Any]) -> None:
        raw = _weight(content)
        count = len(rows)
        raw |= {"rank": [0] * count, "at": raw["at"][:1] * count, "crc": raw["crc"][:1] * count}
        raw["offset"] = [n for first, _ in rows for n in (first, 0)]
        raw["size"] = [n for first, last in rows for n in (last - first, 6)]

    return lambda folder: edit_index(folder, change)


def _deep(folder: Path) -> None:
    file(folder, MANIFEST).write_text('{"manifest": ' + "[" * 100_000)


def _repeated_bytes(folder: Path) -> None:
    """Two tensors of the same bytes, so that all together are more than the files."""

    def change(content: dict[str, Any]) -> None:
        content["tensors"] |= {f"master/copy{n}": _weight(content) for n in range(10_000)}

    edit_index(folder, change)


def _large(folder: Path) -> None:
    """A tensor of a terabyte of which every box is the same bytes."""

    def change(content: dict[str, Any]) -> None:
        raw, count = _weight(content), 2000
        for column in ("rank", "at", "crc"):
            raw[column] = raw[column][:1] * count
        raw |= {"shape": [count * 5, 6], "size": [5, 6] * count}
        raw["offset"] = [n for row in range(count) for n in (5 * row, 0)]
        content["ranks"][0]["bytes"] = 1 << 50

    edit_index(folder, change)


def _sparse(pattern: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        os.truncate(file(folder, pattern), 4 << 30)

    return change


def _pipe(pattern: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = file(folder, pattern) if "*" in pattern or "." in pattern else folder / pattern
        path.unlink()
        os.mkfifo(path)

    return change


def _folder(pattern: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = file(folder, pattern)
        path.unlink()
        path.mkdir()

    return change


def _link(pattern: str, target: Path) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = file(folder, pattern)
        path.unlink()
        path.symlink_to(target)

    return change


def _moved(outside: Path, what: str) -> Callable[[Path], None]:
    """What is right in itself, but elsewhere."""

    def change(folder: Path) -> None:
        number = len(list(outside.iterdir()))
        path = folder / TAG if what == "tag" else file(folder, what)
        path.rename(outside / f"moved{number}")
        path.symlink_to(outside / f"moved{number}")

    return change


def _own(content: dict[str, Any]) -> None:
    del content["ranks"][0]["own"]["state"]


def _constructions(outside: Path) -> Iterator[Made]:
    boxes = {
        "two equal boxes and a hole": _boxes((0, 2), (0, 2), (4, 5)),
        "overlapping boxes and a hole": _boxes((0, 3), (1, 3)),
        "boxes that overlap": _boxes((0, 3), (2, 5)),
        "a hole": _boxes((0, 3), (4, 5)),
    }
    for name, change in boxes.items():
        yield f"index: {name}", change, True
    yield "no state of a rank", lambda f: edit_index(f, _own), True
    yield "tensors of the same bytes", _repeated_bytes, True
    yield "a tensor larger than its files", _large, True
    yield "deep JSON", _deep, True
    for pattern in (MANIFEST, INDEX, DATA):
        yield f"a pipe as {pattern}", _pipe(pattern), True
        yield f"a folder as {pattern}", _folder(pattern), True
        yield f"a link to a secret as {pattern}", _link(pattern, outside / "secret"), True
        yield f"a link to /dev/zero as {pattern}", _link(pattern, Path("/dev/zero")), True
        yield f"{pattern} of 4 GiB of holes", _sparse(pattern), True
        yield f"{pattern} elsewhere", _moved(outside, pattern), True
    yield "the folder elsewhere", _moved(outside, "tag"), True
    for text in ("../outside", "", "x" * 5000, "\x1b[31m", "/etc", "global_step1\0"):
        yield f"latest is {text[:20]!r}", lambda f, t=text: (f / "latest").write_text(t), False
    yield "latest is a pipe", _pipe("latest"), False

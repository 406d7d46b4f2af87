"""Tensors cut over imagined ranks, saved and loaded in one process without an engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from drivetrain.checkpoint.format import index
from drivetrain.checkpoint.format.commit import PendingSave, Retention, SavedBox
from drivetrain.checkpoint.format.index import Stored
from drivetrain.checkpoint.format.reading import check_coverage, read_whole, restore
from drivetrain.checkpoint.format.storage import LocalStorage
from drivetrain.checkpoint.format.tensor_file import TensorEntry, as_buffer, raw_bytes
from drivetrain.checkpoint.load import check_file
from drivetrain.contracts import Fragment, interval_boxes

DATA, INDEX = "rank00000-0123abcd.safetensors", "index-0123abcd.json"

Tensors = Mapping[str, torch.Tensor]
"""``kind/name`` -> tensor."""


def some_tensors(seed: int) -> dict[str, torch.Tensor]:
    """Scalars, odd shapes, and several dtypes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "parameter/weight": torch.randn(5, 7, generator=generator).bfloat16(),
        "master/weight": torch.randn(5, 7, generator=generator),
        "exp_avg/weight": torch.randn(5, 7, generator=generator),
        "step/weight": torch.tensor(seed),
        "parameter/kernel": torch.randn(3, 2, 2, 5, generator=generator),
        "parameter/bias": torch.randn(4, generator=generator).half(),
    }


def cuts(numel: int, world: int) -> list[int]:
    """Ends of unequal parts, of which the first may be empty."""
    return [numel * rank * (rank + 1) // (world * (world + 1)) for rank in range(world + 1)]


def fragments(tensors: Tensors, rank: int, world: int, *, filled: bool = True) -> list[Fragment]:
    """A rank's part of every tensor; with zeros in it unless ``filled``."""
    return [_fragment(key, t, rank, world, filled=filled) for key, t in tensors.items()]


def _fragment(key: str, tensor: torch.Tensor, rank: int, world: int, *, filled: bool) -> Fragment:
    ends = cuts(tensor.numel(), world)
    begin, end = (0, int(rank == world - 1)) if not tensor.dim() else ends[rank : rank + 2]
    flat = tensor.reshape(-1)[begin:end].clone()
    if not filled:
        flat.zero_()
    kind, name = index.split_key(key)
    return Fragment(
        name=name,
        kind=kind,
        global_shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        boxes=tuple(interval_boxes(tensor.shape, begin, end)),
        owner=True,
        home="host",
        read=lambda: flat,
        write=lambda values: None if values is flat else flat.copy_(values),
    )


def pending(
    folder: Path,
    tag: str,
    tensors: Tensors,
    rank: int,
    world: int,
    *,
    save_id: str = "0123abcd",
    retention: Retention | None = None,
    **manifest: Any,
) -> PendingSave:
    """One imagined rank's save of its part."""
    boxes = [
        SavedBox(
            TensorEntry(
                f"{f.kind}/{f.name}@{','.join(map(str, box.global_offset))}",
                f.dtype,
                box.size,
                lambda f=f, box=box: box.of_storage(f.read()),
            ),
            f"{f.kind}/{f.name}",
            f.global_shape,
            box.global_offset,
        )
        for f in fragments(tensors, rank, world)
        for box in f.boxes
    ]
    state = torch.frombuffer(bytearray(json.dumps({"rank": rank}).encode()), dtype=torch.uint8)
    boxes.append(
        SavedBox(TensorEntry("rank/state", state.dtype, tuple(state.shape), lambda: state), "state")
    )
    return PendingSave(
        storage=LocalStorage(str(folder)),
        tag=tag,
        id=save_id,
        rank=rank,
        world_size=world,
        boxes=sorted(boxes, key=lambda box: -box.entry.dtype.itemsize),
        empty={},
        manifest={
            "format": index.FORMAT,
            "saved_at": "2026-01-01T00:00:00+00:00",
            "versions": {},
            "world_size": world,
            "axes": {},
            "step": 1,
            "state": {},
            "client_state": {},
            "excluded": [],
            "guarantee": {},
            **manifest,
        },
        retention=retention or Retention(),
    )


def save_all(folder: Path, tag: str, tensors: Tensors, world: int, **options: Any) -> None:
    """Save on all imagined ranks, one after the other."""
    saves = [pending(folder, tag, tensors, rank, world, **options) for rank in range(world)]
    for save in saves:
        save.write()
    saves[0].commit()


def load_all(folder: Path, tag: str, like: Tensors, world: int = 1) -> dict[str, torch.Tensor]:
    """Load into imagined ranks, and put their parts together."""
    stored = Stored(LocalStorage(str(folder)), tag)
    for rank in range(stored.world_size):
        check_file(stored, rank)
        assert read_whole(stored.storage, stored.own(rank)["state"]).numel()
    whole = {key: torch.zeros_like(tensor) for key, tensor in like.items()}
    for rank in range(world):
        work = list(_work(stored, fragments(like, rank, world, filled=False)))
        restore(stored.storage, work)
        for fragment, _ in work:
            for box in fragment.boxes:
                target = whole[f"{fragment.kind}/{fragment.name}"]
                box.of(target).copy_(box.of_storage(fragment.read()))
    stored.storage.close()
    return whole


def _work(stored: Stored, wanted: list[Fragment]) -> Iterator[tuple[Fragment, index.StoredTensor]]:
    for fragment in wanted:
        source = stored.find(fragment.kind, fragment.name)
        assert source is not None, fragment.name
        check_coverage(fragment, source, stored.place)
        yield fragment, source


def content_hash(tensors: Tensors) -> str:
    """SHA-256 over names, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(as_buffer(raw_bytes(tensor)))
    return digest.hexdigest()


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the index as somebody would who knows the format: checksums are right again."""
    (path,) = folder.glob("index-*.json")
    content = json.loads(path.read_text())
    change(content)
    data = json.dumps(content).encode()
    path.write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())["manifest"]
    manifest["index"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_bytes(index.seal(manifest))

"""Weights in the layout of the Hugging Face Hub: ``model.safetensors``, whole or in shards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from drivetrain.checkpoint.agreement import worst
from drivetrain.checkpoint.format.index import StoredTensor
from drivetrain.checkpoint.format.reading import check_coverage, read_whole, restore
from drivetrain.checkpoint.format.safetensors_file import find_weights, open_weights
from drivetrain.checkpoint.format.storage import Storage
from drivetrain.checkpoint.state import (
    buffer_fragment,
    client_fragments,
    persistent_buffers,
)
from drivetrain.errors import CheckpointError
from drivetrain_checkpoint_tools.conversion import Imported, Source, write_checkpoint

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine


def load_pretrained(
    engine: Engine,
    folder: str,
    *,
    rename: Callable[[str], str] = str,
    strict: bool = True,
) -> None:
    """Fill an engine's parameters, masters and buffers straight from files. Collective.

    Each rank reads only what it holds. Masters take the files' precision; optimizer states stay as
    they are.

    Args:
        engine: what to fill.
        folder: with weights in safetensors files; a path or a URL.
        rename: a parameter's name in the module -> its name in the files.
        strict: module and files must have the same names.

    Raises:
        CheckpointError: on every rank: names or shapes differ, or a file is damaged.
    """
    storage = open_weights(folder)
    problem = None
    try:
        _fill(engine, storage, rename, strict=strict)
    except (CheckpointError, OSError) as error:
        problem = str(error)
    finally:
        storage.close()
    found = worst(engine.job, problem)
    if found is not None:
        raise CheckpointError(f"weights were not loaded from {folder}: {found}")
    engine.states.fragments_written()


def import_weights(source: str, folder: str, tag: str | None = None) -> str:
    """Make a checkpoint of weights alone, which loads with ``load_module_only=True``.

    Args:
        source: with weights in safetensors files; a path or a URL.
        folder: of the checkpoints.
        tag: of the new one; ``global_step0`` by default.

    Returns:
        The checkpoint's path.

    Raises:
        CheckpointError: a file is damaged, or there are no weights.
    """
    with closing(open_weights(source)) as storage:
        sources = [
            Source("parameter", name, t.dtype, t.shape, partial(read_whole, storage, t))
            for name, t in find_weights(storage).items()
        ]
        imported = Imported(sources, weaker=["there are weights only, so load_module_only=True"])
        return write_checkpoint(imported, folder, tag)


def _fill(engine: Engine, storage: Storage, rename: Callable[[str], str], *, strict: bool) -> None:
    weights = find_weights(storage)
    used: set[str] = set()
    missing: list[str] = []

    def source(name: str) -> StoredTensor | None:
        wanted = rename(name)
        used.add(wanted)
        if wanted not in weights:
            missing.append(wanted)
        return weights.get(wanted)

    kept = [f for f in engine.states.fragments() if f.kind in ("parameter", "master")]
    fragments = client_fragments(kept, engine.job.parameters, engine.module)
    work = [(f, found) for f in fragments if (found := source(f.name)) is not None]
    filled = []
    for name, (buffer, info) in persistent_buffers(engine.job.parameters, engine.module).items():
        used.add(rename(name))
        if (found := weights.get(rename(name))) is None:
            continue
        if info.placement is None:
            filled.append((buffer, found))
        else:
            work.append((buffer_fragment(name, buffer, info.placement), found))
    if strict and missing:
        raise CheckpointError(f"they lack {', '.join(sorted(set(missing))[:5])}")
    if strict and (extra := sorted(set(weights) - used)):
        raise CheckpointError(f"they have {', '.join(extra[:5])}, which the module lacks")
    for fragment, tensor in work:
        check_coverage(fragment, tensor, storage.root)
    restore(storage, work)
    for buffer, tensor in filled:
        buffer.copy_(read_whole(storage, tensor))

"""Compress a model by a recipe: in memory, or from a folder into a folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from drivetrain.errors import ConfigError
from drivetrain_compression.calibrated.data import as_batches, print_of, read_batches
from drivetrain_compression.calibrated.first_inputs import Batch
from drivetrain_compression.calibrated.sources import InMemory, Source, opened
from drivetrain_compression.calibrated.walk import Finished, Report, Walk
from drivetrain_compression.files import compressed_tensors
from drivetrain_compression.files.folder import OutputFolder
from drivetrain_compression.recipe.recipe import Recipe

RecipeSource = str | os.PathLike[str] | Mapping[str, Any]


def _silent(what: str, done: int, total: int) -> None:
    return


def compress_module(
    module: nn.Module,
    recipe: RecipeSource,
    data: Iterable[Any] = (),
    *,
    report: Report = _silent,
) -> dict[str, Finished]:
    """Change a module in memory as ``recipe`` says; it computes with compressed weights then.

    Args:
        module: changed in place; left in eval mode.
        recipe: a path, or what is in one.
        data: batches, each a mapping of the module's arguments or a tensor of token ids.
        report: told how far the work is.

    Returns:
        what was chosen, by the names of blocks; values of tensors are those of the module.

    Raises:
        ConfigError: the recipe is wrong, or does not fit the module or the data. Whatever is
            known of weights, and whether blocks can be rotated, is found out before anything is
            changed; what only the data of a later block shows leaves earlier blocks changed.
    """
    found: dict[str, Finished] = {}

    def keep(number: int, block: Finished) -> None:
        found[block.name] = block

    made = Recipe.read(recipe if isinstance(recipe, Mapping) else Path(recipe))
    with tempfile.TemporaryDirectory(prefix="drivetrain-compress-") as work:
        Walk(InMemory(module), made, as_batches(data), Path(work), keep, report).run()
    return found


def compress(
    model: nn.Module | str | os.PathLike[str],
    recipe: RecipeSource,
    data: str | os.PathLike[str] | Iterable[Any] | None,
    out: str | os.PathLike[str],
    *,
    format: str = compressed_tensors.NAME,
    samples: int = 128,
    length: int = 512,
    rows: int = 4,
    report: Report = _silent,
) -> dict[str, Any]:
    """Compress ``model`` into the folder ``out``, with one of its blocks in memory at a time.

    The folder appears when it is complete. After a kill the same call, with the same weights, goes
    on with the block at which it was; what is finished until then lies in ``OUT.partial``.

    Args:
        model: a folder of Transformers with safetensors files; a GGUF file or a module, which are
            in memory as a whole.
        recipe: a path, or what is in one.
        data: a file (see ``read_batches``), batches, or ``None`` if no method needs data.
        out: must not exist.
        format: ``compressed-tensors``, ``drivetrain`` or ``plain``.
        samples: rows of a file that are used.
        length: tokens of a row.
        rows: of a file in a batch.
        report: told how far the work is.

    Returns:
        what ``drivetrain_compression.json`` says in the folder.

    Raises:
        ConfigError: the recipe, model, data or folder is wrong, or they do not fit; nothing was
            written to ``out``.
        CheckpointError: a file of the model is damaged.
    """
    path = Path(out)
    if path.exists():
        raise ConfigError(f"{path} exists; choose another folder, or remove it")
    made = Recipe.read(recipe if isinstance(recipe, Mapping) else Path(recipe))
    with opened(model) as source:
        batches = _batches(data, source, samples, length, rows)
        job = {
            "model": str(source.folder or type(source.module).__name__),
            "weights": source.fingerprint(),
            "modifiers": [
                {type(m).__name__: m.config.model_dump(mode="json")} for m in made.modifiers
            ],
            "data": print_of(batches),
            "format": format,
        }
        folder = OutputFolder(path, format, job)
        try:
            Walk(source, made, batches, folder.work, folder.keep, report).run()
        except ConfigError:
            folder.discard()  # the same job would be refused again
            raise
        return folder.finish(source)


def _batches(data: Any, source: Source, samples: int, length: int, rows: int) -> list[Batch]:
    if data is None:
        return []
    if isinstance(data, str | os.PathLike):
        return read_batches(Path(data), source.folder, samples=samples, length=length, rows=rows)
    return as_batches(data)

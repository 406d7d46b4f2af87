"""Folders with compressed models: complete, or not there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain_compression.calibrated.sources import Source
from drivetrain_compression.calibrated.walk import Finished
from drivetrain_compression.files import compressed_tensors, own

LAYOUTS: dict[str, ModuleType] = {layout.NAME: layout for layout in (compressed_tensors, own)}
PLAIN = "plain"
"""Ordinary weights, as compressed layers compute with them."""

DESCRIPTION = "drivetrain_compression.json"
"""What a folder says of how it was made, and of layers in Drivetrain's own layout."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".onnx", ".h5")


class OutputFolder:
    """A folder that appears under its name when everything in it is complete.

    Until then all lies in ``NAME.partial``; the same job goes on there after a kill.

    Args:
        path: the folder; must not exist.
        layout: a key of :data:`LAYOUTS`, or :data:`PLAIN`.
        job: what is done to which model; another job does not go on with what is there.

    Raises:
        ConfigError: the folder exists, another process writes it, or a part of another job is
            there.
    """

    def __init__(self, path: Path, layout: str, job: Mapping[str, Any]) -> None:
        if layout not in (*LAYOUTS, PLAIN):
            known = ", ".join((*LAYOUTS, PLAIN))
            raise ConfigError(f"format {layout!r} is not known; there are {known}")
        if path.exists():
            raise ConfigError(f"{path} exists; choose another folder, or remove it")
        self.path, self.layout = path, layout
        self.partial = path.with_name(f"{path.name}.partial")
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = (self.partial / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another process writes {path}; wait for it") from None
        print_of = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
        mark = self.partial / "job"
        if mark.exists() and mark.read_text("utf-8") != print_of:
            raise ConfigError(
                f"{self.partial} is a part of another job (other model, recipe, data or format); "
                "remove it, or choose another folder"
            )
        mark.write_text(print_of, "utf-8")
        self._job = dict(job)

    @property
    def work(self) -> Path:
        """Where files lie that the result does not have."""
        return self.partial

    def keep(self, number: int, found: Finished) -> None:
        """Write a finished block; a part of the output."""
        tensors: dict[str, torch.Tensor] = {}
        facts = {}
        layout = LAYOUTS.get(self.layout)
        done = set()
        for name, rounded in found.rounded.items():
            if layout is None:
                continue
            dtype = found.tensors[f"{name}.weight"].dtype
            tensors |= layout.tensors_of(name, rounded, dtype)
            facts[name] = layout.facts(name, rounded)
            done.add(f"{name}.weight")
        tensors |= {name: tensor for name, tensor in found.tensors.items() if name not in done}
        errors = {n: r.error for n, r in found.rounded.items() if r.error is not None}
        described = {"layers": facts, "errors": errors, "notes": list(found.notes)}
        _write(self.partial / f"part-{number}.json", json.dumps(described).encode())
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        new = self.partial / f"part-{number}.new"
        save_file(whole, new, metadata={"format": "pt"})
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        new.rename(self.partial / f"part-{number}.safetensors")

    def discard(self) -> None:
        """Remove what has been written."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def finish(self, source: Source) -> dict[str, Any]:
        """Put the parts together, and give the folder its name.

        Returns:
            What the description says.
        """
        made = self.partial / "whole"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        parts = sorted(self.partial.glob("part-*.safetensors"), key=_number)
        described = [json.loads(p.with_suffix(".json").read_text("utf-8")) for p in parts]
        layers = {n: fact for part in described for n, fact in part["layers"].items()}
        summary = {
            "format": self.layout,
            "layers": layers if self.layout == own.NAME else {},
            "errors": {n: e for part in described for n, e in part["errors"].items()},
            "notes": [note for part in described for note in part["notes"]],
            "job": self._job,
        }
        _join(parts, made)
        _write(made / DESCRIPTION, json.dumps(summary, indent=1).encode())
        _configs(source, made, self._entry(source.module, layers))
        made.rename(self.path)
        shutil.rmtree(self.partial, ignore_errors=True)
        return summary

    def _entry(self, module: nn.Module, layers: Mapping[str, Any]) -> dict[str, Any] | None:
        if self.layout != compressed_tensors.NAME or not layers:
            return None
        linear = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
        return compressed_tensors.described(layers, [n for n in linear if n not in layers])


def _join(parts: list[Path], folder: Path) -> None:
    """Move parts to where readers look for them, with an index."""
    from safetensors import safe_open

    where, total = {}, 0
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        with safe_open(part, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                where[key] = name
        total += part.stat().st_size
        os.link(part, folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    _write(folder / "model.safetensors.index.json", json.dumps(index, indent=1).encode())


def _configs(source: Source, folder: Path, entry: Mapping[str, Any] | None) -> None:
    """Copy or write what is beside the weights, and say in the config how they are compressed."""
    if source.folder is not None and source.folder.is_dir():
        for file in source.folder.iterdir():
            if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name != DESCRIPTION:
                shutil.copy(file, folder / file.name)
    else:
        config: Any = getattr(source.module, "config", None)
        if not hasattr(config, "save_pretrained"):
            return
        config.save_pretrained(folder)
        _tokenizer_of_gguf(source.folder, folder)
    path = folder / "config.json"
    if (entry is not None or source.untied) and path.exists():
        data = json.loads(path.read_text("utf-8"))
        if entry is not None:
            data["quantization_config"] = entry
        if source.untied:
            data["tie_word_embeddings"] = False
            if "tie_word_embeddings" in data.get("text_config", ()):
                data["text_config"]["tie_word_embeddings"] = False
        _write(path, json.dumps(data, indent=2).encode())


def _tokenizer_of_gguf(path: Path | None, folder: Path) -> None:
    if path is None:
        return
    from transformers import AutoTokenizer

    where: Any = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    AutoTokenizer.from_pretrained(
        **where, local_files_only=True, trust_remote_code=False
    ).save_pretrained(folder)


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("part-"))


def _write(path: Path, data: bytes) -> None:
    new = path.with_name(f"{path.name}.new")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)

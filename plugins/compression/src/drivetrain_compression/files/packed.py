"""Compressed models whose weights stay packed, for serving."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from drivetrain.errors import CheckpointError, ConfigError
from drivetrain_compression.calibrated.results import Rounded
from drivetrain_compression.calibrated.sources import empty
from drivetrain_compression.files import compressed_tensors, own
from drivetrain_compression.files.damage import reading
from drivetrain_compression.files.folder import DESCRIPTION, PLAIN
from drivetrain_compression.stored.kept import kept
from drivetrain_compression.stored.linear import StoredLinear
from drivetrain_compression.stored.weight import StoredWeight

_CONFIG = "config.json"
_GENERATION = "generation_config.json"


def load_packed(
    path: Path, dtype: torch.dtype | None = None, *, rounds_inputs: bool = False
) -> nn.Module:
    """The model in a folder that ``drivetrain compress`` has written, weights as they lie there.

    Compressed layers are :class:`StoredLinear`, whose products unpack a weight or multiply with its
    codes; there is never more in memory than the files hold and one layer.

    Args:
        path: the folder; in the format ``compressed-tensors`` or ``drivetrain``.
        dtype: of what is not packed, and of what packed weights become; the files' by default.
        rounds_inputs: whether the inputs of weights of 4 bits are rounded to 8 bits, by the
            weight's groups, where products are quicker so. The files do not ask for it, and logits
            change: most where some features are far larger than others of their group. What the
            files ask to round is rounded in any case.

    Raises:
        ConfigError: it is no such folder, or holds a layer in a way that is not known here.
        CheckpointError: something is missing, has another shape, or is damaged; names the file.
    """
    folder = Path(path)
    summary = _json(folder / DESCRIPTION)
    module = empty(folder)
    fill = _Fill(module, dtype, rounds_inputs)
    layers, described = _layers(folder, summary, module)
    for file, tensors in _parts(folder):
        parts = {name: name.rpartition(".") for name in tensors}
        packed = {
            name: base
            for name, (base, _, end) in parts.items()
            if base in layers and (end.startswith("weight") or end == "input_scale")
        }
        with reading(folder, file, described):
            for name in dict.fromkeys(packed.values()):
                found = layers[name](name, tensors)
                fill.layer(name, found, tensors[f"{name}.weight_scale"].dtype)
            for name in tensors.keys() - packed.keys():
                fill.plain(name, tensors[name])
    fill.check(folder)
    _take_generation_config(module, folder)
    return module.eval()


def packed_or_none(path: Path, dtype: torch.dtype | None) -> nn.Module | None:
    """What serves the model of a folder; ``None`` if it has ordinary weights.

    Raises:
        ConfigError, CheckpointError: see :func:`load_packed`.
    """
    if _json(Path(path) / DESCRIPTION).get("format") == PLAIN:
        return None
    return load_packed(path, dtype)


class _Fill:
    """Gives a module on the meta device its values."""

    def __init__(self, module: nn.Module, dtype: torch.dtype | None, rounds_inputs: bool) -> None:
        self._module, self._dtype, self._rounds_inputs = module, dtype, rounds_inputs
        self._tied: dict[int, list[tuple[nn.Module, str]]] = {}
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                self._tied.setdefault(id(parameter), []).append((part, name))
        self._alive = list(module.parameters())  # so that ids stay theirs

    def layer(self, name: str, found: Rounded, scale_dtype: torch.dtype) -> None:
        """Exchange the linear layer ``name`` for one over packed numbers.

        Args:
            name: of the layer.
            found: its numbers.
            scale_dtype: of scales and low-rank factors in the file. They stay so, whatever dtype
                the layer computes in, as it is the values of the file that were chosen.
        """
        path, _, attribute = name.rpartition(".")
        parent = self._module.get_submodule(path)
        old = getattr(parent, attribute)
        if not isinstance(old, nn.Linear) or tuple(old.weight.shape) != tuple(found.numbers.shape):
            shape = list(getattr(getattr(old, "weight", None), "shape", ()))
            raise CheckpointError(
                f"{name} has numbers {list(found.numbers.shape)}, and in the model it is a "
                f"{type(old).__name__} {shape}"
            )
        dtype = self._dtype or old.weight.dtype
        form = kept(found, scale_dtype, rounds_inputs=self._rounds_inputs)
        weight = StoredWeight.of(form, form.packed(found), tuple(found.numbers.shape), dtype)
        new = StoredLinear.over(weight, old.bias)
        setattr(parent, attribute, new)
        if old.bias is not None:
            self._tied[id(old.bias)] = [(new, "bias")]

    def plain(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor where it belongs; all that are tied to it get it."""
        path, _, attribute = name.rpartition(".")
        try:
            old = getattr(self._module.get_submodule(path), attribute)
        except AttributeError:
            raise CheckpointError(f"the model has no {name}") from None
        if tuple(old.shape) != tuple(tensor.shape):
            raise CheckpointError(
                f"{name} has shape {list(tensor.shape)}, and {list(old.shape)} in the model"
            )
        if not isinstance(old, nn.Parameter):
            old.copy_(tensor)
            return
        wanted = self._dtype or old.dtype
        new = nn.Parameter(tensor.to(wanted), requires_grad=False)
        for part, own_name in self._tied[id(old)]:
            setattr(part, own_name, new)

    def check(self, folder: Path) -> None:
        """Make sure that nothing is without values."""
        if lost := [n for n, p in self._module.named_parameters() if p.is_meta]:
            raise CheckpointError(f"{folder} lacks {', '.join(lost[:10])}")


def _layers(
    folder: Path, summary: Mapping[str, Any], module: nn.Module
) -> tuple[dict[str, Any], str]:
    """Readers of compressed layers by name; and the file that describes these layers."""
    with reading(folder, DESCRIPTION):
        layout = summary["format"]
        if layout == own.NAME:
            facts = dict(summary["layers"])
            return {
                n: lambda n, tensors: own.read(n, facts[n], tensors) for n in facts
            }, DESCRIPTION
    if layout != compressed_tensors.NAME:
        raise ConfigError(f"{folder} is in the format {layout}, which has nothing packed")
    config = _json(folder / _CONFIG)
    found = {}
    with reading(folder, _CONFIG):
        entry = config.get("quantization_config") or {}
        for group in entry.get("config_groups", {}).values():
            for name, part in module.named_modules():
                wanted = any(_targets(target, name) for target in group["targets"])
                if wanted and isinstance(part, nn.Linear) and name not in entry.get("ignore", ()):
                    found[name] = _reader(group)
    return found, _CONFIG


def _reader(group: Mapping[str, Any]) -> Any:
    return lambda name, tensors: compressed_tensors.read(name, group, tensors)


def _targets(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target in ("Linear", name)


def _parts(folder: Path) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Names of files, each with its tensors, a file at a time; a block's lie in one."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder} has no safetensors files")
    for file in files:
        with reading(folder, file.name), safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        yield file.name, tensors
        del tensors  # before the next file's are read


def _take_generation_config(module: nn.Module, folder: Path) -> None:
    """Give ``module`` what the folder says of generation, such as all tokens that end a text."""
    from transformers import GenerationConfig

    if (folder / _GENERATION).exists():
        with reading(folder, _GENERATION):
            found = GenerationConfig.from_dict(_json(folder / _GENERATION))
        module.generation_config = found  # type: ignore[assignment]


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ConfigError(f"{path} is missing")
    with reading(path.parent, path.name):
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise CheckpointError(f"a {type(found).__name__} where an object was expected")
    return found

"""Models of which only the parts in use are in memory."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from drivetrain.contracts import Box, Fragment
from drivetrain.errors import ConfigError
from drivetrain.modules.weights import Weights, weights_at
from drivetrain_compression.calibrated.data import print_of


class Source(ABC):
    """A model whose parameters come when they are asked for.

    Attributes:
        module: the model, in eval mode.
        folder: where its config and tokenizer are; ``None`` if it came as a module.
        keeps: whether what was changed stays so, when it is dropped and loaded again.
        untied: whether weights that were one are several now.
    """

    module: nn.Module
    folder: Path | None = None
    keeps = False
    untied = False

    @abstractmethod
    def load(self, names: Iterable[str]) -> None:
        """Give the parameters and buffers ``names`` memory and values."""

    @abstractmethod
    def drop(self, names: Iterable[str]) -> None:
        """Free what :meth:`load` brought."""

    @abstractmethod
    def fingerprint(self) -> str:
        """What differs for other weights, whatever they are called."""

    def untie(self, name: str) -> None:
        """Give the loaded parameter ``name`` values of its own, if another one shares them."""
        path, _, attribute = name.rpartition(".")
        part = self.module.get_submodule(path)
        weight: torch.Tensor = getattr(part, attribute)
        if sum(p is weight for _, p in self.module.named_parameters(remove_duplicate=False)) < 2:
            return
        setattr(part, attribute, nn.Parameter(weight.detach().clone(), requires_grad=False))
        self.untied = True
        for config in _configs(self.module):
            config.tie_word_embeddings = False

    def owned(self, module: nn.Module, prefix: str) -> list[str]:
        """Names of all parameters and saved buffers of a part of the model at ``prefix``."""
        dot = f"{prefix}." if prefix else ""
        return [f"{dot}{name}" for name in module.state_dict()]


class InMemory(Source):
    """A module that has all its values; it is changed in place."""

    keeps = True

    def __init__(self, module: nn.Module) -> None:
        self.module = module.eval()

    def load(self, names: Iterable[str]) -> None:
        return

    def drop(self, names: Iterable[str]) -> None:
        return

    def fingerprint(self) -> str:
        return print_of([self.module.state_dict()])


class OnDisk(Source):
    """A module on the meta device, and the files with its values.

    Args:
        module: parameters on the meta device; buffers that no file has are there.
        weights: the files.
        folder: of the config.
    """

    def __init__(self, module: nn.Module, weights: Weights, folder: Path | None) -> None:
        self.module, self._weights, self.folder = module.eval(), weights, folder
        self._places: dict[int, list[tuple[nn.Module, str, bool]]] = {}
        self._key: dict[str, int] = {}
        for path, part in module.named_modules():
            for table, parameter in ((part._parameters, True), (part._buffers, False)):
                for name, tensor in table.items():
                    if tensor is not None and (parameter or tensor.is_meta):
                        self._places.setdefault(id(tensor), []).append((part, name, parameter))
                        self._key[f"{path}.{name}" if path else name] = id(tensor)
        self._alive = [*module.parameters(), *module.buffers()]  # so that ids stay theirs
        known = weights.names()
        stored: dict[int, str] = {}
        for name, key in self._key.items():
            if name in known:
                stored.setdefault(key, name)
        self._stored = stored
        if lacking := [n for n, key in self._key.items() if key not in stored]:
            raise ConfigError(f"{weights.place} lacks {', '.join(lacking[:10])}")

    def load(self, names: Iterable[str]) -> None:
        for name in names:
            key = self._key.get(name)
            if key is None:
                continue  # a buffer that is computed
            part, attribute, _ = self._places[key][0]
            old: torch.Tensor = getattr(part, attribute)
            if old.is_meta:
                self._set(key, self._read(self._stored[key], old))

    def untie(self, name: str) -> None:
        path, _, attribute = name.rpartition(".")
        part, old = self.module.get_submodule(path), self._key[name]
        mine = [place for place in self._places[old] if place[:2] == (part, attribute)]
        super().untie(name)
        if len(self._places[old]) == len(mine):
            return
        own = getattr(part, attribute)
        self._alive.append(own)
        self._places[old] = [place for place in self._places[old] if place not in mine]
        self._key[name], self._places[id(own)] = id(own), mine
        self._stored[id(own)] = self._stored[old]

    def drop(self, names: Iterable[str]) -> None:
        for name in names:
            key = self._key.get(name)
            if key is None:
                continue
            part, attribute, _ = self._places[key][0]
            self._set(key, getattr(part, attribute).detach().to("meta"))

    def fingerprint(self) -> str:
        # Not their contents, as reading a large model once more takes minutes.
        assert self.folder is not None
        files = [
            (each.name, each.stat().st_size, each.stat().st_mtime_ns)
            for each in sorted(self.folder.iterdir())
            if each.is_file()
        ]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()

    def _read(self, name: str, like: torch.Tensor) -> torch.Tensor:
        new = torch.empty(like.shape, dtype=like.dtype)
        box = Box((0,) * like.dim(), tuple(like.shape), 0)
        fragment = Fragment(
            name,
            "parameter",
            tuple(like.shape),
            like.dtype,
            (box,),
            True,
            "host",
            read=lambda: new.flatten(),
            write=lambda flat: new.copy_(flat.view(like.shape)),  # type: ignore[arg-type]
        )
        self._weights.check(name, fragment)
        self._weights.fill([(name, fragment)])
        return new

    def _set(self, key: int, tensor: torch.Tensor) -> None:
        new = nn.Parameter(tensor, requires_grad=False)
        for part, attribute, parameter in self._places[key]:
            setattr(part, attribute, new if parameter else tensor)


def _configs(module: nn.Module) -> list[Any]:
    """Those configs of Transformers that say whether embeddings are tied."""
    config: Any = getattr(module, "config", None)
    text = getattr(config, "get_text_config", lambda: None)()
    return list({id(c): c for c in (config, text) if c is not None}.values())


@contextmanager
def opened(model: nn.Module | str | os.PathLike[str]) -> Iterator[Source]:
    """A module as it is; or the model of Transformers in a folder or a GGUF file.

    From a folder with safetensors files values are read part by part. A GGUF file is read whole.

    Raises:
        ConfigError: there is no model of that kind; says why.
    """
    if isinstance(model, nn.Module):
        yield InMemory(model)
        return
    path = Path(model)
    if path.suffix == ".gguf" and path.is_file():
        found = InMemory(of_gguf(path))
        found.folder = path
        yield found
        return
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} is neither a folder with config.json nor a GGUF file")
    with ExitStack() as stack:
        weights = stack.enter_context(weights_at(path))
        yield OnDisk(empty(path), weights, path)


def architecture(config: Any) -> Any:
    """The class of Transformers that a config names, or the plain model's."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModel


def empty(folder: Path) -> nn.Module:
    """The model that a folder's config describes, with parameters on the meta device.

    Raises:
        ConfigError: Transformers cannot make it; says why.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        kind = architecture(config)
        dtype = getattr(config, "dtype", None) or torch.float32
        with _NothingDrawn():
            make = kind._from_config if hasattr(kind, "_from_config") else kind.from_config
            module: nn.Module = make(config, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"{folder} cannot be opened as a model: {error}") from error
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter not in moved:
                moved[parameter] = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
            setattr(part, name, moved[parameter])
    return module


def of_gguf(path: Path) -> nn.Module:
    """The language model in a GGUF file, with plain weights in bfloat16.

    Raises:
        ConfigError: Transformers cannot read it; says why.
    """
    from transformers import AutoModelForCausalLM

    try:
        where: dict[str, Any] = {
            "pretrained_model_name_or_path": str(path.parent),
            "gguf_file": path.name,
        }
        module: nn.Module = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.bfloat16, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"{path} cannot be opened as a model: {error}") from error
    config: Any = module.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # its weights are plain now
        module.is_quantized = False  # type: ignore[assignment]
    return module


class _NothingDrawn(TorchFunctionMode):
    """Leaves what nobody has filled yet without memory; what is computed is computed."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        options = dict(kwargs or {})
        if function is torch.empty and options.get("device") is None:  # which layers pass on
            options["device"] = "meta"
        return function(*args, **options)

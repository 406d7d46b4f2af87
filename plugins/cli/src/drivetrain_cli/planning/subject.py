"""What is to be trained: how its model is made without memory, its inputs, and its loss."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain_cli.named import named
from drivetrain_cli.stand_in import model_of, without_memory

_ANSWERS = ("labels", "targets")
"""What models call an argument with which they return their loss."""

_LONGEST = 2048
"""Tokens of a sample where neither the command nor the model says."""


@dataclass
class Subject:
    """A model and what it is trained on.

    Args:
        make: makes the model on the device ``meta``.
        what: it in words.
        sequence: tokens of a sample.
        inputs: micro-batch size and tokens -> what the model is called with; ``None`` to guess.
        notes: what was assumed, one sentence each.
    """

    make: Callable[[], nn.Module]
    what: str
    sequence: int
    inputs: Callable[[int, int], Any] | None
    notes: list[str]

    def batch(self, module: nn.Module, samples: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the model's forward for one micro-batch, on the device ``meta``.

        Raises:
            ConfigError: they cannot be guessed, or made.
        """
        if self.inputs is None:
            return _guessed(module, samples, self.sequence)
        try:
            with torch.device("meta"):
                found = self.inputs(samples, self.sequence)
        except Exception as error:
            raise ConfigError(
                f"--inputs could not make a batch of {samples} samples without memory: "
                f"{type(error).__name__}: {error}"
            ) from error
        if isinstance(found, Mapping):
            return (), dict(found)
        return (tuple(found) if isinstance(found, (tuple, list)) else (found,)), {}

    def loss(self, outputs: Any) -> torch.Tensor:
        """The loss in what the model returns.

        Raises:
            ConfigError: there is no floating-point tensor in it.
        """
        if isinstance(outputs, torch.Tensor) and outputs.dim() == 0:
            return outputs
        named = getattr(outputs, "loss", None)
        if named is None and isinstance(outputs, Mapping):
            named = outputs.get("loss")
        if isinstance(named, torch.Tensor):
            return named.mean()
        first = _first_float(outputs)
        if first is None:
            raise ConfigError(f"the model returned {type(outputs).__name__}, which holds no loss")
        note = (
            "the model returns no loss: the mean of its outputs in fp32 stands for it; a cross "
            "entropy over a large vocabulary would keep more"
        )
        if note not in self.notes:
            self.notes.append(note)
        return first.float().mean()


def subject_of(model: str, inputs: str | None, sequence: int | None) -> Subject:
    """What ``--model`` names.

    Args:
        model: ``MODULE:FUNCTION``, ``FILE.py:FUNCTION``, or the folder or JSON file of a config
            of Transformers.
        inputs: ``MODULE:FUNCTION`` or ``FILE.py:FUNCTION`` that makes a batch.
        sequence: tokens of a sample.

    Raises:
        ConfigError: there is no such thing, or a package that it needs is not installed.
    """
    makes = None if inputs is None else named(inputs, "--inputs")
    path = Path(model)
    if path.is_dir() or path.suffix == ".json":
        config = _transformers_config(path)
        longest = getattr(config, "max_position_embeddings", None) or _LONGEST
        make = _from_config(config, model)
        return Subject(make, model, sequence or min(longest, _LONGEST), makes, [])
    notes = []
    if sequence is None:
        notes.append(f"samples of {_LONGEST} tokens are assumed where they have tokens: --sequence")
    return Subject(lambda: model_of(model), model, sequence or _LONGEST, makes, notes)


def _transformers_config(path: Path) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ConfigError(
            f"--model {path} is a config of Transformers, which is not installed: "
            "pip install transformers"
        ) from error
    file = path / "config.json" if path.is_dir() else path
    try:
        given = json.loads(file.read_text("utf-8"))
        kind = given.pop("model_type")
        return AutoConfig.for_model(kind, **given)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--model: {file} is no config of Transformers: {error!r}") from error


def _from_config(config: Any, what: str) -> Callable[[], nn.Module]:
    import transformers

    wanted = (getattr(config, "architectures", None) or [None])[0]
    named = getattr(transformers, wanted, None) if wanted else None
    automatic: Any = transformers.AutoModelForCausalLM

    def make() -> nn.Module:
        found: nn.Module = automatic.from_config(config) if named is None else named(config)
        found.train()
        return found

    return lambda: without_memory(make, f"--model {what}")


def _guessed(
    module: nn.Module, samples: int, sequence: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tokens, for a model of language; others say what they take."""
    taken = inspect.signature(module.forward).parameters
    tokens = torch.zeros(samples, sequence, dtype=torch.int64, device="meta")
    if "input_ids" in taken:
        labels = {"labels": torch.zeros_like(tokens)} if "labels" in taken else {}
        return (), {"input_ids": tokens, **labels}
    positional = [
        p
        for p in taken.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    embeds = any(isinstance(part, nn.Embedding) for part in module.modules())
    if embeds and 1 <= len(positional) <= 2:
        required = [p.name for p in positional]
        answers = [name for name in _ANSWERS if name in taken and name not in required]
        if answers:
            return (), {name: torch.zeros_like(tokens) for name in (*required, *answers)}
        return tuple(torch.zeros_like(tokens) for _ in positional), {}
    names = ", ".join(p.name for p in positional)
    raise ConfigError(
        f"what {type(module).__name__} takes is not known (its forward has {names or 'nothing'}): "
        "give --inputs MODULE:FUNCTION, a function of micro-batch size and sequence length that "
        "returns its arguments"
    )


def _first_float(outputs: Any) -> torch.Tensor | None:
    if isinstance(outputs, torch.Tensor):
        return outputs if outputs.dtype.is_floating_point else None
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    for each in outputs if isinstance(outputs, (tuple, list)) else ():
        found = _first_float(each)
        if found is not None:
            return found
    return None

"""A model that takes no memory and stands for one of which little more than its size is known."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain_cli.named import named

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_VOCABULARY = 32_000
_WIDTH_OF_LAYER = 128
"""Hidden size of a usual transformer over its number of layers (Kaplan et al., arXiv:2001.08361,
find little difference between 50 and 150)."""
_SAVED = 16
"""Elements that a block saves for backward, for each token and unit of hidden size: Korthikanti et
al. (arXiv:2205.05198, section 4.1), attention without stored scores and no dropout."""


@dataclass(frozen=True)
class Shape:
    """Of a transformer.

    Args:
        parameters: number of them.
        layers: number of blocks.
        hidden: width of the residual stream.
        guessed: whether layers or hidden size come from the number of parameters.
    """

    parameters: int
    layers: int
    hidden: int
    guessed: bool = False

    @classmethod
    def of(cls, parameters: int, layers: int | None = None, hidden: int | None = None) -> Shape:
        """What is given, and what is usual for a model of that size.

        Raises:
            ConfigError: so many layers of that hidden size have more parameters.
        """
        guessed = layers is None or hidden is None
        if layers is None and hidden is None:
            layers = _fitting(lambda n: _usual(n, n * _WIDTH_OF_LAYER, parameters), parameters)
        if hidden is None:
            assert layers is not None
            count = layers
            hidden = _fitting(lambda width: _usual(count, width, parameters), parameters)
            hidden = hidden // 64 * 64 if hidden > 64 else hidden
        elif layers is None:
            width = hidden
            layers = _fitting(lambda count: _usual(count, width, parameters), parameters)
        if layers * _block(hidden) > parameters:
            raise ConfigError(
                f"{layers} blocks of hidden size {hidden} have {layers * _block(hidden):,} "
                f"parameters, more than the {parameters:,} of the model; give fewer layers, a "
                "smaller hidden size, or more parameters"
            )
        return cls(parameters, layers, hidden, guessed)


class _Block(nn.Module):
    """Has the parameters of a transformer's block."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.attention = nn.ModuleList([nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)])
        self.mlp = nn.ModuleList([nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)])


class StandIn(nn.Module):
    """Has the parameters of a transformer: blocks, and one tensor for all that is in none."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(shape.hidden) for _ in range(shape.layers))
        rest = shape.parameters - shape.layers * _block(shape.hidden)
        if rest:
            self.rest = nn.Parameter(torch.empty(rest))


def number_of_parameters(text: str) -> int:
    """``"7b"``, ``"125M"``, ``"1.3e9"`` or ``"6_700_000"`` as a number.

    Raises:
        ConfigError: it is none, or less than one block has.
    """
    found = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e[0-9]+)?)([kmgbt]?)", text.strip().lower())
    if found is None:
        raise ConfigError(
            f"--parameters: expected a number such as 7b, 125M or 1.3e9, got {text!r}"
        )
    number = round(float(found[1]) * _UNITS[found[2]])
    if number < _block(1):
        raise ConfigError(f"--parameters: expected at least {_block(1)}, got {text!r}")
    return number


def without_memory(make: Callable[[], object], what: str) -> nn.Module:
    """The module that ``make()`` answers, made of tensors on the device ``meta``.

    Raises:
        ConfigError: it fails there, or makes something else.
    """
    try:
        with torch.device("meta"):
            module = make()
    except Exception as error:
        raise ConfigError(
            f"{what} could not make a model of tensors without memory: {type(error).__name__}: "
            f"{error}; drivetrain report --memory --parameters N counts the states of a model of "
            "that size"
        ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{what} made a {type(module).__name__}, expected a torch.nn.Module")
    return module


def model_of(path: str) -> nn.Module:
    """What ``MODULE:FUNCTION`` or ``FILE.py:FUNCTION``, called without arguments, makes.

    See :func:`without_memory`.

    Raises:
        ConfigError: there is no such function, or it does not make a model.
    """
    return without_memory(named(path, "--model"), f"--model {path}")


def block_activations(hidden: int, tokens: int, width: int) -> int:
    """Bytes that a transformer's block saves for backward.

    Of linear layers, norms, one activation function and attention that stores no scores.

    Args:
        hidden: width of the residual stream.
        tokens: number of them.
        width: bytes of a number.
    """
    return _SAVED * hidden * tokens * width


def _block(hidden: int) -> int:
    return 12 * hidden**2 + 13 * hidden


def _usual(layers: int, hidden: int, parameters: int) -> int:
    """Parameters of a usual model; of a small one not all are embeddings."""
    return layers * _block(hidden) + min(_VOCABULARY * hidden, parameters // 4)


def _fitting(size: Callable[[int], int], limit: int) -> int:
    """The largest number from 1 on whose ``size`` is at most ``limit``; else 1."""
    low, high = 1, limit + 1
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= limit else (low, middle)
    return low

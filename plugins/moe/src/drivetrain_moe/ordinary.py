"""Experts that are modules, recognised as two linear layers with an activation in between.

On a host such experts compute in one pass of :mod:`drivetrain_moe.grouped`, which is faster than to
call each of them. What a module does is not read from its code but found out with random tokens,
small and large; which layers it has, and whether anything hooks on to them, is looked at in each
call.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.modules import module as modules

from drivetrain.errors import TrainingError
from drivetrain_moe.grouped import ACTIVATIONS, listed_mlp
from drivetrain_moe.own_numbers import default_state, set_default_state

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""By dtype of parameters, of the largest element; others have 3e-2."""
PROBES = 2
"""Random tokens of each expert on which computations are compared."""

Pair = tuple[nn.Linear, nn.Linear]
Note = tuple[int, ...]


class Ordinary:
    """Knows what experts compute, until an attribute of one of them has another value."""

    def __init__(self) -> None:
        self._known: dict[torch.dtype, tuple[list[Note], str | None]] = {}

    def compute(
        self, experts: Sequence[nn.Module], x: torch.Tensor, counts: list[int]
    ) -> torch.Tensor | None:
        """Compute tokens [n, d] in order of experts, ``counts`` of each; ``None`` if unknown."""
        kind = x.device.type
        if kind != "cpu" or torch.is_autocast_enabled(kind) or torch.compiler.is_compiling():
            return None
        pairs = [_pair(expert) for expert in experts]
        plain = [pair for pair in pairs if pair is not None]
        dtypes = {weight.dtype for pair in plain for layer in pair for weight in layer.parameters()}
        if not plain or len(plain) < len(pairs) or dtypes != {x.dtype}:
            return None
        notes = [note for expert in experts for note in _noted(expert)]
        before, activation = self._known.get(x.dtype, ([], None))
        if notes != before:
            activation = _recognised(experts, plain)
            self._known[x.dtype] = notes, activation
        return None if activation is None else listed_mlp(x, plain, counts, activation)


def scales(weight: torch.Tensor, width: int) -> tuple[float, ...]:
    """Sizes of tokens at which computations are compared; none where a weight is zeros.

    Before an activation tokens are then as the model has them, about 1, about 4, and so large that
    any bound on what experts compute would show.
    """
    usual = float(weight.detach().double().square().mean().sqrt()) * width**0.5
    return (1.0, 1 / usual, 4 / usual, 1e4 / usual) if usual else ()


def agree(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two computations of random tokens gave the same, and not zeros."""
    largest = float(expected.abs().max())
    worst = float((got - expected).abs().max())
    # Weights that are zeros would make all functions equal.
    return 0 < largest < math.inf and worst <= TOLERANCE.get(expected.dtype, 3e-2) * largest


def _pair(expert: nn.Module) -> Pair | None:
    """The two linear layers of an expert, if nothing else of it has parameters, or is hooked."""
    if modules._has_any_global_hook():  # type: ignore[no-untyped-call]
        return None
    layers: list[nn.Linear] = []
    for part in expert.modules():
        if _is_changed(part):
            return None
        if type(part) is nn.Linear:
            layers.append(part)
        elif part._parameters or part._buffers:
            return None
    if len(layers) != 2:
        return None
    up, down = layers
    fits = (up.in_features, up.out_features) == (down.out_features, down.in_features)
    whole = up.weight.shape == down.weight.t().shape == (up.out_features, up.in_features)
    return (up, down) if fits and whole and (up.bias is None) is (down.bias is None) else None


def _is_changed(part: nn.Module) -> bool:
    """Whether calling a module does something else than its class says."""
    hooks = (
        *(part._forward_hooks, part._forward_pre_hooks),
        *(part._backward_hooks, part._backward_pre_hooks),
    )
    return any(hooks) or "forward" in vars(part)


def _recognised(experts: Sequence[nn.Module], pairs: Sequence[Pair]) -> str | None:
    """The activation of experts, or ``None``; draws no numbers of the model's."""
    host = torch.device("cpu")
    random = default_state(host)
    try:
        exact = copy.deepcopy(experts[0]).double()
    except (TypeError, RuntimeError, TrainingError):  # an engine, a lock or a file
        return None
    try:
        with torch.no_grad():
            before = _sizes(exact), list(_noted(exact))
            found = _activation_of(exact)
            # Experts that note what they see have to be called.
            if found is None or (_sizes(exact), list(_noted(exact))) != before:
                return None
            alike = all(_computes(e, p, found, 3) for e, p in zip(experts, pairs, strict=True))
        draws = not torch.equal(default_state(host), random)
    finally:
        set_default_state(host, random)
    return found if alike and not draws else None


def _activation_of(expert: nn.Module) -> str | None:
    """Of an expert in float64, in which no activation is near another."""
    pair = _pair(expert)
    assert pair is not None, "a copy has the layers that the expert has"
    return next((name for name in ACTIVATIONS if _computes(expert, pair, name, 4)), None)


def _computes(expert: nn.Module, pair: Pair, activation: str, number: int) -> bool:
    """Whether an expert is a pair of layers with an activation, at so many scales."""
    up = pair[0]
    own = scales(up.weight, up.in_features)
    for scale in own[:number]:
        x = torch.randn(PROBES, up.in_features, generator=torch.Generator().manual_seed(0)) * scale
        x = x.to(up.weight.dtype)
        try:
            expected = expert(x)
        except RuntimeError:
            return False
        if isinstance(expected, tuple):
            expected = expected[0]
        if not isinstance(expected, torch.Tensor) or expected.shape != x.shape:
            return False
        if not agree(listed_mlp(x, [pair], [PROBES], activation), expected):
            return False
    return bool(own)


def _noted(expert: nn.Module) -> Iterator[Note]:
    """Of each module in an expert, which values its attributes have."""
    for part in expert.modules():
        yield tuple(map(id, vars(part).values()))


def _sizes(expert: nn.Module) -> list[int]:
    """How many elements there are in lists and the like that modules of an expert have."""
    return [
        len(value)
        for part in expert.modules()
        for value in vars(part).values()
        if isinstance(value, (list, dict, set))
    ]

"""Which module's output can be divided, and which layers multiplied, so that nothing changes.

A scale s for each feature can move from the output of a norm or layer into the layers that take it:
``(x / s) (s W)^T = x W^T``. What takes what is seen while a block runs; that the block as a whole
computes the same is then tried with a random scale. So no block needs to be known by name, and a
block in which somebody else takes the output, too, is left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from drivetrain_compression.recipe.modifier import CompressionUnit, Target

_TOKENS = 16


@dataclass(frozen=True)
class Call:
    """How a block was called.

    Args:
        args: the first is [rows, tokens, hidden].
        kwargs: by name.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """A module and the layers that take its output.

    Args:
        source: path in the block.
        module: has a ``weight`` [features] or [features, ...], and maybe a ``bias`` [features].
        targets: layers with features as inputs.
    """

    source: str
    module: nn.Module
    targets: tuple[Target, ...]

    def scale(self, by: torch.Tensor) -> None:
        """Divide the source's output by ``by`` [features], and multiply what takes it."""
        with torch.no_grad():
            weight: Any = self.module.weight
            shape = (-1, *[1] * (weight.dim() - 1))
            weight.div_(by.to(weight.dtype).view(shape))
            bias: Any = getattr(self.module, "bias", None)
            if bias is not None:
                bias.div_(by.to(bias.dtype))
            for target in self.targets:
                taken: Any = target.module.weight
                taken.mul_(by.to(taken.dtype))


class Called:
    """Keeps how a block was called first."""

    def __init__(self, block: nn.Module) -> None:
        self.first: Call | None = None
        self._hook = block.register_forward_pre_hook(self._see, with_kwargs=True)

    def close(self) -> None:
        self._hook.remove()

    def _see(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.first is None:
            self.first = Call(tuple(args), dict(kwargs))


def pairs(unit: CompressionUnit, call: Call, *, norms_only: bool = False) -> list[Pair]:
    """Pairs among the targets of a block, in the order in which the block uses them.

    Args:
        unit: a block; runs on copies in float64.
        call: with values that belong to the block.
        norms_only: leave out pairs of two layers.
    """
    block = copy.deepcopy(unit.module).double()
    small = shortened(call)
    found = []
    with torch.no_grad():
        names = {id(m): n for n, m in unit.module.named_modules()}
        wanted = {names[id(t.module)]: t for t in unit.targets}
        for source, takers in _candidates(block, small, list(wanted), norms_only):
            pair = Pair(
                source,
                unit.module.get_submodule(source),
                tuple(wanted[taker] for taker in takers),
            )
            parts = tuple(Target(n, block.get_submodule(n)) for n in takers)
            if _cancels(block, small, Pair(source, block.get_submodule(source), parts)):
                found.append(pair)
    return found


def output_of(block: nn.Module, call: Call) -> torch.Tensor:
    """The hidden states that a block returns, alone or as the first of several."""
    found = block(*call.args, **call.kwargs)
    result: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return result


def _candidates(
    block: nn.Module, call: Call, wanted: list[str], norms_only: bool
) -> Iterator[tuple[str, list[str]]]:
    """Sources, and what takes their output or (for a layer) could depend on it."""
    order: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    with leaves(block, order):
        output_of(block, call)
    for at, (name, _, output) in enumerate(order):
        module: Any = block.get_submodule(name)
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() > 2 or len(weight) != output.shape[-1]:
            continue
        later = [entry for entry in order[at + 1 :] if entry[0] in wanted]
        if weight.dim() == 1:
            takers = [n for n, x, _ in later if x is output]
            if takers:
                yield name, takers
        elif not norms_only and isinstance(module, nn.Linear):
            groups: dict[int, list[str]] = {}
            for taker, x, _ in later:
                if x.shape[-1] == len(weight):
                    groups.setdefault(id(x), []).append(taker)
            yield from ((name, takers) for takers in groups.values())


@contextmanager
def leaves(block: nn.Module, order: list[tuple[str, torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Note path, first input and output of each module without children, as they run."""

    def hook(name: str) -> Any:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
                order.append((name, args[0], output))

        return see

    hooks = [
        module.register_forward_hook(hook(name))
        for name, module in block.named_modules()
        if next(module.children(), None) is None
    ]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def _cancels(block: nn.Module, call: Call, pair: Pair) -> bool:
    before = output_of(block, call)
    features = len(pair.module.weight)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    by = torch.exp(torch.randn(features, generator=generator, dtype=torch.float64) / 2)
    pair.scale(by)
    after = output_of(block, call)
    pair.scale(1 / by)
    far = (after - before).abs().max() / before.abs().max().clamp(min=1e-30)
    return bool(far < 1e-9)


def shortened(call: Call) -> Call:
    """One row of at most 16 tokens, in float64.

    Dimensions as long as the row's tokens are cut; a mask or rotation has such dimensions.
    """
    hidden = call.args[0]
    rows, tokens = hidden.shape[0], hidden.shape[1]

    def cut(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(cut(each) for each in value)
        if not isinstance(value, torch.Tensor):
            return value
        states = value.shape == hidden.shape  # features may be as many as tokens
        if value.dim() and value.shape[0] == rows:
            value = value[:1]
        for dim in range(min(1, value.dim()), value.dim()):
            if value.shape[dim] == tokens and not (states and dim == value.dim() - 1):
                value = value.narrow(dim, 0, min(tokens, _TOKENS))
        return value.double() if value.is_floating_point() else value

    return Call(tuple(cut(a) for a in call.args), {k: cut(v) for k, v in call.kwargs.items()})

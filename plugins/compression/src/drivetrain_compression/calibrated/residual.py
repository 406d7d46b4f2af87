"""Where a block reads hidden states and where it adds to them, found by running it.

A block that reads its hidden states x through norms of their size alone, and otherwise only adds to
them, computes the same of turned ones: with an orthogonal Q, ``norm(x Q) = norm(x) Q``, so readers
``W -> W Q`` and writers ``W -> Q^T W`` make ``block(x Q) = block(x) Q`` (Ashkboos et al. 2024,
"QuaRot", arXiv 2404.00456, section 4). Nothing is known of a block by name: what reads and writes
is seen while it runs, and the turned block is then run and compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from drivetrain_compression.calibrated.pairs import Call, leaves, output_of
from drivetrain_compression.calibrated.rotations import Rotation

SAME = 1e-5
"""Norms compute in float32 even in a block in float64, so equal outputs differ by that much."""


@dataclass(frozen=True)
class Norm:
    """A norm over hidden states, and the layers that take its output.

    Args:
        name: path in the block or model.
        neutral: value of its weight at which it multiplies by 1: 1, or 0 where 1 is added to it.
        readers: paths of layers.
    """

    name: str
    neutral: float
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Heads:
    """Values and the layer that takes what attention makes of them.

    Args:
        value: path of the layer that makes values.
        output: path of the layer that takes them.
        size: features of a head.
    """

    value: str
    output: str
    size: int


@dataclass(frozen=True)
class Layout:
    """What a block does with hidden states.

    Args:
        norms: through which it reads them.
        writers: paths of layers that add to them.
        heads: of attention; ``None`` if no such pair of layers was found.
    """

    norms: tuple[Norm, ...]
    writers: tuple[str, ...]
    heads: Heads | None


def layout_of(block: nn.Module, call: Call) -> Layout:
    """Find what ``block`` reads and writes.

    Args:
        block: in float64; is as it was afterwards, to rounding.
        call: of one row of tokens, in float64.
    """
    width = call.args[0].shape[-1]
    order: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    with leaves(block, order):
        output_of(block, call)
    norms = tuple(_norms(block, order, width))
    ran = [name for name, _, _ in order if isinstance(block.get_submodule(name), nn.Linear)]
    writers = tuple(
        name
        for at, name in enumerate(ran)
        if block.get_submodule(name).out_features == width
        and _adds(block, call, name, ran[at + 1 :])
    )
    readers = {name for norm in norms for name in norm.readers}
    heads = _heads(block, call, [n for n in ran if n in readers], [n for n in ran if n in writers])
    return Layout(norms, writers, heads)


def turn_block(block: nn.Module, layout: Layout, turned: Rotation, heads: Rotation | None) -> None:
    """Change weights so that the block takes and gives hidden states turned by ``turned``."""
    with torch.no_grad():
        for norm in layout.norms:
            fold(block, norm, turned)
        for name in layout.writers:
            _turn_outputs(block.get_submodule(name), turned)
        if heads is not None and layout.heads is not None:
            _turn_heads(block, layout.heads, heads)


def fold(model: nn.Module, norm: Norm, turned: Rotation, rows: int = 4096) -> None:
    """Move a norm's weight into its readers, and turn what they take back.

    Args:
        model: has the paths of ``norm``.
        norm: which.
        turned: how hidden states are turned.
        rows: of a reader that are changed at once, so that a head needs no second one in float64.
    """
    module: Any = model.get_submodule(norm.name)
    gain = module.weight.double() + (1 - norm.neutral)
    for name in norm.readers:
        weight: Any = model.get_submodule(name).weight
        for part in weight.split(rows):
            part.copy_(turned.turn(part.double() * gain))
    module.weight.fill_(norm.neutral)


def same_when_turned(block: nn.Module, call: Call, layout: Layout, turned: Rotation) -> bool:
    """Whether the block computes the same of turned hidden states; it is turned afterwards.

    Args:
        block: a copy in float64.
        call: with hidden states as they are; one row.
        layout: what was found in the block.
        turned: how hidden states are turned.
    """
    wanted = turned.turn(_added(block, call))
    heads = None if layout.heads is None else Rotation.random(layout.heads.size, 1)
    turn_block(block, layout, turned, heads)
    found = _added(block, Call((turned.turn(call.args[0]), *call.args[1:]), call.kwargs))
    return _close(found, wanted)


def neutral_of(norm: nn.Module, width: int) -> float | None:
    """The weight with which a norm gives outputs of size 1; ``None`` if it is no such norm."""
    weight: Any = norm.weight
    kept, found = weight.detach().clone(), None
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        for value in (1.0, 0.0):
            weight.fill_(value)
            size = norm(x).double().square().mean(-1).sqrt()
            if bool(((size - 1).abs() < 0.05).all()):
                found = value
                break
        weight.copy_(kept)
    return found


def is_norm(module: nn.Module, width: int) -> bool:
    """Whether a module has one weight for each feature."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and tuple(weight.shape) == (width,)


def _norms(
    block: nn.Module, order: Sequence[tuple[str, torch.Tensor, torch.Tensor]], width: int
) -> Iterator[Norm]:
    for at, (name, _, output) in enumerate(order):
        module = block.get_submodule(name)
        if not is_norm(module, width):
            continue
        readers = tuple(
            taker
            for taker, x, _ in order[at + 1 :]
            if x is output and isinstance(block.get_submodule(taker), nn.Linear)
        )
        neutral = neutral_of(module, width) if readers else None
        if neutral is not None:
            yield Norm(name, neutral, readers)


def _adds(block: nn.Module, call: Call, name: str, later: Sequence[str]) -> bool:
    """Whether what the layer ``name`` returns is added to hidden states as it is.

    With all later layers silenced, so much more of its output must be as much more of the block's.
    """
    more = torch.randn(
        call.args[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(call.args[0].device)

    def run(extra: torch.Tensor | float) -> torch.Tensor:
        with _outputs(block, dict.fromkeys(later, lambda y: y * 0), {name: lambda y: y + extra}):
            return output_of(block, call)

    try:
        return _close(run(more) - run(0.0), more)
    except RuntimeError:  # its output has the features of hidden states, but other tokens
        return False


@contextmanager
def _outputs(block: nn.Module, *changes: Any) -> Iterator[None]:
    hooks = [
        block.get_submodule(name).register_forward_hook(lambda m, x, y, change=change: change(y))
        for table in changes
        for name, change in table.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _heads(
    block: nn.Module, call: Call, readers: Sequence[str], writers: Sequence[str]
) -> Heads | None:
    """The first reader and writer between which every head can be turned, with the largest head."""
    before = _added(block, call)
    for writer in writers:
        output: Any = block.get_submodule(writer)
        for reader in readers:
            value: Any = block.get_submodule(reader)
            common = math.gcd(value.out_features, output.in_features)
            for size in (each for each in range(common, 1, -1) if common % each == 0):
                heads = Heads(reader, writer, size)
                if not _cancels(block, call, before, heads, Rotation.random(size, 1)):
                    # What even a factor does not pass through, no rotation does.
                    if size == common and not _linear(block, call, before, value, output):
                        break
                    continue
                return heads
    return None


def _linear(block: nn.Module, call: Call, before: torch.Tensor, value: Any, output: Any) -> bool:
    with torch.no_grad():
        for module, factor in ((value, 2.0), (output, 0.5)):
            module.weight.mul_(factor)
        if value.bias is not None:
            value.bias.mul_(2.0)
        after = _added(block, call)
        for module, factor in ((value, 0.5), (output, 2.0)):
            module.weight.mul_(factor)
        if value.bias is not None:
            value.bias.mul_(0.5)
    return _close(after, before)


def _cancels(
    block: nn.Module, call: Call, before: torch.Tensor, heads: Heads, turned: Rotation
) -> bool:
    with torch.no_grad():
        _turn_heads(block, heads, turned)
        after = _added(block, call)
        _turn_heads(block, heads, turned, back=True)
    return _close(after, before)


def _turn_heads(block: nn.Module, heads: Heads, turned: Rotation, *, back: bool = False) -> None:
    value: Any = block.get_submodule(heads.value)
    output: Any = block.get_submodule(heads.output)
    turn = turned.back if back else turned.turn
    shape = (-1, heads.size)
    weight = value.weight.T.reshape(value.in_features, *shape)
    value.weight.copy_(turn(weight).flatten(1).T)
    if value.bias is not None:
        value.bias.copy_(turn(value.bias.view(shape)).flatten())
    weight = output.weight.view(output.out_features, *shape)
    output.weight.copy_(turn(weight).flatten(1))


def _turn_outputs(layer: Any, turned: Rotation) -> None:
    layer.weight.copy_(turned.turn(layer.weight.T).T)
    if layer.bias is not None:
        layer.bias.copy_(turned.turn(layer.bias))


def _added(block: nn.Module, call: Call) -> torch.Tensor:
    """What a block adds to its hidden states, which are often much larger."""
    hidden: torch.Tensor = call.args[0]
    return output_of(block, call) - hidden


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    far = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
    return bool(far < SAME)

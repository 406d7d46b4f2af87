"""Rotations that cancel, so that no feature is much larger than the others (QuaRot, SpinQuant).

Ashkboos et al. 2024, "QuaRot", arXiv 2404.00456; Liu et al. 2024, "SpinQuant", arXiv 2405.16406. R1
turns hidden states between blocks, R2 the values of each head of attention. Both are merged into
weights, so the model has the same layers and runs no slower. Those that would have to be computed
while the model runs (R3, R4) are left out.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain.states.units import Unit
from drivetrain_compression.calibrated.modifiers import AfterTraining
from drivetrain_compression.calibrated.outside import Outside, ReadsOutside
from drivetrain_compression.calibrated.pairs import Call, Called, leaves, shortened
from drivetrain_compression.calibrated.residual import (
    SAME,
    Layout,
    Norm,
    fold,
    is_norm,
    layout_of,
    neutral_of,
    same_when_turned,
    turn_block,
)
from drivetrain_compression.calibrated.rotations import Rotation
from drivetrain_compression.recipe.modifier import CompressionUnit, ModifierConfig, Place

_ROWS = 4096
"""Rows of an embedding that are turned at once."""


class RotateConfig(ModifierConfig):
    """Rotations."""

    seed: int = Field(default=0, description="Of the signs of the Hadamard matrices.")
    heads: bool = Field(default=True, description="Turn the values of each head, too (R2).")


class Rotate(AfterTraining[RotateConfig], ReadsOutside):
    """Turns hidden states, and values of heads, by randomised Hadamard matrices."""

    config_class = RotateConfig
    place = Place.ROTATE
    claims = "rotation"
    gathers = "sizes"
    batches = 1

    def __init__(self, config: RotateConfig, label: str) -> None:
        super().__init__(config, label)
        if config.modules != ("*",) or config.exclude:
            raise ConfigError(
                f"{label}: turned hidden states concern every layer that reads or writes them; "
                "leave out modules and exclude"
            )
        self._turned: Rotation | None = None
        self._tried: dict[str, Layout] = {}

    def begin(self, units: Sequence[CompressionUnit]) -> None:
        super().begin(units)
        self._called = Called(units[0].module)

    def change(self, unit: CompressionUnit) -> None:
        self._called.close()
        call = self._called.first
        assert call is not None
        turned = self._of(call.args[0].shape[-1])
        found = self._tried.pop(unit.name, None)
        if found is None:
            small = shortened(call)
            # What comes is turned already: block by block from the embedding on.
            small = Call((turned.back(small.args[0]), *small.args[1:]), small.kwargs)
            found = self._checked(unit, small, turned)
        heads = None
        if self.config.heads and found.heads is not None:
            seed = zlib.crc32(unit.name.encode()) + self.config.seed
            heads = Rotation.random(found.heads.size, seed)
        elif self.config.heads:
            self.notes.append(f"{unit.name}: no heads were found whose values can be turned")
        turn_block(unit.module, found, turned, heads)

    def outside(
        self, model: nn.Module, blocks: Sequence[Unit], batch: Mapping[str, Any], tuples: bool
    ) -> Outside:
        with _passing(blocks, tuples), torch.no_grad():
            found = _ends(model, blocks, batch, self.label)
            self._same(model, found, blocks, batch)
        return found

    def try_block(self, block: Unit, call: Call) -> None:
        turned = self._of(call.args[0].shape[-1])
        self._tried[block.name] = self._checked(block, shortened(call), turned)

    def change_outside(self, model: nn.Module, found: Outside) -> None:
        turned = self._of(found.width)
        with torch.no_grad():
            for name in found.embeddings:
                table: Any = model.get_submodule(name).weight
                for part in table.split(_ROWS):
                    part.copy_(turned.turn(part))
            fold(model, found.norm, turned)

    def _of(self, width: int) -> Rotation:
        if self._turned is None or self._turned.order != width:
            self._turned = Rotation.random(width, self.config.seed)
        return self._turned

    def _checked(self, unit: CompressionUnit | Unit, call: Call, turned: Rotation) -> Layout:
        block = copy.deepcopy(unit.module).double()
        with torch.no_grad():
            found = layout_of(block, call)
            same = same_when_turned(block, call, found, turned)
        if same:
            return found
        kinds = {
            type(m).__name__ for m in unit.module.modules() if "norm" in type(m).__name__.lower()
        }
        raise ConfigError(
            f"{self.label}: {unit.name} does not compute the same of turned hidden states: found "
            f"{_names(norm.name for norm in found.norms)} as norms before layers that read them, "
            f"and {_names(found.writers)} as layers that add to them. Norms here are "
            f"{_names(sorted(kinds))}; they have to divide by the size of hidden states alone "
            "(RMSNorm), and everything that reads hidden states has to be a linear layer after one"
        )

    def _same(
        self, model: nn.Module, found: Outside, blocks: Sequence[Unit], batch: Mapping[str, Any]
    ) -> None:
        """Hold what the head takes of turned embeddings to what it takes of those there are.

        Embeddings are turned as they come out, and the head's input is turned back, so that no
        second table is needed.

        Raises:
            ConfigError: they differ.
        """
        turned, norm = self._of(found.width), model.get_submodule(found.norm.name)
        big = {id(model.get_submodule(n).weight) for n in (*found.embeddings, *found.norm.readers)}
        weight: Any = norm.weight
        big |= {id(p) for block in blocks for p in block.module.parameters()}
        with _in_float64(model, big):
            wanted = _taken(model, found, batch, lambda y: y.double())
            gain = weight.double() + (1 - found.norm.neutral)
            weight.fill_(found.norm.neutral)
            taken = _taken(model, found, batch, turned.turn)
        far = (turned.back(taken) * gain - wanted).abs().max() / wanted.abs().max()
        if not bool(far < SAME):
            raise ConfigError(
                f"{self.label}: {type(model).__name__} does not compute the same of turned "
                f"embeddings: found {_names(found.embeddings)} before the blocks, and "
                f"{found.norm.name} and {_names(found.norm.readers)} behind them "
                f"({type(norm).__name__}); hidden states have to be sums of embeddings, and the "
                "norm has to divide by their size alone"
            )


class _StopError(Exception):
    """The head has been called."""


def _ends(
    model: nn.Module, blocks: Sequence[Unit], batch: Mapping[str, Any], label: str
) -> Outside:
    """What makes hidden states, and what takes those of the last block."""
    order: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    inside = tuple(f"{block.name}." for block in blocks)
    seen: list[torch.Tensor] = []
    hook = blocks[0].module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with leaves(model, order):
        given = model(**batch)
    hook.remove()
    width = seen[0].shape[-1]
    outer = [entry for entry in order if not entry[0].startswith(inside)]
    embeddings = [
        name
        for name, _, _ in outer
        if isinstance(part := model.get_submodule(name), nn.Embedding)
        and part.embedding_dim == width
    ]
    norms = []
    for at, (name, _, output) in enumerate(outer):
        module = model.get_submodule(name)
        takers = tuple(
            taker
            for taker, x, _ in outer[at + 1 :]
            if _memory(x) == _memory(output)
            and isinstance(model.get_submodule(taker), nn.Linear)
            and x.shape[-1] == width
        )
        if is_norm(module, width) and takers:
            neutral = neutral_of(module, width)
            norms.append(Norm(name, 1.0 if neutral is None else neutral, takers))
    if not embeddings or not norms:
        lacking = "embedding before the blocks" if not embeddings else "norm and head behind them"
        raise ConfigError(
            f"{label}: {type(model).__name__} has no {lacking}, so what it returns would be turned"
        )
    turned = {_memory(seen[0]), *(_memory(y) for n, _, y in outer if n == norms[-1].name)}
    if turned & {_memory(each) for each in _tensors(given)}:
        raise ConfigError(f"{label}: {type(model).__name__} returns hidden states that were turned")
    tied = {id(model.get_submodule(name).weight) for name in embeddings}
    untied = [n for n in norms[-1].readers if id(model.get_submodule(n).weight) in tied]
    return Outside(width, tuple(dict.fromkeys(embeddings)), norms[-1], tuple(untied))


def _taken(model: nn.Module, found: Outside, batch: Mapping[str, Any], change: Any) -> torch.Tensor:
    """What comes to the head when embeddings come out changed, float64."""
    seen: list[torch.Tensor] = []

    def stop(module: nn.Module, args: Any) -> None:
        seen.append(args[0])
        raise _StopError

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda m, x, y: change(y))
        for name in found.embeddings
    ]
    head = model.get_submodule(found.norm.readers[0])
    hooks.append(head.register_forward_pre_hook(stop))
    try:
        model(**batch)
    except _StopError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return seen[0].double()


@contextmanager
def _passing(blocks: Sequence[Unit], tuples: bool) -> Iterator[None]:
    """Blocks that return what they are given."""

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden,) if tuples else hidden

    for block in blocks:
        block.module.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.module.forward


@contextmanager
def _in_float64(model: nn.Module, but: set[int]) -> Iterator[None]:
    """Give parameters that have memory, but for some, other values for a while."""
    old = [(p, p.data) for p in model.parameters() if not p.is_meta and id(p) not in but]
    for parameter, values in old:
        parameter.data = values.to(torch.float64, copy=True)
    try:
        yield
    finally:
        for parameter, values in old:
            parameter.data = values


def _tensors(given: Any) -> Iterator[torch.Tensor]:
    """All tensors that a model returns."""
    if isinstance(given, torch.Tensor):
        yield given
    elif isinstance(given, Mapping):
        yield from _tensors(tuple(given.values()))
    elif isinstance(given, (tuple, list)):
        for each in given:
            yield from _tensors(each)


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _names(names: Any) -> str:
    return ", ".join(names) or "nothing"

"""Towers of images whose patches the ranks of a sequence share out, too.

Between the first and the last of a tower's repeated blocks each rank has its part of the patches
(and of what else is among them, such as a token for the whole image), and attention exchanges heads
as that of text does. Results come whole out of the tower. So norms, projections and MLPs of a tower
are computed once, and not once on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from drivetrain.communication.functional import Functional
from drivetrain.contracts import AttentionFacts
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.states.units import Unit, units
from drivetrain_sequence.inputs import padded
from drivetrain_sequence.probe import bound_of, difference
from drivetrain_sequence.section import PATH
from drivetrain_sequence.turn import Turn

_LEAVE_OUT = f"leave out {PATH}.towers"


class Stack:
    """Repeated blocks of a tower, one after the other, whose patches ranks share out.

    Args:
        blocks: the blocks in order; each takes [b, n, width] first, and returns the like.
        line: the ranks of a sequence.

    Attributes:
        local: what blocks have returned in the tower's forward so far, of this rank's patches.
    """

    def __init__(self, blocks: list[Unit], line: Functional) -> None:
        self._blocks = blocks
        self._line = line
        self._patches: dict[int, int] = {}  # of this rank -> of the whole image
        self._asked: set[nn.Module] = set()
        self.local: list[torch.Tensor] = []
        self.on = False
        first, last = blocks[0].module, blocks[-1].module
        hooks = [first.register_forward_pre_hook(self._cut, with_kwargs=True)]
        hooks += [block.module.register_forward_hook(self._note) for block in blocks]
        hooks.append(last.register_forward_hook(self._join))
        self._hooks = hooks

    def undo(self) -> None:
        """Leave the blocks as they were found."""
        for hook in self._hooks:
            hook.remove()

    def facts(
        self, module: nn.Module, query: torch.Tensor, facts: AttentionFacts
    ) -> AttentionFacts:
        """What attention is told of this rank's patches, whose queries are [b, h, n, d].

        Raises:
            TrainingError: a mask, of which it is not known how ranks share it.
        """
        if not self.on and torch._C._current_graph_task_id() == -1:
            return facts  # else in the tower's forward, or in a block that is recomputed
        self._asked.add(module)
        if facts.mask is not None or facts.bias is not None or facts.causal:
            raise TrainingError(
                f"{self._name} attends with a mask or a bias, or causally, which ranks that share "
                f"patches of a tower know nothing of: {_LEAVE_OUT}"
            )
        everything, patches = query.shape[2] * self._line.size, self._patches[query.shape[2]]
        if everything == patches:
            return replace(facts, shared=True)
        real = torch.arange(everything, device=query.device) < patches
        return replace(facts, shared=True, mask=real[None, None, None])

    def whole(self, own: torch.Tensor) -> torch.Tensor:
        """All patches [b, n, width] of this rank's part; gradients are summed over ranks."""
        return self._line.all_gather(own, dim=1)[:, : self._patches[own.shape[1]]]

    @property
    def _name(self) -> str:
        return f"{self._blocks[0].name}, a {type(self._blocks[0].module).__name__},"

    def _cut(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.on:
            return None
        named = not args
        x = kwargs.get("hidden_states") if named else args[0]
        others = [*args[1:], *(v for k, v in kwargs.items() if k != "hidden_states")]
        told = any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(others))
        if not isinstance(x, torch.Tensor) or x.dim() != 3 or told:
            raise TrainingError(
                f"{self._name} takes something else than patches [images, patches, width] alone, "
                f"of which it is not known how ranks share it: {_LEAVE_OUT}"
            )
        self._asked.clear()
        missing = -x.shape[1] % self._line.size
        own = padded(x, missing, 0).chunk(self._line.size, 1)[self._line.rank]
        known = self._patches.setdefault(own.shape[1], x.shape[1])
        if known != x.shape[1]:  # a block that is recomputed would not know which it has
            raise TrainingError(
                f"images of {known} and of {x.shape[1]} patches in {self._name} are as many for "
                f"each of {self._line.size} ranks, and cannot be told apart: {_LEAVE_OUT}"
            )
        self.local.append(own)
        return ((), {**kwargs, "hidden_states": own}) if named else ((own, *args[1:]), kwargs)

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.on:
            return
        if not self._asked & set(module.modules()):
            raise TrainingError(
                f"{self._name} calls no attention that plugins can reach, so ranks cannot share "
                f"its patches: {_LEAVE_OUT}"
            )
        self._asked.clear()
        self.local.append(output[0] if isinstance(output, tuple) else output)

    def _join(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.on:
            return None
        if isinstance(output, tuple):
            return (self.whole(output[0]), *output[1:])
        return self.whole(output)


class Tower:
    """One tower: the largest part of a model without its language model, and its stacks.

    Args:
        name: of it in the model.
        module: it.
        line: the ranks of a sequence.
        turn: tells attention which modules are a stack's.
        probes: compare results of the first call, in parts and whole.
    """

    def __init__(
        self, name: str, module: nn.Module, line: Functional, turn: Turn, probes: bool
    ) -> None:
        self._name, self._line, self._turn, self._probes = name, line, turn, probes
        self.stacks: list[Stack] = []
        for _, blocks in groupby(units(module), lambda unit: unit.name.rpartition(".")[0]):
            named = [Unit(f"{name}.{block.name}", block.module) for block in blocks]
            stack = Stack(named, line)
            self.stacks.append(stack)
            inside = (part for block in named for part in block.module.modules())
            turn.stacks |= dict.fromkeys(inside, stack)
        self._hooks = [
            module.register_forward_pre_hook(self._begin, with_kwargs=True),
            module.register_forward_hook(self._end, always_call=True),
        ]

    def undo(self) -> None:
        """Leave the tower as it was found."""
        for hook in self._hooks:
            hook.remove()
        for stack in self.stacks:
            stack.undo()
        self._turn.stacks = {}

    def _switch(self, on: bool) -> None:
        for stack in self.stacks:
            stack.on = on
            stack.local = []

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._turn.in_forward and torch._C._current_graph_task_id() == -1:
            return  # outside of the engine's forward and backward
        if self._probes:
            self._probes = False
            self._compare(module, args, kwargs)
        self._switch(True)

    def _end(self, module: nn.Module, args: Any, output: Any) -> Any:
        local = {id(x): (stack, x) for stack in self.stacks for x in stack.local}
        self._switch(False)
        if output is None or not local:  # None: the forward has raised
            return output

        def whole(leaf: Any) -> Any:
            return local[id(leaf)][0].whole(leaf) if id(leaf) in local else leaf

        if isinstance(output, Mapping):
            for key, value in list(output.items()):
                output[key] = pytree.tree_map(whole, value)  # type: ignore[index]
            return output
        return pytree.tree_map(whole, output)

    def _compare(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a tower that computes something else in parts. Collective.

        Raises:
            ConfigError: it does.
        """
        states = {part: part.training for part in module.modules()}
        in_forward, self._turn.in_forward = self._turn.in_forward, False
        module.eval()
        try:
            with torch.no_grad():
                expected = _tensors(module(*args, **kwargs))
                self._turn.in_forward = True
                found = _tensors(module(*args, **kwargs))
        finally:
            self._turn.in_forward = in_forward
            for part, training in states.items():
                part.training = training
        if any(x.is_meta for x in found):
            return
        same = len(found) == len(expected)
        worst = max(map(_unexplained, found, expected)) if same else math.inf
        worst = float(
            self._line.all_gather(expected[0].new_full((1,), worst, dtype=torch.float32)).max()
        )
        if worst:
            raise ConfigError(
                f"{self._name}, a {type(module).__name__}, computes something else when ranks "
                f"share its patches: results differ by {worst:.1g} of the largest one: "
                f"{_LEAVE_OUT}, or compare nothing ({PATH}.probe: false)"
            )


def _tensors(output: Any) -> list[torch.Tensor]:
    """All tensors of an output."""
    leaves = pytree.tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _unexplained(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference if it is more than rounding explains, or 0; infinite without one."""
    if found.shape != expected.shape:
        return math.inf
    if not expected.is_floating_point() or not expected.numel():
        return 0.0 if torch.equal(found, expected) else math.inf
    largest = float(difference(found, expected))
    if math.isnan(largest):
        return math.inf
    return largest if largest > bound_of(expected.dtype) else 0.0


def share_towers(
    model: nn.Module, inner: nn.Module, line: Functional, turn: Turn, probes: bool
) -> list[Callable[[], None]]:
    """Have the ranks of a sequence share out the patches of a model's towers.

    Args:
        model: of several modalities.
        inner: its language model.
        line: the ranks of a sequence.
        turn: see :class:`Tower`.
        probes: see :class:`Tower`.

    Returns:
        Functions that leave the model as it was found.

    Raises:
        ConfigError: no tower has repeated blocks.
    """
    towers = [
        Tower(name, part, line, turn, probes)
        for name, part in _apart(model, inner, "")
        if any(unit.module is not part for unit in units(part))
    ]
    if not towers:
        raise ConfigError(
            f"{PATH}.towers: {type(model).__name__} has no repeated blocks outside of its language "
            "model: leave it out"
        )
    return [tower.undo for tower in towers]


def _apart(module: nn.Module, inner: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    """The largest parts of ``module`` that do not have ``inner`` in them, with their names."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        if child is inner:
            continue
        if any(part is inner for part in child.modules()):
            found += _apart(child, inner, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", child))
    return found

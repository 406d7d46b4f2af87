"""How one tensor on the meta device gets values: which part of what it is, and from where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from drivetrain.errors import CheckpointError
from drivetrain.modules.drawing import Blank, Drawing
from drivetrain.modules.places import Placed
from drivetrain.modules.weights import Weights
from drivetrain.states.device_home import tensor_fragment
from drivetrain.tensor_parts import is_wrapper

if TYPE_CHECKING:
    from drivetrain.contracts.state.fragment import Fragment
    from drivetrain.contracts.state.parameters import ParameterTable, Placement


@dataclass(eq=False)
class Wanted:
    """A tensor on the meta device.

    Args:
        entry: the tensor, and its places in the module.
        names: the client's name, then its paths in the module; a tied tensor has several.
        placement: which part of the client's tensor it is; ``None`` for all of it.
        sources: under which of these names values are read; none if they are drawn.
    """

    entry: Placed
    names: list[str]
    placement: Placement | None
    sources: list[str]

    @classmethod
    def of(cls, entry: Placed, table: ParameterTable) -> Wanted:
        """What the job knows of ``entry``."""
        parameter: Any = entry.tensor
        is_parameter = entry.kind == "parameter"
        try:
            info = table.info(parameter) if is_parameter else table.buffer(*entry.places[0])
        except KeyError:  # the job does not know it yet
            info = None
        names = [] if info is None else [info.name]
        placement = None if info is None else info.placement
        return cls(entry, list(dict.fromkeys([*names, *entry.paths])), placement, [])

    @property
    def name(self) -> str:
        """The client's."""
        return self.names[0]

    @property
    def part(self) -> nn.Module:
        """The submodule that has it first."""
        return self.entry.places[0][0]

    @property
    def blank(self) -> Blank:
        """What has to be drawn."""
        tensor = self.entry.tensor
        shape = tuple(tensor.shape) if self.placement is None else self.placement.global_shape
        return Blank(self.name, self.entry.places[0][1], shape, tensor.dtype)

    def flaw(self, drawing: Drawing, weights: Weights | None = None) -> str | None:
        """Why it cannot be made; ``None`` if it can."""
        tensor = self.entry.tensor
        if is_lazy(tensor):
            return f"{self.name} is lazy: run a forward before the module is given away"
        if is_wrapper(tensor):
            return f"{self.name} is a {type(tensor).__name__}, of which it is not known what is in"
        if self.sources:
            assert weights is not None
            try:
                for source in self.sources:
                    weights.check(source, self.fragment(tensor))
            except CheckpointError as error:
                return str(error)
        elif not drawing.can_draw(self.part):
            path = self.entry.paths[0].rpartition(".")[0] or "the module"
            return (
                f"{self.name} is on the meta device, and {path} ({type(self.part).__name__}) has "
                "no reset_parameters() that gives it values: write one, construct it on a real "
                "device, or give weights=, a source of values"
            )
        return None

    def fragment(self, tensor: torch.Tensor) -> Fragment:
        """``tensor``, of the shape of the one on the meta device, as what is filled."""
        kind = self.entry.kind
        return tensor_fragment(self.name, kind, tensor, owner=False, placement=self.placement)

    def empty(self, device: torch.device) -> torch.Tensor:
        """Memory for it; padding, which no box fills, is zero."""
        make = torch.empty_like if self.placement is None else torch.zeros_like
        return make(self.entry.tensor, device=device, requires_grad=False)


def by_part(tensors: list[Wanted]) -> dict[nn.Module, list[Wanted]]:
    """The tensors of each submodule that has them first, in the order of ``named_modules``."""
    parts: dict[nn.Module, list[Wanted]] = {}
    for tensor in tensors:
        parts.setdefault(tensor.part, []).append(tensor)
    return parts

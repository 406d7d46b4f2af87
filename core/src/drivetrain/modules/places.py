"""The tensors of a module by identity, each with all places where the module has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from drivetrain.contracts.state.parameters import ParameterTable


@dataclass(eq=False)
class Placed:
    """A parameter or buffer of a module.

    Args:
        tensor: the parameter or buffer.
        kind: which of the two it is.
        saved: whether it belongs to the module's ``state_dict``.
        places: submodules that have it, with its name there; several for one that is tied.
        paths: its names in the whole module, one for each place.
    """

    tensor: torch.Tensor
    kind: Literal["parameter", "buffer"]
    saved: bool
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def replace(self, new: torch.Tensor, table: ParameterTable) -> None:
        """Put ``new`` of the same shape and dtype in all places; ``table`` keeps its facts.

        Args:
            new: becomes a parameter of the same class, with the same attributes, if this is one.
            table: which may know it.
        """
        old: Any = self.tensor
        if self.kind == "parameter":
            grad = new.grad
            new = torch.Tensor._make_subclass(type(old), new.detach(), old.requires_grad)
            vars(new).update(vars(old))
            new.grad = grad
            if old in table:
                table.replace(old, cast(nn.Parameter, new))
        self.tensor = new
        for part, key in self.places:
            setattr(part, key, new)  # some classes keep lists of their parameters


def placed(module: nn.Module) -> list[Placed]:
    """All parameters and buffers, in the order of ``named_modules``."""
    found: dict[int, Placed] = {}
    for prefix, part in module.named_modules():
        for kind, key, tensor in _own(part):
            saved = kind == "parameter" or key not in part._non_persistent_buffers_set
            entry = found.setdefault(id(tensor), Placed(tensor, kind, saved))
            entry.places.append((part, key))
            path = f"{prefix}.{key}" if prefix else key
            entry.paths.append(path.replace("_orig_mod.", ""))
    return list(found.values())


def _own(part: nn.Module) -> Iterator[tuple[Literal["parameter", "buffer"], str, torch.Tensor]]:
    for key, parameter in part._parameters.items():
        if parameter is not None:
            yield "parameter", key, parameter
    for key, buffer in part._buffers.items():
        if buffer is not None:
            yield "buffer", key, buffer


def move(module: nn.Module, device: torch.device, table: ParameterTable) -> nn.Module:
    """Move a module to ``device``; what is tied stays tied, and ``table`` keeps its facts.

    ``Module.to`` makes new parameters where devices are too unlike, one for each place.
    """
    before = placed(module)
    with table.let_go([cast(nn.Parameter, e.tensor) for e in before if e.kind == "parameter"]):
        module = module.to(device)
    for entry in before:
        part, key = entry.places[0]
        new = getattr(part, key)
        if new is not entry.tensor:
            entry.replace(new, table)
    return module

"""Parameters of a unit that are used outside of its module: ``F.linear(x, self.block.weight)``.

While a unit is not whole, its modules' parameters are watched. Code that takes one out of a module
during the model's forward gets it whole; it stays whole until backward is over, because no hook
tells how long it is used. Parameters that a unit's forward returns stay whole for as long.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, ItemsView, Sequence, ValuesView
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drivetrain.engine.backward_window import tensors_in
from drivetrain_zero.gathering.backward_hooks import unwrapped

if TYPE_CHECKING:
    from drivetrain_zero.gathering.unit import GatheredUnit

_Parameters = dict[str, nn.Parameter | None]


class WatchedParameters(UserDict[str, "nn.Parameter | None"]):
    """A module's ``_parameters``, which tells when one is taken by name.

    Args:
        plain: the module's own dictionary; changes go there.
        taken: called before a parameter is handed out.
    """

    def __init__(self, plain: _Parameters, taken: Callable[[nn.Parameter | None], None]) -> None:
        super().__init__()
        self.data = plain
        self._taken = taken

    def __getitem__(self, name: str) -> nn.Parameter | None:
        parameter = self.data[name]
        self._taken(parameter)
        return parameter

    def items(self) -> ItemsView[str, nn.Parameter | None]:
        return self.data.items()  # listing parameters is no use of them

    def values(self) -> ValuesView[nn.Parameter | None]:
        return self.data.values()

    def __reduce__(self) -> tuple[type[_Parameters], tuple[_Parameters]]:
        return dict, (self.data,)  # copies of the module are not watched


def install(
    units: Sequence[GatheredUnit], call: Callable[[GatheredUnit, nn.Parameter | None], None]
) -> None:
    """Watch the parameters of all ``units`` but the root, which is whole in the whole forward.

    Args:
        units: of a model.
        call: called before a parameter of a unit is handed out.
    """
    for unit in units:
        use = partial(call, unit)
        for parameter in unit.parameters:
            handle: Any = parameter.drivetrain_handle  # type: ignore[attr-defined]
            handle.use = use
        if unit.number:
            show = partial(_show, owners(unit), use)
            for bucket in unit.buckets:
                bucket.shown.told = show
            show(unit.is_whole)


def remove(units: Sequence[GatheredUnit]) -> None:
    """Undo :func:`install`."""
    for unit in units:
        for bucket in unit.buckets:
            if bucket.shown.told is not None:
                bucket.shown.told(True)
                bucket.shown.told = None


def returns_own(unit: GatheredUnit, outputs: object) -> bool:
    """Whether ``outputs`` contain parameters of ``unit`` or views of them."""
    own = {bucket.parameters[0].untyped_storage()._cdata for bucket in unit.buckets}
    dense = (t for t in map(unwrapped, tensors_in(outputs)) if t.layout is torch.strided)
    return any(tensor.untyped_storage()._cdata in own for tensor in dense)


def owners(unit: GatheredUnit) -> list[tuple[nn.Module, _Parameters]]:
    """Return the modules that have parameters of ``unit`` as attributes, with their own."""
    own = set(unit.parameters)
    return [
        (module, module._parameters)
        for module in unit.module.modules()
        if any(p in own for p in module._parameters.values() if p is not None)
    ]


def _show(
    modules: Sequence[tuple[nn.Module, _Parameters]],
    taken: Callable[[nn.Parameter | None], None],
    gathered: bool,
) -> None:
    """Watch the modules' parameters exactly while they are released."""
    for module, plain in modules:
        # Compiled code sees the plain dictionary only.
        vars(module)["_parameters"] = plain if gathered else WatchedParameters(plain, taken)

"""Initialisation that touches parameters after they were cut: ``nn.init``, ``apply``, ``.data``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from drivetrain.contracts import Op, Purpose, Tag
from drivetrain_zero.init.shards import InitParameter

_tensor: Any = torch.Tensor  # its attributes are descriptors, which torch does not type

_FACTS = {
    *(getattr(_tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim")),
    *(getattr(_tensor, name).__get__ for name in ("requires_grad", "is_leaf", "grad", "grad_fn")),
    *(getattr(_tensor, name).__get__ for name in ("is_meta", "is_sparse", "is_quantized")),
    *(getattr(_tensor, name).__set__ for name in ("requires_grad", "grad")),
    *(getattr(_tensor, name) for name in ("size", "dim", "numel", "nelement", "element_size")),
    *(getattr(_tensor, name) for name in ("requires_grad_", "is_floating_point", "is_complex")),
    *(getattr(_tensor, name) for name in ("__hash__", "__len__", "register_hook")),
}
"""What may be asked of a released parameter: none of it needs values."""


class InitTouch(TorchFunctionMode):
    """Makes cut parameters whole when a torch function is given them, inside ``zero.Init``.

    A parameter stays whole until another one is touched, and longer while views of it are in use,
    which may be written to. Then the first rank's values are kept. Collective: all ranks touch the
    same parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[InitParameter, nn.Parameter] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _FACTS:
            found = _handles((args, kwargs))
            touched = [h for h in found if h in self._open or not h.gathered]
            if touched:
                self.settle(touched)
                for handle in touched:
                    handle.open()
                    self._open[handle] = handle.parameter
        return func(*args, **kwargs)

    def settle(self, touched: Sequence[InitParameter] = ()) -> None:
        """Close what is not in use any more. Collective."""
        waiting = [handle for handle in self._open if handle not in touched]
        if not waiting:
            return
        # When objects die may differ between ranks, so they agree on it.
        used = torch.tensor([int(handle.aliased) for handle in waiting], dtype=torch.int32)
        shards = waiting[0].shards
        tag = Tag(Purpose.CONTROL, site="zero.Init, in use")
        shards.communicator.all_reduce(used, shards.axis, tag, op=Op.MAX)
        for handle, keeps in zip(waiting, used.tolist(), strict=True):
            if not keeps:
                self._close(handle)

    def close_all(self) -> None:
        """Keep everybody's shards. Collective."""
        for handle in list(self._open):
            self._close(handle)

    def _close(self, handle: InitParameter) -> None:
        handle.close()
        del self._open[handle]  # which may be the last use of its parameter


def _handles(arguments: Any) -> list[InitParameter]:
    """The handles of cut parameters among the arguments of a function."""
    found: dict[InitParameter, None] = {}
    for leaf in pytree.tree_leaves(arguments):
        if isinstance(leaf, nn.Parameter):
            handle = getattr(leaf, "drivetrain_handle", None)
            if isinstance(handle, InitParameter):
                found[handle] = None
    return list(found)

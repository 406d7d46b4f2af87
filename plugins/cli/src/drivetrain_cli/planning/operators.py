"""What operators ran: how often, with which shapes, how much they compute and move."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils import flop_counter

_torchs: Any = flop_counter  # torch does not type it


VIEW = -1


class Layout(NamedTuple):
    """A tensor, of which nothing but its layout is kept."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Operator:
    """Calls of one operator with one layout of arguments.

    Args:
        number: in the order in which operators were first called.
        func: torch's overload.
        args: positional arguments, tensors as :class:`Layout`.
        kwargs: named ones.
        flops: of one call; two for a multiplication with addition. Of products alone.
        moved: bytes that one call reads and writes.
        dtype: of what it computes.
        calls: (window, phase) -> how often.
    """

    number: int
    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    flops: int
    moved: int
    dtype: torch.dtype
    calls: Counter[tuple[int, str]] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        """Its qualified name, such as ``aten.mm.default``."""
        return str(self.func)

    @property
    def signature(self) -> str:
        """Its name and layouts, equal in every process."""
        named = sorted(self.kwargs.items())
        return f"{self.name}{_text(self.args)}{_text(tuple(v for _, v in named))}"


class Operators:
    """All that ran.

    Attributes:
        found: signature -> operator.
        moment: calls so far.
        order: of each call, the number of its operator in :attr:`found`; :data:`VIEW` of a view.
    """

    def __init__(self) -> None:
        self.found: dict[Any, Operator] = {}
        self.moment = 0
        self.order = array("i")
        self.views: Counter[tuple[int, str]] = Counter()
        self._kinds: dict[Any, bool] = {}

    def note(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        results: Sequence[torch.Tensor],
        phase: str,
        window: int,
        times: int = 1,
    ) -> None:
        """One call, which stands for so many."""
        self.moment += times
        if self._views(func):
            self.views[window, phase] += times
            self.order.extend([VIEW] * times)
            return
        layouts, named = _layouts(args), {key: _layouts(value) for key, value in kwargs.items()}
        key = (func, _hashable(layouts), _hashable(tuple(named.items())))
        operator = self.found.get(key)
        if operator is None:
            operator = _operator(len(self.found), func, args, kwargs, layouts, named, results)
            self.found[key] = operator
        operator.calls[window, phase] += times
        self.order.extend([operator.number] * times)

    def in_window(self, window: int) -> list[Operator]:
        """Those that ran in a window."""
        return [o for o in self.found.values() if any(w == window for w, _ in o.calls)]

    def _views(self, func: Any) -> bool:
        """Whether an operator returns a view, which costs nothing but its call."""
        known = self._kinds.get(func)
        if known is None:
            returns = func._schema.returns
            known = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
            known = known or func in _NO_WORK
            self._kinds[func] = known
        return known


def _operator(
    number: int,
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    layouts: Any,
    named: Mapping[str, Any],
    results: Sequence[torch.Tensor],
) -> Operator:
    inputs = _tensors_in((args, tuple(kwargs.values())))
    formula = _formula(func)
    value = results[0] if len(results) == 1 else tuple(results)
    flops = 0 if formula is None or not results else int(formula(*args, **kwargs, out_val=value))
    moved = sum(map(_reached, inputs)) + sum(map(_reached, results))
    dtypes = [t.dtype for t in (*results, *inputs) if t.dtype.is_floating_point]
    dtype = dtypes[0] if dtypes else torch.float32
    return Operator(number, func, layouts, named, flops, moved, dtype)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(_torchs.sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    shapes = (gradient.shape, query.shape, key.shape, value.shape)
    return int(_torchs.sdpa_backward_flop_count(*shapes))


_aten: Any = torch.ops.aten
_FORMULAS: Mapping[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Products that torch's counter does not know."""

_NO_WORK = frozenset({_aten.empty.memory_format, _aten.empty_strided.default, _aten.detach.default})


def _formula(func: Any) -> Callable[..., int] | None:
    packet = func.overloadpacket
    found: Callable[..., int] | None = _torchs.flop_registry.get(packet, _FORMULAS.get(packet))
    return found


def _reached(tensor: torch.Tensor) -> int:
    """Bytes of memory that a tensor shows; an expanded one shows fewer than it has elements."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for each in value for tensor in _tensors_in(each)]
    return []


def _layouts(value: Any) -> Any:
    """``value`` with layouts in place of its tensors, so that none is held."""
    if isinstance(value, torch.Tensor):
        return Layout(tuple(value.shape), tuple(value.stride()), value.dtype)
    if isinstance(value, Layout):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(map(_layouts, value))
    return value


def _text(value: Any) -> str:
    if isinstance(value, Layout):
        shape, stride = ",".join(map(str, value.shape)), ",".join(map(str, value.stride))
        return f"{str(value.dtype).removeprefix('torch.')}[{shape};{stride}]"
    if isinstance(value, (tuple, list)):
        return f"({' '.join(map(_text, value))})"
    return "." if isinstance(value, float) else str(value)


def _hashable(value: Any) -> Any:
    """``value`` as a key; numbers that change from call to call, such as steps, do not count."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_hashable, value))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return type(value).__name__ if isinstance(value, float) else value
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value

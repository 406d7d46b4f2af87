"""State of schedules and loaders, which are not ours, as data that survives JSON unchanged."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

import torch

from drivetrain.checkpoint.format.tensor_file import NAMES
from drivetrain.errors import CheckpointError

_TYPE = "__type__"
_MAKERS: Mapping[str, Callable[[Any], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": lambda pairs: Counter(dict(pairs)),
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
    "bytes": bytes,
}
_DTYPES = {name: dtype for dtype, name in NAMES.items()}


def packed(value: Any, what: str) -> Any:
    """Data for JSON, of which :func:`unpacked` makes ``value`` again.

    What JSON has no form for becomes a dict of its type and its items: dicts with other keys than
    strings (MultiStepLR's milestones), tuples, sets, bytes, tensors and numbers of NumPy.

    Raises:
        CheckpointError: a part is of another type; names it.
    """
    kind = type(value).__name__
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor) and value.dtype in NAMES:
        return {_TYPE: "tensor", "dtype": NAMES[value.dtype], "items": value.tolist()}
    if isinstance(value, dict):
        pairs = [
            [packed(k, f"a key of {what}"), packed(v, f"{what}.{k}")] for k, v in value.items()
        ]
        ordinary = kind not in _MAKERS or kind == "dict"
        if ordinary and _TYPE not in value and all(isinstance(key, str) for key in value):
            return {str(key): item for key, item in pairs}
        return {_TYPE: "dict" if ordinary else kind, "items": pairs}
    if isinstance(value, list) or kind in _MAKERS:
        items = [packed(item, f"{what}[{number}]") for number, item in enumerate(value)]
        return items if isinstance(value, list) else {_TYPE: kind, "items": items}
    if isinstance(value, tuple):
        return packed(tuple(value), what)
    if type(value).__module__ == "numpy" and hasattr(value, "item") and not value.ndim:
        return packed(value.item(), what)
    raise CheckpointError(
        f"{what} is a {kind}, which a checkpoint cannot hold; give its state_dict() numbers, "
        "strings, tensors, and lists, tuples, sets or dicts of them"
    )


def unpacked(value: Any) -> Any:
    """What :func:`packed` was given.

    Raises:
        KeyError, TypeError, ValueError: it did not make ``value``.
    """
    if isinstance(value, list):
        return [unpacked(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TYPE)
    if kind is None:
        return {key: unpacked(item) for key, item in value.items()}
    if kind == "tensor":
        return torch.tensor(value["items"], dtype=_DTYPES[value["dtype"]])
    return _MAKERS[kind](unpacked(value["items"]))

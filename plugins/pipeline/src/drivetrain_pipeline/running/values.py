"""Nested values between stages: their tensors, and a description of the rest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from drivetrain.contracts import SentInParts
from drivetrain.errors import TrainingError

if TYPE_CHECKING:
    from drivetrain.contracts import Communicator

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Layout:
    """All of a nested value but the numbers in its tensors.

    Args:
        tree: the nesting, with a number in the place of each tensor; JSON.
        tensors: (dtype, shape, whether it needs a gradient) of each.
    """

    tree: str
    tensors: tuple[tuple[torch.dtype, tuple[int, ...], bool], ...]

    @classmethod
    def of_list(cls, tensors: tuple[tuple[torch.dtype, tuple[int, ...], bool], ...]) -> Layout:
        """The layout of a list of these tensors."""
        return cls(json.dumps({"l": list(range(len(tensors)))}), tensors)

    def to_bytes(self) -> bytes:
        """Write it down."""
        tensors = [[str(d).removeprefix("torch."), s, g] for d, s, g in self.tensors]
        return json.dumps([self.tree, tensors]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Layout:
        """Read what :meth:`to_bytes` has written."""
        tree, tensors = json.loads(data)
        return cls(tree, tuple((getattr(torch, d), tuple(s), g) for d, s, g in tensors))

    def empty(self, device: torch.device) -> list[torch.Tensor]:
        """Memory for the tensors."""
        return [torch.empty(s, dtype=d, device=device) for d, s, _ in self.tensors]

    def build(self, tensors: Sequence[torch.Tensor], communicator: Communicator) -> Any:
        """Nest ``tensors`` as the value was; those that are parts show their whole again."""
        return _build(json.loads(self.tree), tensors, communicator)


def take_apart(value: Any) -> tuple[Layout, list[torch.Tensor]]:
    """Return the layout of ``value`` and its tensors, each once.

    Of a tensor of which this rank has a part it is the part, in the same graph.

    Args:
        value: tensors in tuples, lists and dicts with text as keys, and plain values beside them.

    Raises:
        TrainingError: something else is in it.
    """
    tensors: list[torch.Tensor] = []
    tree = json.dumps(_tree(value, tensors, {}, "output"))
    metas = tuple((t.dtype, tuple(t.shape), t.requires_grad) for t in tensors)
    return Layout(tree, metas), tensors


def _tree(value: Any, tensors: list[torch.Tensor], known: dict[int, Any], where: str) -> Any:
    """The nesting of ``value``; ``known`` has tensors by identity, which are noted once."""
    if isinstance(value, torch.Tensor):
        if id(value) not in known:
            part, facts = value.sent() if isinstance(value, SentInParts) else (value, {})
            index = len(tensors)
            known[id(value)] = (
                index if part is value else {"s": [index, type(value).__qualname__, dict(facts)]}
            )
            tensors.append(part)
        return known[id(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"d": {k: _tree(v, tensors, known, f"{where}[{k!r}]") for k, v in value.items()}}
    if isinstance(value, (tuple, list)):
        kind = "t" if isinstance(value, tuple) else "l"
        return {kind: [_tree(v, tensors, known, f"{where}[{i}]") for i, v in enumerate(value)]}
    if isinstance(value, _PLAIN):
        return {"p": value}
    raise TrainingError(
        f"pipeline: {where} is a {type(value).__name__}, which cannot travel between stages: pass "
        "tensors, in tuples, lists or dicts with text as keys"
    )


def _build(tree: Any, tensors: Sequence[torch.Tensor], communicator: Communicator) -> Any:
    if isinstance(tree, int):
        return tensors[tree]
    ((kind, inner),) = tree.items()
    if kind == "d":
        return {key: _build(value, tensors, communicator) for key, value in inner.items()}
    if kind == "p":
        return inner
    if kind == "s":
        index, name, facts = inner
        kinds = {found.__qualname__: found for found in SentInParts.__subclasses__()}
        return kinds[name].received(tensors[index], facts, communicator)
    built = [_build(value, tensors, communicator) for value in inner]
    return tuple(built) if kind == "t" else built


def signature(batch: Any) -> int:
    """Return a positive number of 62 bits for the nesting, shapes and dtypes of a micro-batch."""
    leaves, spec = pytree.tree_flatten(batch)
    kinds = [
        f"{leaf.dtype}{tuple(leaf.shape)}" if isinstance(leaf, torch.Tensor) else repr(type(leaf))
        for leaf in leaves
    ]
    digest = hashlib.blake2b(f"{spec}{kinds}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2 | 1

"""Repeated blocks in two halves of the batch: one computes while a sum of the other is under way.

Domino (Wang et al. 2024, https://arxiv.org/abs/2409.15241, section 3) interleaves halves of a
batch, between which there are no dependencies. Models are not written for that. So each half of a
block's forward is a coroutine of its own, which gives way to the other wherever a region's sum has
begun.

In backward, autograd takes the node that was made last of those that are ready. A gradient's sum is
waited for in the node at the beginning of a region (``overlap.Overlapped``), which is given the
number of the one before it, so that it comes behind the other half's region::

    forward   A0 | A1 | M0 | M1      sum of A0 under A1, of A1 under M0, of M0 under M1
    backward  M1 | M0 | A1 | A0      sum of M1 under M0, of M0 under A1, of A1 under A0
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import greenlet  # type: ignore[import-untyped]
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from drivetrain.communication.functional import Functional
from drivetrain.contracts import Op, Purpose, Tag
from drivetrain_tensor.comparing import difference

logger = logging.getLogger("drivetrain.tensor")

_AGREEMENT = Tag(Purpose.CONTROL, site="tensor parallel halves")
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
"""What both halves may get, beside tensors; anything else, a cache of keys say, may be changed."""


class _Now(threading.local):
    """What this thread computes.

    Attributes:
        half: 0 or 1; ``None`` outside of blocks in halves.
        waiting: node at the beginning of the last region that was entered, by number in autograd.
        kept: how many random streams are in use, across which nothing may give way.
    """

    half: int | None = None
    waiting: int | None = None
    kept: int = 0


_now = _Now()


def half() -> int:
    """Which half computes; 0 also outside of blocks in halves."""
    return _now.half or 0


def in_halves() -> bool:
    """Whether one of two halves computes."""
    return _now.half is not None


def keep(more: int) -> None:
    """Note that a random stream comes into use (1) or goes out of it (-1)."""
    if in_halves():
        _now.kept += more


def entered(y: torch.Tensor) -> None:
    """Let the sum of a region's gradients be waited for one region later; ``y`` is its input."""
    if not in_halves() or y.grad_fn is None:
        return
    node: Any = y.grad_fn
    number: int = node._sequence_nr()
    before = number - 1 if _now.waiting is None else _now.waiting
    node._set_sequence_nr(max(0, before))
    _now.waiting = number


def summed_meanwhile(terms: torch.Tensor, tp: Functional) -> torch.Tensor:
    """g: the sum of terms over ranks, under way while the other half computes. Collective.

    Args:
        terms: of this rank; the sum takes their memory.
        tp: the ranks.
    """
    pending: list[Any] = []
    y: torch.Tensor = _Sum.apply(terms.contiguous(), tp, pending)  # type: ignore[no-untyped-call]
    _give_way()
    pending[0].wait()
    return y


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: torch.Tensor, tp: Functional, pending: list[Any]) -> torch.Tensor:
        ctx.mark_dirty(terms)
        pending.append(tp.communicator.all_reduce(terms, tp.axis, tp.tag, asynchronous=True))
        return terms

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], None, None


def _give_way() -> None:
    """Let the other half compute until it gives way, too."""
    if not in_halves() or _now.kept:
        return
    enabled, cast = torch.is_grad_enabled(), _casting()
    parent = greenlet.getcurrent().parent
    assert parent is not None
    parent.switch()
    torch.set_grad_enabled(enabled)
    assert cast == _casting(), "autocast begins and ends inside of a layer"


def _casting() -> tuple[bool, bool]:
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


class Halving:
    """One block that computes in halves, where that has been found to be the same.

    Which of the tensors that come into a block have the samples along their first dimension is
    tried: for each way in which their shapes fit, the block computes in halves and as a whole once,
    with constants in place of random numbers, and is left whole where the results differ.

    Args:
        path: of the block, for messages.
        tp: the ranks.
    """

    def __init__(self, path: str, tp: Functional) -> None:
        self._path, self._tp = path, tp
        self._known: dict[object, tuple[bool, ...] | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Halving:
        return self

    def run(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What ``call`` returns. Collective where a kind of inputs is new."""
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        samples = tensors[0].shape[0] if tensors and tensors[0].dim() > 1 else 0
        compiled = torch.compiler.is_compiling() or any(t.is_meta for t in tensors)
        if samples <= 1 or compiled or in_halves():
            return call(*args, **kwargs)
        if others := [leaf for leaf in leaves if not isinstance(leaf, (torch.Tensor, *_PLAIN))]:
            self._warn(f"it gets a {type(others[0]).__name__}, which both halves would change")
            return call(*args, **kwargs)
        key = str(spec), module.training, tuple((t.dim(), _first(t) == samples) for t in tensors)
        compute = partial(_in_turn, call, leaves, spec, samples)
        if key not in self._known:
            whole = partial(call, *args, **kwargs)
            self._known[key] = self._same(module, whole, compute, samples)
        if (cut := self._known[key]) is not None:
            try:
                return compute(cut)
            except _NotJoined as error:  # with gradients it may return something else
                self._known[key] = None
                self._warn(str(error))
        return call(*args, **kwargs)

    def _same(
        self,
        module: nn.Module,
        whole: Callable[[], Any],
        halves: Callable[[tuple[bool, ...]], Any],
        samples: int,
    ) -> tuple[bool, ...] | None:
        """Which of the results have samples, if halves compute the same. Collective.

        All ranks come to one answer.
        """
        with torch.no_grad(), _trying(module):
            expected, _ = tree_flatten(whole())
            cut = tuple(isinstance(x, torch.Tensor) and _first(x) == samples for x in expected)
            try:
                found, _ = tree_flatten(halves(cut))
                problem = _differs(expected, found)
            except (RuntimeError, ValueError, IndexError, _NotJoined) as error:
                problem = f"{type(error).__name__}: {error}"
        verdict = torch.tensor([problem is None], dtype=torch.int64, device=_device(module))
        self._tp.communicator.all_reduce(verdict, self._tp.axis, _AGREEMENT, op=Op.MIN)
        if not verdict.item():
            self._warn(problem or "it does on another rank")
        return cut if verdict.item() else None

    def _warn(self, why: str) -> None:
        if why not in self._known:
            self._known[why] = None
            logger.warning("%s does not compute in halves of the batch: %s", self._path, why[:300])


@contextmanager
def _trying(module: nn.Module) -> Iterator[None]:
    """Compute without random numbers, and leave buffers as they were."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        with torch.random.fork_rng(), _Constants():  # type: ignore[no-untyped-call]
            yield
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)


class _Constants(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Ones in place of random numbers, so that dropout of halves is that of the whole."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if torch.Tag.nondeterministic_seeded in func.tags and func._schema.is_mutable:
            return args[0].fill_(1)
        found = func(*args, **kwargs or {})
        drawn = torch.Tag.nondeterministic_seeded in func.tags and isinstance(found, torch.Tensor)
        return torch.ones_like(found) if drawn else found


class HalvedModule(nn.Module):
    """Mixed in: a block that computes in halves of its batch."""

    tensor_halving: Halving

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.tensor_halving.run(self, super().forward, args, kwargs)


# -- halves of inputs and outputs ------------------------------------------------------------------


class _NotJoined(Exception):  # noqa: N818 - says what it is
    """Results of halves that do not make up one of the whole."""


def _in_turn(
    call: Callable[..., Any],
    leaves: Sequence[Any],
    spec: TreeSpec,
    samples: int,
    cut: tuple[bool, ...],
) -> Any:
    """Compute both halves, each until it gives way to the other, and join what they return.

    Args:
        call: the block's forward.
        leaves: its arguments.
        spec: how they hang together.
        samples: of the batch.
        cut: which of the results have samples along their first dimension.
    """
    sizes = [(samples + 1) // 2, samples // 2]
    both = [
        leaf.split(sizes)  # type: ignore[no-untyped-call]
        if isinstance(leaf, torch.Tensor) and _first(leaf) == samples
        else (leaf, leaf)
        for leaf in leaves
    ]
    given = [tree_unflatten([pair[number] for pair in both], spec) for number in range(2)]
    halves = [greenlet.greenlet(partial(call, *args, **kwargs)) for args, kwargs in given]
    results: list[Any] = [None, None]
    before = _now.half, _now.waiting, _now.kept
    _now.waiting, _now.kept = None, 0
    try:
        while not all(h.dead for h in halves):
            for number, coroutine in enumerate(halves):
                if not coroutine.dead:
                    _now.half = number
                    returned = coroutine.switch()
                    if coroutine.dead:
                        results[number] = returned
    finally:
        for coroutine in halves:
            if not coroutine.dead:
                coroutine.throw(greenlet.GreenletExit)
        _now.half, _now.waiting, _now.kept = before
    return _joined(results, sizes, cut)


def _joined(results: Sequence[Any], sizes: Sequence[int], cut: tuple[bool, ...]) -> Any:
    (first, spec), (second, other) = map(tree_flatten, results)
    if spec != other or len(first) != len(cut):
        raise _NotJoined("halves return other structures than the whole")
    joined = []
    for one, two, has_samples in zip(first, second, cut, strict=True):
        if not has_samples:
            joined.append(one)
        elif [_first(one), _first(two)] == list(sizes) and one.shape[1:] == two.shape[1:]:
            joined.append(torch.cat([one, two]))
        else:
            raise _NotJoined(f"it returns a tensor of shape {tuple(one.shape)} for a half")
    return tree_unflatten(joined, spec)


def _first(x: torch.Tensor) -> int:
    """Extent of the first dimension, along which samples lie if at all."""
    return x.shape[0] if x.dim() else -1


def _differs(expected: Sequence[Any], found: Sequence[Any]) -> str | None:
    if len(expected) != len(found):
        return "it returns another structure"
    for one, two in zip(expected, found, strict=True):
        if isinstance(one, torch.Tensor):
            if (problem := difference("its forward", one, two)) is not None:
                return problem
        elif one != two:
            return f"it returns {two!r} in place of {one!r}"[:200]
    return None


def _device(module: nn.Module) -> torch.device:
    return next(parameter.device for parameter in module.parameters())

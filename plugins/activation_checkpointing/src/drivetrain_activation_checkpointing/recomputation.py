"""Run a function now and again in backward: the same numbers, the same random draws, once counted.

Built over :mod:`torch.utils.checkpoint`, which repeats autocast, the default generators, and saves
what autograd asks for. Here is what it leaves to others: named streams of random numbers, buffers
that a forward changes, nested arguments, and where inputs wait.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from drivetrain.errors import TrainingError
from drivetrain_activation_checkpointing.buffers import Before, ChangingBuffers
from drivetrain_activation_checkpointing.saving import InputStore, Saver, Saving

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain.job.random_streams import StreamPositions

_PLAIN = (bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device, type(None))
"""Types of outputs that cannot have tensors inside."""


@dataclass(frozen=True)
class Settings:
    """How functions are recomputed.

    Args:
        saving: where their inputs wait.
        synchronize: wait for the device before and after each forward.
        profile: count recomputation as a span of the job.
    """

    saving: Saving = field(default_factory=Saving)
    synchronize: bool = False
    profile: bool = False


class Recomputer:
    """Recomputes functions, in a job or without one.

    Args:
        job: whose streams of random numbers are repeated; ``None`` outside of jobs, where inputs
            wait where they are.
        settings: how.
    """

    def __init__(self, job: Job | None, settings: Settings) -> None:
        self.job = job
        self.settings = settings
        self.store = None if job is None else InputStore(job, settings.saving)
        self._buffers: WeakKeyDictionary[nn.Module, ChangingBuffers] = WeakKeyDictionary()

    def __deepcopy__(self, _memo: object) -> Recomputer:
        return self  # of the job, which copies of a module share

    def run(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        *,
        reentrant: bool,
        key: Hashable,
        owner: nn.Module | None,
    ) -> Any:
        """Call a function of any arguments, and forget what autograd saves in it.

        Args:
            function: must do the same when it is called again.
            args: its arguments; lists, tuples and dicts of tensors are looked into.
            kwargs: the same by name.
            reentrant: recompute with a backward inside of backward; then all of what was
                recomputed is gone through at once, by ``backward()`` only, once per order.
            key: names the function.
            owner: the module whose forward it is, if it is one's.

        Raises:
            TrainingError: re-entrant, and the function returns an object that may hold tensors.
        """
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        leaves, spec = tree_flatten((tuple(args), kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not any(tensor.requires_grad for tensor in tensors):
            if owner is not None and not any(p.requires_grad for p in owner.parameters()):
                return function(*args, **kwargs)  # nothing is saved
            if reentrant:  # or torch would take the function for a constant
                tensors.append(torch.empty(0, requires_grad=True, device=self._device(tensors)))
        if not tensors:  # of whose device the default generator is repeated
            tensors.append(torch.empty(0, device=self._device(tensors)))
        region = _Region(self, function, _Arguments(leaves, spec), owner, reentrant)
        with ExitStack() as around:
            if self.store is not None and self.store.active:
                saver = Saver(self.store, key, tensors)
                around.enter_context(saved_tensors_hooks(saver.pack, saver.unpack))
            outputs = checkpoint(region, *tensors, use_reentrant=reentrant)
        return region.joined(outputs) if reentrant else outputs

    def buffers(self, module: nn.Module) -> ChangingBuffers:
        """What is known of a module's buffers."""
        if module not in self._buffers:
            self._buffers[module] = ChangingBuffers(module)
        return self._buffers[module]

    @contextmanager
    def boundary(self, again: bool) -> Iterator[None]:
        """Surround one run of a function."""
        job = self.job
        if job is None:
            yield
            return
        with job.span("recompute") if again and self.settings.profile else nullcontext():
            if self.settings.synchronize:
                job.accelerator.synchronize()
            try:
                yield
            finally:  # torch ends a recomputation with an exception once it has all it needs
                if self.settings.synchronize:
                    job.accelerator.synchronize()

    def _device(self, tensors: Sequence[torch.Tensor]) -> torch.device | None:
        if tensors:
            return tensors[0].device
        return None if self.job is None or self.job.device.type == "meta" else self.job.device


class _Arguments:
    """Arguments of a call without their tensors.

    Args:
        leaves: of the tree of arguments.
        spec: the tree.
    """

    def __init__(self, leaves: Sequence[Any], spec: TreeSpec) -> None:
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self._others = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._spec = spec

    def join(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The tree with ``tensors`` in their places; more of them than places are left out."""
        leaves = list(self._others)
        for place, tensor in zip(self._places, tensors, strict=False):
            leaves[place] = tensor
        return tree_unflatten(leaves, self._spec)


class _Region:
    """One call of a function, as torch's checkpoint sees it: a function of tensors."""

    def __init__(
        self,
        recomputer: Recomputer,
        function: Callable[..., Any],
        arguments: _Arguments,
        owner: nn.Module | None,
        reentrant: bool,
    ) -> None:
        self._recomputer = recomputer
        self._function = function
        self._arguments = arguments
        self._buffers = None if owner is None else recomputer.buffers(owner)
        self._reentrant = reentrant
        self._positions: StreamPositions | None = None
        self._before: Before = ()
        self._outputs: _Arguments | None = None
        self._has_run = False

    def __call__(self, *tensors: torch.Tensor) -> Any:
        args, kwargs = self._arguments.join(tensors)
        again = self._has_run
        with self._recomputer.boundary(again):
            outputs = self._again(args, kwargs) if again else self._first(args, kwargs)
        if not self._reentrant:
            return outputs
        leaves, spec = tree_flatten(outputs)
        if not again:
            self._check(leaves)
            self._outputs = _Arguments(leaves, spec)
        return tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))

    def joined(self, tensors: Any) -> Any:
        """The outputs of the first run, with the tensors that autograd has made of them."""
        assert self._outputs is not None
        return self._outputs.join(tensors)

    def _first(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if self._recomputer.job is not None:
            self._positions = self._recomputer.job.random.positions()
        before = () if self._buffers is None else self._buffers.before()
        outputs = self._function(*args, **kwargs)
        if self._buffers is not None:
            self._before = self._buffers.after(before)
        self._has_run = True
        return outputs

    def _again(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        with ExitStack() as around:
            if self._positions is not None:
                assert self._recomputer.job is not None
                around.enter_context(self._recomputer.job.random.repeat(self._positions))
            if self._buffers is not None:
                around.enter_context(self._buffers.repeat(self._before))
            return self._function(*args, **kwargs)

    def _check(self, leaves: Sequence[Any]) -> None:
        for leaf in leaves:
            if not isinstance(leaf, (torch.Tensor, *_PLAIN)):
                raise TrainingError(
                    f"a function that is recomputed re-entrantly returns a {type(leaf).__name__}, "
                    "whose tensors would get no gradient: return tensors in tuples, lists or "
                    "dicts, or call non_reentrant_checkpoint"
                )


def module_of(function: Callable[..., Any]) -> nn.Module | None:
    """The module that is called, as itself or by a method; ``None`` for any other function."""
    owner = getattr(function, "__self__", function)
    return owner if isinstance(owner, nn.Module) else None

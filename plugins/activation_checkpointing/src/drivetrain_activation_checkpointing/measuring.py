"""What recomputing a block costs, and what it saves: measured in one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from drivetrain.contracts import Op, Purpose, Tag
from drivetrain_activation_checkpointing.choice import Cost

if TYPE_CHECKING:
    from drivetrain.job.job import Job

_TAG = Tag(Purpose.CONTROL, site="activation checkpointing")


class Storages:
    """Counts bytes of storages, each once.

    A storage that was freed is not taken for another at its place: weak references hold that.
    """

    def __init__(self, uncounted: Iterable[torch.Tensor] = ()) -> None:
        self.nbytes = 0
        self._seen: dict[int, StorageWeakRef] = {}
        for tensor in uncounted:
            self.add(tensor)
        self.nbytes = 0

    def add(self, tensor: torch.Tensor) -> None:
        """Count the storage of ``tensor``, if it is a new one."""
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen:
                self._seen[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self.nbytes += storage.nbytes()


class Measurement:
    """Costs of the blocks of a model.

    Args:
        job: whose device is waited for.
        count: number of blocks.
    """

    def __init__(self, job: Job, count: int) -> None:
        self._job = job
        self._inputs = Storages()
        self._time = [0] * count
        self._nbytes = [0] * count

    def around(self, block: int, module: nn.Module, function: Callable[..., Any]) -> Any:
        """``function``, the forward of ``module``, with its first run measured."""
        measured = False

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal measured
            if measured:
                return function(*args, **kwargs)
            measured = True
            inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            for tensor in inputs:
                self._inputs.add(tensor)
            saved = Storages([*inputs, *module.parameters(), *module.buffers()])
            self._job.accelerator.synchronize()
            begin = perf_counter_ns()
            with _counting(saved):
                outputs = function(*args, **kwargs)
                self._job.accelerator.synchronize()
            self._time[block] += perf_counter_ns() - begin
            self._nbytes[block] += saved.nbytes
            return outputs

        return run

    def agreed(self) -> tuple[Sequence[Cost], int]:
        """Costs by block, and bytes of all inputs: the most of any rank with the same blocks.

        Collective over all ranks of a pipeline's stage. Ranks must choose alike, as blocks may
        communicate.
        """
        rows = [*zip(self._time, self._nbytes, strict=True), (0, self._inputs.nbytes)]
        found = torch.tensor(rows, dtype=torch.int64, device=self._job.device)
        for axis in ("dp", "sp", "tp"):
            if self._job.mesh.size(axis) > 1:
                self._job.communicator.all_reduce(found, axis, _TAG, op=Op.MAX)
        *costs, (_, inputs) = found.tolist()
        return [Cost(time, nbytes) for time, nbytes in costs], inputs


def _counting(saved: Storages) -> saved_tensors_hooks:
    """Count what autograd saves, and leave it to the hooks that are there already."""
    top: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    pack, unpack = (_same, _same) if top is None else top

    def count(tensor: torch.Tensor) -> Any:
        saved.add(tensor)
        return pack(tensor)

    return saved_tensors_hooks(count, unpack)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach()

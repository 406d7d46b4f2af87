"""Measures what layers take, so that a model can be cut by time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from drivetrain.contracts import Purpose, Tag
from drivetrain.errors import TrainingError
from drivetrain_pipeline.cutting import Measured, write_measured
from drivetrain_pipeline.running.chunked import ATTRIBUTE

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from drivetrain.engine.engine import Engine


def measure(
    engine: Engine,
    batches: Iterator[Any],
    path: str | os.PathLike[str],
    *,
    steps: int = 3,
) -> dict[str, Measured]:
    """Train for some steps, and write what each layer took into a file. Collective.

    The file is for ``pipeline.measured``. A layer's time is the least of all its micro-batches, as
    whatever else runs on a machine only adds to it; of data shards it is the mean. Parts beside the
    layers (embedding, head) are not in it.

    Args:
        engine: of a model that was split, into any number of stages above 1 or as a
            :class:`~drivetrain_pipeline.module.PipelineModule`.
        batches: yields micro-batches; all steps take place, with their updates.
        path: of the file, which rank 0 writes.
        steps: how many; the first one warms up.

    Returns:
        What was found, by layer, the same on every rank.

    Raises:
        TrainingError: the engine has no pipeline, or ``steps`` is below 2.
    """
    model = getattr(engine.module, ATTRIBUTE, None)
    if model is None or steps < 2:
        raise TrainingError(
            "measure needs an engine of a model that was split, and at least 2 steps, of which the "
            "first one warms up"
        )
    layers: dict[str, nn.Module | None] = model.layers_by_name()
    own = [_Watch(module, engine.job.device) for module in layers.values() if module is not None]
    engine.train_batch(batches)
    for watch in own:
        watch.begin()
    try:
        for _ in range(steps - 1):
            engine.train_batch(batches)
    finally:
        for watch in own:
            watch.end()
    found = _gather(engine, layers, own)
    if engine.job.rank == 0:
        write_measured(Path(path), found)
    return found


def _gather(
    engine: Engine, layers: dict[str, nn.Module | None], own: list[_Watch]
) -> dict[str, Measured]:
    watches = iter(own)
    table = torch.zeros(len(layers), 3, dtype=torch.float32, device=engine.job.device)
    for row, module in enumerate(layers.values()):
        if module is not None:
            table[row] = torch.tensor(next(watches).facts())
    tag = Tag(Purpose.CONTROL, site="measured times of layers")
    engine.job.communicator.all_reduce(table, ("pp", "data"), tag)
    rows = (table / engine.job.mesh.size("data")).tolist()
    return {
        name: Measured(forward, backward, round(kept))
        for name, (forward, backward, kept) in zip(layers, rows, strict=True)
    }


class _Watch:
    """Times the forwards and backwards of one layer."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module
        self._wait: Callable[[], object] = (
            torch.get_device_module(device.type).synchronize
            if device.type not in ("cpu", "meta")
            else lambda: None
        )
        self._hooks: list[RemovableHandle] = []
        self._since = 0.0
        self._forward: list[float] = []
        self._backward: list[float] = []
        self._kept = 0
        self._is_first = False
        self._saving: torch.autograd.graph.saved_tensors_hooks | None = None

    def begin(self) -> None:
        """Begin to watch."""
        module = self._module
        self._hooks = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after),
            module.register_full_backward_pre_hook(self._before_backward),
            module.register_full_backward_hook(self._after_backward),
        ]
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if trained:
            hook = torch.autograd.graph.register_multi_grad_hook(trained, self._after_weights)
            self._hooks.append(hook)

    def end(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def facts(self) -> tuple[float, float, float]:
        """Seconds of forward and backward, and bytes that autograd keeps in between."""
        times = (min(found, default=0.0) for found in (self._forward, self._backward))
        return (*times, float(self._kept))  # type: ignore[return-value]

    def _now(self) -> float:
        self._wait()
        return time.perf_counter()

    def _before(self, module: nn.Module, *given: object) -> None:
        leaves = pytree.tree_leaves(given)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self._is_first = not any(tensor.requires_grad for tensor in tensors)
        self._bytes = 0
        self._saving = torch.autograd.graph.saved_tensors_hooks(self._save, lambda x: x)
        self._saving.__enter__()
        self._since = self._now()

    def _save(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            self._bytes += tensor.numel() * tensor.element_size()
        return tensor

    def _after(self, *_: object) -> None:
        self._forward.append(self._now() - self._since)
        if self._saving is not None:
            self._saving.__exit__()
            self._saving = None
        self._kept = max(self._kept, self._bytes)

    def _before_backward(self, *_: object) -> None:
        self._since = self._now()

    def _after_backward(self, *_: object) -> None:
        if not self._is_first:
            self._backward.append(self._now() - self._since)

    def _after_weights(self, *_: object) -> None:
        # Torch has no end of backward for a layer whose inputs need no gradient.
        if self._is_first:
            self._backward.append(self._now() - self._since)

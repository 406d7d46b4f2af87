"""Measures what layers take, so that a model can be cut by time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from drivetrain.contracts import Purpose, Tag
from drivetrain.errors import TrainingError
from drivetrain_pipeline.cutting import Measured, write_measured
from drivetrain_pipeline.running.chunked import ATTRIBUTE
from drivetrain_pipeline.running.runner import PipelineRunner
from drivetrain_pipeline.schedules import Instruction, Recorder

Facts = tuple[float, float, float]
"""Seconds of a forward and a backward, and bytes that autograd keeps in between."""

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from drivetrain.engine.engine import Engine
    from drivetrain_pipeline.running.chunked import ChunkedModel


def measure(
    engine: Engine,
    batches: Iterator[Any],
    path: str | os.PathLike[str],
    *,
    steps: int = 3,
) -> dict[str, Measured]:
    """Train for some steps, and write what each layer took into a file. Collective.

    The file is for ``pipeline.measured``. A layer's time is the least of all its micro-batches, as
    whatever else runs on a machine only adds to it; of data shards it is the mean. What a stage
    does beside its layers is timed as well: parts before the first and behind the last layer
    (embedding, head, loss) count as theirs, and what each layer takes beyond its own time (its
    gradients are added up, say) is shared out among all. Functions, tied modules and the loss of a
    :class:`~drivetrain_pipeline.module.PipelineModule` are timed by themselves, at any number of
    stages; the loss counts as the last layer's.

    Args:
        engine: of a model that was split, into any number of stages above 1 or as a
            :class:`~drivetrain_pipeline.module.PipelineModule`.
        batches: yields micro-batches; all steps take place, with their updates.
        path: of the file, which rank 0 writes.
        steps: how many; the first one warms up.

    Returns:
        What was found, by layer, the same on every rank.

    Raises:
        TrainingError: the engine has no pipeline, its schedule computes gradients of weights apart,
            or ``steps`` is below 2.
    """
    model: ChunkedModel | None = getattr(engine.module, ATTRIBUTE, None)
    runner = engine.runner
    if model is None or not isinstance(runner, PipelineRunner) or steps < 2:
        raise TrainingError(
            "measure needs an engine of a model that was split, and at least 2 steps, of which the "
            "first one warms up"
        )
    if runner.splits_backward:
        raise TrainingError(
            "measure times backwards that compute all gradients, which this schedule has in two "
            "parts: measure with pipeline.schedule 1f1b, what it finds serves every schedule"
        )
    own = {
        name: _Watch(module, engine.job.device)
        for name, module in model.layers_by_name().items()
        if module is not None
    }
    calls = _Calls(engine.job.device)
    passes = _Passes(engine.job.accelerator.synchronize)
    engine.train_batch(batches)
    for watch in own.values():
        watch.begin()
    model.watch_calls(calls)
    try:
        with runner.recorded(passes):
            for _ in range(steps - 1):
                engine.train_batch(batches)
    finally:
        model.watch_calls(None)
        for watch in own.values():
            watch.end()
        calls.end()
    facts = {name: watch.facts() for name, watch in own.items()}
    found = _gather(engine, model, calls.added_to(facts), passes)
    if engine.job.rank == 0:
        write_measured(Path(path), found)
    # Whoever reads the file next finds it.
    engine.job.communicator.barrier("world", Tag(Purpose.CONTROL, site="measured times of layers"))
    return found


def _gather(
    engine: Engine, model: ChunkedModel, own: dict[str, Facts], passes: _Passes
) -> dict[str, Measured]:
    """Put together what the stages have measured. Collective."""
    names, bounds = list(model.layers_by_name()), model.partitions()
    # Of each layer forward, backward, bytes, and whether it has times; of each chunk two passes.
    layers = torch.zeros(len(names), 4, dtype=torch.float64)
    chunks = torch.zeros(len(bounds) - 1, 2, dtype=torch.float64)
    for row, name in enumerate(names):
        if name in own:
            layers[row] = torch.tensor([*own[name], 1.0])
    for (kind, chunk), seconds in passes.least.items():
        chunks[chunk]["FB".index(kind)] = seconds
    table = torch.cat([layers.flatten(), chunks.flatten()]).float().to(engine.job.device)
    tag = Tag(Purpose.CONTROL, site="measured times of layers")
    engine.job.communicator.all_reduce(table, "world", tag)
    # Each layer is on all ranks of one stage.
    table = table.double().cpu() * engine.job.mesh.size("pp") / engine.job.mesh.size("world")
    layers, chunks = table.split([layers.numel(), chunks.numel()])  # type: ignore[no-untyped-call]
    rows: list[list[float]] = layers.view(-1, 4).tolist()
    timed = [row[3] > 0 for row in rows]
    forward, backward = (
        _with_sides([row[way] for row in rows], timed, bounds, chunks.view(-1, 2)[:, way].tolist())
        for way in (0, 1)
    )
    return {
        name: Measured(forward[i], backward[i], round(rows[i][2])) for i, name in enumerate(names)
    }


def _with_sides(
    times: Sequence[float], timed: Sequence[bool], bounds: Sequence[int], passes: Sequence[float]
) -> list[float]:
    """Add to times of layers what the passes of their chunks took beyond them.

    What a layer takes beyond its time is that of the chunk in which it is least. The rest of the
    first chunk is what comes before its first layer, that of the last what comes behind its last.

    Args:
        times: of layers, 0 where there is none.
        timed: whether a layer has a time.
        bounds: first layer of each chunk, and the number of layers.
        passes: time of each chunk's pass.

    Returns:
        Times of layers, which add up to those of the passes.
    """
    found, cuts = list(times), [range(*pair) for pair in pairwise(bounds)]
    rests = [max(0.0, p - sum(times[i] for i in own)) for p, own in zip(passes, cuts, strict=True)]
    known = [[i for i in own if timed[i]] for own in cuts]
    each = min((r / len(own) for r, own in zip(rests, known, strict=True) if own), default=0.0)
    for chunk, (rest, own) in enumerate(zip(rests, known, strict=True)):
        for i in own:
            found[i] += each
        if chunk == 0:
            takers = [bounds[0]]
        elif chunk == len(cuts) - 1:
            takers = [bounds[-1] - 1]
        else:
            takers = own or [bounds[chunk]]
        for i in takers:
            found[i] += (rest - each * len(own)) / len(takers)
    return found


class _Passes(Recorder):
    """The least time of each chunk's forward and backward.

    Attributes:
        least: kind of pass and chunk -> seconds.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        super().__init__(wait)
        self.least: dict[tuple[str, int], float] = {}

    def add(self, instruction: Instruction, begin: float, end: float) -> None:
        """Note the times of an instruction."""
        key = instruction.kind, instruction.chunk
        self.least[key] = min(end - begin, self.least.get(key, end - begin))


class _Watch:
    """Times the forwards and backwards of one layer."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module
        self._now = _clock(device)
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

    def facts(self) -> Facts:
        """Seconds of forward and backward, and bytes that autograd keeps in between."""
        times = (min(found, default=0.0) for found in (self._forward, self._backward))
        return (*times, float(self._kept))  # type: ignore[return-value]

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


@dataclass(eq=False)
class _Pass:
    """A forward, and the backward that belongs to it; seconds."""

    forward: float
    since: float | None = None
    backward: float | None = None


class _Call:
    """Times the forwards and backwards of a function, by hooks on its tensors.

    Hooks of modules would make views of these, which it could not change in place.
    """

    def __init__(self, device: torch.device) -> None:
        self._now = _clock(device)
        self._passes: list[_Pass] = []
        self._under_way: _Pass | None = None
        self._hooks: list[RemovableHandle] = []
        self._kept = 0

    def run(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        parameters: Iterable[nn.Parameter],
    ) -> Any:
        """Return ``run(*args)``."""
        given = _trained(args)
        kept: list[int] = []

        def save(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter):
                kept.append(tensor.numel() * tensor.element_size())
            return tensor

        one = _Pass(0.0)
        # Those of parameters, where nothing else tells the end of a backward, see all passes.
        ends = given or [p for p in parameters if p.requires_grad]
        hooks = [_hook(x, partial(self._end, one)) for x in ends]
        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            since = self._now()
            output = run(*args)
            one.forward = self._now() - since
        self._passes.append(one)
        self._kept = max(self._kept, sum(kept))
        made = [x for x in _trained(output) if all(x is not other for other in given)]
        self._hooks += [*hooks, *(_hook(x, partial(self._begin, one)) for x in made)]
        return output

    def end(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def facts(self) -> Facts:
        """What was found."""
        forward = min((one.forward for one in self._passes), default=0.0)
        backward = [one.backward for one in self._passes if one.backward is not None]
        return forward, min(backward, default=0.0), float(self._kept)

    def _begin(self, one: _Pass, _: torch.Tensor) -> None:
        self._under_way, one.since = one, self._now()

    def _end(self, one: _Pass, _: torch.Tensor) -> None:
        if self._under_way is one and one.since is not None:
            one.backward = self._now() - one.since  # that of the last tensor counts


class _Calls:
    """Times what a model calls beside the modules of its layers."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[tuple[str, bool], _Call] = {}

    def __call__(
        self,
        layer: str,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        parameters: Iterable[nn.Parameter] = (),
        is_loss: bool = False,
    ) -> Any:
        call = self._known.setdefault((layer, is_loss), _Call(self._device))
        return call.run(run, args, parameters)

    def end(self) -> None:
        """Stop watching."""
        for call in self._known.values():
            call.end()

    def added_to(self, known: Mapping[str, Facts]) -> dict[str, Facts]:
        """Facts of layers, with those of what was called."""
        found = dict(known)
        for (layer, _), call in self._known.items():
            pairs = zip(found.get(layer, (0.0, 0.0, 0.0)), call.facts(), strict=True)
            forward, backward, kept = (a + b for a, b in pairs)
            found[layer] = forward, backward, kept
        return found


def _hook(tensor: torch.Tensor, call: Callable[[torch.Tensor], None]) -> RemovableHandle:
    """Have ``call`` be called when the gradient of ``tensor`` is there."""
    handle: RemovableHandle = tensor.register_hook(call)  # type: ignore[no-untyped-call]
    return handle


def _trained(values: object) -> list[torch.Tensor]:
    """Tensors whose gradients are computed."""
    leaves = pytree.tree_leaves(values)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]


def _clock(device: torch.device) -> Callable[[], float]:
    """What tells the time when a device has done its work."""
    if device.type in ("cpu", "meta"):
        return time.perf_counter
    wait = torch.get_device_module(device.type).synchronize

    def now() -> float:
        wait()
        return time.perf_counter()

    return now

"""Repeated blocks of a model, a chunk of the sequence at a time, forward and backward.

[Note: FPDT] In "Fully Pipelined Distributed Transformer" (arXiv 2408.16830) projections, exchange
of heads, attention and MLP see a chunk of the sequence at a time; keys and values of the others
wait in host memory. Here the whole forward of a block does, so that what is between its input and
its output is in memory for one chunk only. Backward goes through the chunks from the last to the
first and repeats the forward of each, but for attention, whose result was kept: when it comes to a
chunk, all that have seen its keys have been there, and the gradients of the keys are complete.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

from drivetrain.errors import TrainingError
from drivetrain_sequence.chunks.alike import groups, is_rehearsed
from drivetrain_sequence.chunks.cutting import Arguments, Results
from drivetrain_sequence.chunks.draws import Casts, Draws
from drivetrain_sequence.chunks.elsewhere import Elsewhere
from drivetrain_sequence.chunks.escapes import Escapes
from drivetrain_sequence.chunks.sums import GradientSums, OwnLeaves
from drivetrain_sequence.chunks.work import Attended, KeysKnown, Work
from drivetrain_sequence.in_place_of import InPlaceOf

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain.states.units import Unit
    from drivetrain_sequence.turn import Turn


class ChunkedBlock:
    """Stands in the place of a block's ``forward``.

    It is inside of the module's hooks, which gather and release parameters: these find the block as
    it always is, and gradients of parameters arrive once.

    Args:
        job: whose random numbers are repeated.
        unit: the block.
        turn: tells when sequences are in chunks.
        offload: whether chunks wait in host memory.
    """

    def __init__(self, job: Job, unit: Unit, turn: Turn, offload: bool) -> None:
        self.job = job
        self.name = unit.name
        self.module: Any = unit.module
        self.turn = turn
        self.offload = offload
        self.leaves = OwnLeaves(unit.name)
        before = unit.module.__dict__.get("forward")
        if isinstance(before, ChunkedBlock):  # of a job that is still open
            before.undo()
        self.inner: Callable[..., Any] = unit.module.forward
        self.__signature__ = inspect.signature(self.inner)
        self.undo: Callable[[], None] = InPlaceOf(self.module, "forward", self).undo

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block's forward."""
        turn = self.turn
        if not turn.in_parts(self.module) or turn.work is not None:
            return self.inner(*args, **kwargs)
        if torch.compiler.is_compiling():
            raise TrainingError(
                f"{self.name} is compiled, and computed in chunks whose number the sequence "
                "decides: leave out compilation of it or sequence_parallel.chunk"
            )
        arguments = Arguments(args, kwargs, self.name)
        chunks = turn.cut.chunks(arguments.length * turn.cut.heads)
        if len(chunks) == 1:
            return self.inner(*args, **kwargs)
        call = _Call(self, arguments, chunks)
        tensors = arguments.take()
        if not torch.is_grad_enabled():
            return call.joined(call.forward(tensors))
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.leaves.refuse_hooks(parameters)
        outputs = _Chunked.apply(call, *tensors, *parameters)  # type: ignore[no-untyped-call]
        return call.joined(outputs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any]]:
        return _same, (self.inner,)


class _Call:
    """One forward of a block, and what its backward repeats.

    Args:
        block: it.
        arguments: of its forward.
        chunks: places in the whole sequence.
    """

    def __init__(self, block: ChunkedBlock, arguments: Arguments, chunks: list[range]) -> None:
        self.block = block
        self.arguments = arguments
        self._chunks = chunks
        heads = block.turn.cut.heads
        self._parts = [range(c.start // heads, c.stop // heads) for c in chunks]
        self._rehearsed = is_rehearsed(block.job.device)
        self._groups = groups(chunks, self._rehearsed)
        self._results = Results(arguments.length, block.name)
        self._casts = Casts(block.job.device)
        self._draws = Draws(block.job, block.module.training)
        self._templates: list[Attended] = []
        self._keys_first = False
        self.elsewhere = Elsewhere(block.job.accelerator, block.job.device, block.offload)

    def joined(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The block's result with these tensors; they are no longer held here."""
        return self._results.of(tensors)

    def forward(
        self, tensors: Sequence[torch.Tensor], saved: list[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """All chunks; appends what backward needs of them to ``saved``.

        Returns:
            The tensors of the result.
        """
        work = Work(self._chunks, self.elsewhere, rehearsed=self._rehearsed)
        versions = [buffer._version for buffer in self.block.module.buffers()]
        with self._working(work), self._casts.again():
            for walk in range(2):
                for group in self._groups:
                    number = group[-1]
                    watched = number == 0 and saved is not None and not work.collecting
                    run = self._watched if watched else self._put
                    with self._begun(work, group):
                        run(number, self.arguments.cut(tensors, self._parts[number]))
                if walk == 1 or not work.collecting:
                    break
                work.collecting = False
        if versions != [buffer._version for buffer in self.block.module.buffers()]:
            raise TrainingError(
                f"{self.block.name} changes its buffers in its forward, which is repeated: leave "
                "out sequence_parallel.chunk"
            )
        self._keys_first = work.keys_first
        self._templates = [Attended(segments=call.segments) for call in work.calls]
        if saved is not None:
            saved += [x for call in work.calls for x in call.saved()]
        self.elsewhere.settle()
        return self._results.take()

    def backward(
        self,
        tensors: Sequence[torch.Tensor],
        saved: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
    ) -> list[torch.Tensor | None]:
        """Gradients of the arguments' tensors, and then of parameters."""
        each = len(saved) // max(1, len(self._templates))
        calls = [
            template.restored(saved[i * each : (i + 1) * each])
            for i, template in enumerate(self._templates)
        ]
        work = Work(self._chunks, self.elsewhere, calls, keys_first=self._keys_first, again=True)
        work.rehearsed = self._rehearsed
        parameters = [p for p in self.block.module.parameters() if p.requires_grad]
        needed = self.arguments.needed
        wanted = [x if needs else None for x, needs in zip(tensors, needed, strict=True)]
        device = self.block.job.device
        sums = GradientSums(wanted, self.arguments.dims, parameters, device)
        with self._working(work):
            for group in reversed(self._groups):
                part = self._parts[group[-1]]
                with self._begun(work, group):
                    inputs, outputs = self._again(group[-1], tensors)
                    self.block.leaves.check(outputs, [*inputs, *parameters])
                    own = [gradient.narrow(1, part.start, len(part)) for gradient in gradients]
                    sums.add(part, inputs, outputs, own)
            work.collecting = work.keys_first
            for group in self._groups if work.keys_first else []:
                with self._begun(work, group):
                    inputs, keys = self._again(group[-1], tensors)
                    found = work.gradients_of_keys(calls[0])
                    sums.add(self._parts[group[-1]], inputs, keys, found)
        return sums.found()

    def _again(
        self, number: int, tensors: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Repeat a chunk's forward: its inputs, and its outputs or its keys and values."""
        parts = self.arguments.cut(tensors, self._parts[number])
        inputs = [
            x.to(self.block.job.device, non_blocking=True).detach().requires_grad_(needs)
            for x, needs in zip(parts, self.arguments.needed, strict=True)
        ]
        with self._casts.again(), torch.enable_grad():
            output = self._run(number, inputs)
        if isinstance(output, KeysKnown):
            return inputs, [output.key, output.value]
        return inputs, [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]

    def _put(self, number: int, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Compute a chunk's results, if its forward gets to them, and keep their values."""
        output = self._run(number, tensors)
        if isinstance(output, KeysKnown):
            return []
        found = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]
        with torch.no_grad():
            self._results.put(output, self._parts[number])
        return found

    def _watched(self, number: int, tensors: Sequence[torch.Tensor]) -> None:
        """The like with a graph, to see that none of it gets lost."""
        escapes = Escapes(self.block.name)
        with _nothing_saved(), torch.enable_grad():
            inputs = [
                x.detach().requires_grad_(needs)
                for x, needs in zip(tensors, self.arguments.needed, strict=True)
            ]
            with escapes:
                outputs = self._put(number, inputs)
            escapes.mark(outputs, list(self.block.module.parameters()))
        del inputs, outputs
        escapes.check()

    def _run(self, number: int, tensors: Sequence[torch.Tensor]) -> Any:
        """The result of a chunk, or the keys at which its forward has stopped."""
        args, kwargs = self.arguments.of(tensors)
        with self._draws.of(number):
            try:
                return self.block.inner(*args, **kwargs)
            except KeysKnown as known:
                return known

    @contextmanager
    def _begun(self, work: Work, group: range) -> Iterator[None]:
        """What runs in the context is of the group's last chunk, for all of them."""
        work.begin(group)
        with self.elsewhere.alike(len(group)):
            yield

    @contextmanager
    def _working(self, work: Work) -> Iterator[None]:
        turn = self.block.turn
        turn.work = work
        try:
            yield
        finally:
            turn.work = None


class _Chunked(torch.autograd.Function):
    """A block by chunks; autograd saves all that it keeps, and hooks may move or drop that."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = tensors[: len(call.arguments.dims)]
        saved: list[torch.Tensor] = []
        outputs = call.forward(inputs, saved)
        needed = call.arguments.needed
        kept = [
            call.elsewhere.keep_whole(x) if needs else x
            for x, needs in zip(inputs, needed, strict=True)
        ]
        call.elsewhere.settle()
        ctx.call = call
        ctx.save_for_backward(*kept, *saved)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        count = len(ctx.call.arguments.dims)
        everything = ctx.saved_tensors  # once: asking recomputes, where blocks are recomputed
        return None, *ctx.call.backward(everything[:count], everything[count:], gradients)


def _nothing_saved() -> Any:
    """Graphs without memory; hooks outside, which count or move what is saved, see none of it."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda x: x)


def _same(forward: Any) -> Any:
    return forward

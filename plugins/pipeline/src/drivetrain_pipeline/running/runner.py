"""Runs the instructions of one stage: forwards and backwards of chunks, and messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from drivetrain.engine.micro_batches import loss_of
from drivetrain.engine.stepping import checked_weight
from drivetrain.precision.loss_watch import weighted_loss
from drivetrain_pipeline.running.batches import read_batches
from drivetrain_pipeline.running.mail import AXIS, Kind, Mail
from drivetrain_pipeline.running.values import take_apart
from drivetrain_pipeline.schedules import Exchange, Instruction, Schedule, forward_only

if TYPE_CHECKING:
    from torch import nn

    from drivetrain.engine.engine import Engine
    from drivetrain_pipeline.running.chunked import ChunkedModel
    from drivetrain_pipeline.running.weights_apart import WeightsApart
    from drivetrain_pipeline.schedules import Message, Recorder

Schedules = Callable[[int], Schedule]
"""Number of micro-batches -> the schedule of a step with so many."""


@dataclass
class _Pass:
    """One micro-batch's forward through one chunk, until its backward.

    Attributes:
        leaves: received tensors that need a gradient.
        outputs: tensors that backward starts from, or the loss.
        weight: of the loss.
    """

    leaves: list[torch.Tensor]
    outputs: list[torch.Tensor]
    weight: torch.Tensor | float | None = None


class PipelineRunner:
    """Runs one stage's part of a global batch, as :class:`~drivetrain.contracts.Runner` says.

    Args:
        engine: of this stage.
        model: its chunks.
        schedules: which instructions there are.
        apart: keeps what weights' gradients are made of, where schedules have them apart.
        tied: this rank's parameters that other stages have, too.
        dynamic: shapes depend on values.
        trace: records when instructions begin and end.

    Attributes:
        batch_fn: changes each micro-batch that is read, if there is one.
    """

    def __init__(
        self,
        engine: Engine,
        model: ChunkedModel,
        schedules: Schedules,
        *,
        apart: WeightsApart | None = None,
        tied: list[nn.Parameter] | None = None,
        dynamic: bool = False,
        trace: Recorder | None = None,
    ) -> None:
        self._engine = engine
        self._model = model
        self._schedules = schedules
        self._apart = apart
        self._tied = tied or []
        self._dynamic = dynamic
        self._trace = trace
        self._stage = engine.job.mesh.coordinate(AXIS)
        self._mail = Mail(engine.job, always=dynamic)
        self._last = model.chunks - 1
        self._with_loss = True
        self.batch_fn: Callable[[Any], Any] | None = None

    @property
    def placement(self) -> tuple[int, ...]:
        """The stage of each chunk."""
        return self._schedules(self._engine.gradient_accumulation_steps()).placement

    @property
    def splits_backward(self) -> bool:
        """Whether gradients of weights are computed apart from those of inputs."""
        return self._apart is not None

    @contextmanager
    def recorded(self, recorder: Recorder) -> Iterator[None]:
        """Inside of the block ``recorder`` notes when instructions of training begin and end."""
        before, self._trace = self._trace, recorder
        try:
            yield
        finally:
            self._trace = before

    def run(self, batches: Iterator[Any], train: bool) -> torch.Tensor:
        """See :class:`~drivetrain.contracts.Runner`."""
        total, _ = self._step(batches, train, 1, keep=False)
        return total

    def evaluate(
        self,
        batches: Iterator[Any],
        micro_batches: int,
        *,
        keep: bool = False,
        with_loss: bool = True,
    ) -> tuple[torch.Tensor, list[Any]]:
        """Run micro-batches forward only.

        Args:
            batches: yields micro-batches of this data shard.
            micro_batches: how many of them to run.
            keep: return what the model returned for each, on the stage of the last chunk.
            with_loss: the model returns a loss, which counts; else it may return anything.

        Returns:
            Sums of losses and weights as :meth:`run` returns them, and outputs.
        """
        self._with_loss = with_loss
        try:
            return self._step(batches, False, micro_batches, keep=keep)
        finally:
            self._with_loss = True

    def _step(
        self, batches: Iterator[Any], train: bool, count: int, *, keep: bool
    ) -> tuple[torch.Tensor, list[Any]]:
        engine = self._engine
        if train:
            count = engine.gradient_accumulation_steps()
        schedule = self._schedules(count if train else engine.gradient_accumulation_steps())
        if not train:
            schedule = forward_only(schedule, count)
        own = schedule.chunks_of(self._stage)
        wants = self._model.needs_inputs or bool({0, self._last} & set(own))
        self._batches, self._signatures = read_batches(
            engine.job, self._changed(batches) if wants else None, count
        )
        self._total = torch.zeros(2, dtype=torch.float32, device=engine.device)
        self._outputs: list[Any] = []
        self._train, self._keep, self._schedule = train, keep, schedule
        self._passes: dict[tuple[int, int], _Pass] = {}
        self._made: dict[Message, Any] = {}
        self._local: dict[tuple[str, int, int], Any] = {}
        self._left = sum(i.kind in "BI" for i in schedule.streams[self._stage])
        if self._trace is not None:
            self._trace.clear()
        try:
            self._begin_window()
            for operation in schedule.operations(self._stage):
                if isinstance(operation, Exchange):
                    self._exchange(operation)
                else:
                    self._execute(operation)
            self._mail.finish()
        except BaseException:
            self._mail.drop()
            raise
        if train:
            self._end_window(count)
        if train and self._trace is not None:
            self._trace.finish(schedule)
        return self._total, self._outputs

    def _changed(self, batches: Iterator[Any]) -> Iterator[Any]:
        return batches if self.batch_fn is None else map(self.batch_fn, batches)

    def _begin_window(self) -> None:
        if not self._train:
            return
        if self._tied:
            self._engine.states.defer(self._tied)
        if self._apart is not None:
            self._apart.begin(self._schedule.streams[self._stage])

    def _end_window(self, count: int) -> None:
        if self._tied:
            self._engine.gradients_ready(self._tied, last=True)
        self._engine.step(micro_batches=count)

    # -- messages -----------------------------------------------------------------------------

    def _kind(self, message: Message) -> Kind:
        micro = message.micro_batch
        return Kind(
            message.kind,
            message.chunk if message.kind == "F" else message.chunk - 1,
            self._signatures[micro],
            self._train,
            micro if self._dynamic else None,
        )

    def _exchange(self, exchange: Exchange) -> None:
        self._mail.exchange(
            [(m, self._kind(m), self._made.pop(m)) for m in exchange.sends],
            [(m, self._kind(m)) for m in exchange.receives],
        )

    def _hand_on(self, instruction: Instruction, value: Any) -> None:
        message = self._schedule.sent_by(instruction)
        if message is not None:
            self._made[message] = value
        else:
            self._local[instruction.kind, instruction.micro_batch, instruction.chunk] = value

    def _take(self, instruction: Instruction) -> tuple[Any, list[torch.Tensor]]:
        """What the chunk before (of a backward: behind) has made, and its leaves."""
        message = self._schedule.received_by(instruction)
        if message is not None:
            return self._mail.receive(message)
        step = -1 if instruction.kind == "F" else 1
        key = instruction.kind, instruction.micro_batch, instruction.chunk + step
        value = self._local.pop(key)
        if instruction.kind != "F":
            return value, []
        layout, tensors = take_apart(value)
        cut = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
        return layout.build(cut, self._engine.job.communicator), [t for t in cut if t.requires_grad]

    # -- instructions -------------------------------------------------------------------------

    def _execute(self, instruction: Instruction) -> None:
        if self._trace is not None:
            # What a stage waits for is no part of what it does.
            message = self._schedule.received_by(instruction)
            if message is not None:
                self._mail.wait_for(message)
            self._trace.begin(instruction)
        match instruction.kind:
            case "F":
                self._forward(instruction)
            case "W":
                assert self._apart is not None
                self._apart.compute(instruction)
            case _:
                self._backward(instruction)
        if self._trace is not None:
            self._trace.end(instruction)

    def _forward(self, instruction: Instruction) -> None:
        micro, chunk = instruction.micro_batch, instruction.chunk
        received, leaves = self._take(instruction) if chunk else (None, [])
        batch = self._batches[micro]
        taken: tuple[tuple[Any, ...], dict[str, Any], Any] = (), {}, None
        if batch is not None:
            taken = self._model.inputs(batch, with_loss=self._with_loss)
        args, kwargs, labels = taken
        if chunk and not self._model.needs_inputs:
            args, kwargs = (), {}
        self._model.begin(chunk, received, labels, with_loss=self._with_loss)
        storing = self._apart is not None and self._train
        with self._apart.forward() if storing and self._apart is not None else nullcontext():
            output = self._engine(*args, **kwargs)
        if chunk < self._last:
            outputs = [t for t in take_apart(output)[1] if t.requires_grad]
            self._hand_on(instruction, output)
            found = _Pass(leaves, outputs)
        else:
            found = self._loss(output, leaves)
        if self._train:
            self._passes[micro, chunk] = found

    def _loss(self, output: Any, leaves: list[torch.Tensor]) -> _Pass:
        if self._keep:
            self._outputs.append(pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, output))
        if not self._with_loss:
            return _Pass(leaves, [])
        loss = loss_of(output)
        weight = checked_weight(_loss_weight(output))
        value, counted = loss.detach().reshape(()), 1.0 if weight is None else weight
        total = torch.stack([weighted_loss(value, counted), torch.zeros_like(value) + counted])
        self._total = self._total.to(torch.promote_types(self._total.dtype, total.dtype)) + total
        return _Pass(leaves, [loss], weight)

    def _backward(self, instruction: Instruction) -> None:
        micro, chunk = instruction.micro_batch, instruction.chunk
        done = self._passes.pop((micro, chunk))
        self._left -= 1
        last = self._left == 0
        gradients = self._take(instruction)[0] if chunk < self._last else []
        if self._apart is not None:
            self._apart.begin_backward(instruction)
        if chunk == self._last:
            self._engine.backward(done.outputs[0], weight=done.weight, last=last)
        elif done.outputs:
            self._engine.backward_from(done.outputs, gradients, last=last)
        if self._tied and not last:
            self._engine.gradients_ready(self._tied, last=False)
            self._engine.states.defer(self._tied)
        if chunk:
            back = [torch.zeros_like(x) if x.grad is None else x.grad for x in done.leaves]
            self._hand_on(instruction, back)


def _loss_weight(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return None
    if isinstance(output, dict):
        return output.get("loss_weight")
    return getattr(output, "loss_weight", None)

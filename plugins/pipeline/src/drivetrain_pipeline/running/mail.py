"""Messages between the ranks of a pipeline: values of chunks, and gradients back.

Of each message the receiver has to know shapes and dtypes before it comes. They follow from the
shapes of the micro-batch, whose signature all stages know, so only the first message of a kind
(chunk, direction, signature) has its layout sent ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from drivetrain.contracts import DONE, Purpose, Tag
from drivetrain.errors import TrainingError
from drivetrain_pipeline.running.values import Layout, take_apart

if TYPE_CHECKING:
    from drivetrain.contracts import Handle
    from drivetrain.job.job import Job
    from drivetrain_pipeline.schedules import Message

AXIS = "pp"
_TAG = Tag(Purpose.ACTIVATION, site="pipeline")
_LAYOUT = Tag(Purpose.CONTROL, site="shapes of a pipeline's messages")


@dataclass(frozen=True)
class Kind:
    """What decides the layout of a message.

    Args:
        direction: "F" for values, "B" for gradients of them.
        edge: the chunk whose values these are, or are gradients of.
        signature: of the micro-batch.
        trains: whether values need gradients.
        micro_batch: its number, where shapes depend on values.
    """

    direction: Literal["F", "B"]
    edge: int
    signature: int
    trains: bool
    micro_batch: int | None


class Mail:
    """Sends and receives the values of one job's stages.

    Args:
        job: whose communicator carries them.
        always: send a layout with every message.
    """

    def __init__(self, job: Job, *, always: bool) -> None:
        self._communicator = job.communicator
        self._device = job.device
        self._reading = job.accelerator.control_device(job.ranks.local_rank)
        self._always = always
        self._known: dict[Kind, Layout] = {}
        self._sending: list[tuple[Handle, Sequence[torch.Tensor]]] = []
        self._coming: dict[Message, tuple[Handle, Layout, list[torch.Tensor]]] = {}

    def exchange(
        self,
        sends: Sequence[tuple[Message, Kind, Any]],
        receives: Sequence[tuple[Message, Kind]],
    ) -> None:
        """Start messages; the layouts of those whose kind is new are waited for.

        Args:
            sends: message, kind and value.
            receives: message and kind.

        Raises:
            TrainingError: a value has another layout than an earlier one of its kind.
        """
        parts = [(message, kind, *take_apart(value)) for message, kind, value in sends]
        self._layouts(
            [(m, kind, layout) for m, kind, layout, _ in parts if self._is_new(kind)],
            [(m, kind) for m, kind in receives if self._is_new(kind)],
        )
        out: list[tuple[torch.Tensor, int]] = []
        for message, kind, layout, tensors in parts:
            self._check(message, kind, layout)
            out += [(t.detach().contiguous(), message.target) for t in tensors]
        coming = []
        come: list[tuple[torch.Tensor, int]] = []
        for message, kind in receives:
            layout = self._known[kind]
            tensors = layout.empty(self._device)
            coming.append((message, layout, tensors))
            come += [(tensor, message.source) for tensor in tensors]
        handle = self._communicator.send_receive(out, come, AXIS, _TAG, asynchronous=True)
        for message, layout, tensors in coming:
            self._coming[message] = handle, layout, tensors
        if out:
            self._sending.append((handle, [tensor for tensor, _ in out]))

    def receive(self, message: Message) -> tuple[Any, list[torch.Tensor]]:
        """Wait for a message of an earlier exchange.

        Returns:
            The value, and its tensors that need a gradient, which are leaves of a graph.
        """
        handle, layout, tensors = self._coming.pop(message)
        handle.wait()
        leaves = []
        for tensor, (_, _, needs_gradient) in zip(tensors, layout.tensors, strict=True):
            if needs_gradient and torch.is_grad_enabled():
                leaves.append(tensor.requires_grad_())
        return layout.build(tensors, self._communicator), leaves

    def wait_for(self, message: Message) -> None:
        """Wait for a message of an earlier exchange, and leave it for :meth:`receive`."""
        handle, layout, tensors = self._coming[message]
        handle.wait()
        self._coming[message] = DONE, layout, tensors

    def finish(self) -> None:
        """Wait until everything has left."""
        for handle, _ in self._sending:
            handle.wait()
        self._sending.clear()
        assert not self._coming, f"nothing has taken {next(iter(self._coming))}"

    def drop(self) -> None:
        """Forget what is under way, after an error."""
        self._sending.clear()
        self._coming.clear()

    def _is_new(self, kind: Kind) -> bool:
        return kind.direction == "F" and (self._always or kind not in self._known)

    def _check(self, message: Message, kind: Kind, layout: Layout) -> None:
        if self._known[kind] != layout:
            raise TrainingError(
                f"pipeline: what chunk {message.chunk} makes of micro-batch {message.micro_batch} "
                f"has other shapes than before, with a micro-batch of the same shapes: "
                f"{_shapes(layout)}, before {_shapes(self._known[kind])}; where shapes depend on "
                "values, set pipeline.dynamic_shape"
            )

    def _layouts(
        self,
        sends: Sequence[tuple[Message, Kind, Layout]],
        receives: Sequence[tuple[Message, Kind]],
    ) -> None:
        """Exchange the layouts of messages: lengths first, then text."""
        if not sends and not receives:
            return
        texts = [bytearray(layout.to_bytes()) for _, _, layout in sends]
        lengths = [torch.zeros(1, dtype=torch.int64, device=self._reading) for _ in receives]
        self._move(
            [torch.tensor([len(text)], device=self._reading) for text in texts],
            [message.target for message, _, _ in sends],
            lengths,
            [message.source for message, _ in receives],
        )
        bodies = [
            torch.empty(int(length), dtype=torch.uint8, device=self._reading) for length in lengths
        ]
        self._move(
            [torch.frombuffer(text, dtype=torch.uint8).to(self._reading) for text in texts],
            [message.target for message, _, _ in sends],
            bodies,
            [message.source for message, _ in receives],
        )
        for (_, kind), body in zip(receives, bodies, strict=True):
            self._learn(kind, Layout.from_bytes(bytes(body.tolist())))
        for _, kind, layout in sends:
            self._learn(kind, layout)

    def _learn(self, kind: Kind, layout: Layout) -> None:
        """Note a layout of values, and that of their gradients."""
        self._known[kind] = layout
        back = tuple((dtype, shape, False) for dtype, shape, needs in layout.tensors if needs)
        self._known[replace(kind, direction="B")] = Layout.of_list(back)

    def _move(
        self,
        sends: Sequence[torch.Tensor],
        targets: Sequence[int],
        receives: Sequence[torch.Tensor],
        sources: Sequence[int],
    ) -> None:
        out = list(zip(sends, targets, strict=True))
        come = list(zip(receives, sources, strict=True))
        handle = self._communicator.send_receive(out, come, AXIS, _LAYOUT, asynchronous=True)
        if come:
            handle.wait()
        if out:
            self._sending.append((handle, sends))


def _shapes(layout: Layout) -> list[tuple[int, ...]]:
    return [shape for _, shape, _ in layout.tensors]

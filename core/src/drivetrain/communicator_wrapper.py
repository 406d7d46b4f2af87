"""The base of communicator decorators: it hands everything on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from drivetrain.communicator import Communicator, Handle, Op, Tag

if TYPE_CHECKING:
    import torch

    from drivetrain.mesh_layout import Axis


class CommunicatorWrapper(Communicator):
    """Delegates to ``inner``; a decorator overrides what it changes.

    Args:
        inner: the communicator to decorate.
    """

    def __init__(self, inner: Communicator) -> None:
        self.inner = inner

    def size(self, axis: Axis) -> int:
        return self.inner.size(axis)

    def rank(self, axis: Axis) -> int:
        return self.inner.rank(axis)

    def all_reduce(
        self,
        tensor: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        op: Op = Op.SUM,
        asynchronous: bool = False,
    ) -> Handle:
        return self.inner.all_reduce(tensor, axis, tag, op=op, asynchronous=asynchronous)

    def reduce_scatter(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        op: Op = Op.SUM,
        asynchronous: bool = False,
    ) -> Handle:
        return self.inner.reduce_scatter(output, input, axis, tag, op=op, asynchronous=asynchronous)

    def all_gather(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        asynchronous: bool = False,
    ) -> Handle:
        return self.inner.all_gather(output, input, axis, tag, asynchronous=asynchronous)

    def broadcast(
        self,
        tensor: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        source: int = 0,
        asynchronous: bool = False,
    ) -> Handle:
        return self.inner.broadcast(tensor, axis, tag, source=source, asynchronous=asynchronous)

    def all_to_all(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        asynchronous: bool = False,
    ) -> Handle:
        return self.inner.all_to_all(
            output,
            input,
            axis,
            tag,
            output_splits=output_splits,
            input_splits=input_splits,
            asynchronous=asynchronous,
        )

    def send(
        self, tensor: torch.Tensor, axis: Axis, tag: Tag, *, to: int, asynchronous: bool = False
    ) -> Handle:
        return self.inner.send(tensor, axis, tag, to=to, asynchronous=asynchronous)

    def receive(
        self, tensor: torch.Tensor, axis: Axis, tag: Tag, *, source: int, asynchronous: bool = False
    ) -> Handle:
        return self.inner.receive(tensor, axis, tag, source=source, asynchronous=asynchronous)

    def barrier(self, axis: Axis, tag: Tag) -> None:
        self.inner.barrier(axis, tag)

    def buffer(self, numel: int, dtype: torch.dtype, axis: Axis) -> torch.Tensor:
        return self.inner.buffer(numel, dtype, axis)

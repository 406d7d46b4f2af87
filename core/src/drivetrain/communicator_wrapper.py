"""The base of communicator decorators: it hands everything on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain.communicator import Communicator, Handle, Tag

if TYPE_CHECKING:
    import torch

    from drivetrain.mesh_layout import Axis


class CommunicatorWrapper(Communicator):
    """Delegates to ``inner``; a decorator overrides what it changes.

    Keywords are handed on as they come, so that they are documented in one place.

    Args:
        inner: the communicator to decorate.
    """

    def __init__(self, inner: Communicator) -> None:
        self.inner = inner

    def size(self, axis: Axis) -> int:
        return self.inner.size(axis)

    def rank(self, axis: Axis) -> int:
        return self.inner.rank(axis)

    def all_reduce(self, tensor: torch.Tensor, axis: Axis, tag: Tag, **options: Any) -> Handle:
        return self.inner.all_reduce(tensor, axis, tag, **options)

    def reduce_scatter(
        self, output: torch.Tensor, input: torch.Tensor, axis: Axis, tag: Tag, **options: Any
    ) -> Handle:
        return self.inner.reduce_scatter(output, input, axis, tag, **options)

    def all_gather(
        self, output: torch.Tensor, input: torch.Tensor, axis: Axis, tag: Tag, **options: Any
    ) -> Handle:
        return self.inner.all_gather(output, input, axis, tag, **options)

    def broadcast(self, tensor: torch.Tensor, axis: Axis, tag: Tag, **options: Any) -> Handle:
        return self.inner.broadcast(tensor, axis, tag, **options)

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, axis: Axis, tag: Tag, **options: Any
    ) -> Handle:
        return self.inner.all_to_all(output, input, axis, tag, **options)

    def send(self, tensor: torch.Tensor, axis: Axis, tag: Tag, **options: Any) -> Handle:
        return self.inner.send(tensor, axis, tag, **options)

    def receive(self, tensor: torch.Tensor, axis: Axis, tag: Tag, **options: Any) -> Handle:
        return self.inner.receive(tensor, axis, tag, **options)

    def barrier(self, axis: Axis, tag: Tag) -> None:
        self.inner.barrier(axis, tag)

    def buffer(self, numel: int, dtype: torch.dtype, axis: Axis) -> torch.Tensor:
        return self.inner.buffer(numel, dtype, axis)

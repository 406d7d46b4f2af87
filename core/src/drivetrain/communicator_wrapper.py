"""The base of communicator decorators: it hands everything on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain.communicator import Communicator, Handle, Tag

if TYPE_CHECKING:
    import torch

    from drivetrain.mesh_layout import Axis


class CommunicatorWrapper(Communicator):
    """Delegates to ``inner``; a decorator overrides what it changes.

    Collectives take what those of :class:`Communicator` take, and hand it on as it comes.

    Args:
        inner: the communicator to decorate.
    """

    def __init__(self, inner: Communicator) -> None:
        self.inner = inner

    def size(self, axis: Axis) -> int:
        return self.inner.size(axis)

    def rank(self, axis: Axis) -> int:
        return self.inner.rank(axis)

    def all_reduce(self, *arguments: Any, **options: Any) -> Handle:
        return self.inner.all_reduce(*arguments, **options)

    def reduce_scatter(self, *arguments: Any, **options: Any) -> Handle:
        return self.inner.reduce_scatter(*arguments, **options)

    def all_gather(self, *arguments: Any, **options: Any) -> Handle:
        return self.inner.all_gather(*arguments, **options)

    def broadcast(self, *arguments: Any, **options: Any) -> Handle:
        return self.inner.broadcast(*arguments, **options)

    def all_to_all(self, *arguments: Any, **options: Any) -> Handle:
        return self.inner.all_to_all(*arguments, **options)

    def send(self, *arguments: Any, **options: Any) -> Handle:
        return self.inner.send(*arguments, **options)

    def receive(self, *arguments: Any, **options: Any) -> Handle:
        return self.inner.receive(*arguments, **options)

    def barrier(self, axis: Axis, tag: Tag) -> None:
        self.inner.barrier(axis, tag)

    def buffer(self, numel: int, dtype: torch.dtype, axis: Axis) -> torch.Tensor:
        return self.inner.buffer(numel, dtype, axis)

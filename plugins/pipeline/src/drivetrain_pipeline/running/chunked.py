"""What a runner needs of a model that was split."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

ATTRIBUTE = "drivetrain_chunks"
"""Attribute of the engine's module that has its :class:`ChunkedModel`."""


class Around(Protocol):
    """Calls what is called beside the modules of layers, such as functions."""

    def __call__(
        self,
        layer: str,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        parameters: Iterable[nn.Parameter] = (),
        is_loss: bool = False,
    ) -> Any:
        """Return ``run(*args)``.

        Args:
            layer: name of the layer that it is, or behind which it comes.
            run: a function, or a module that several layers share.
            args: its arguments.
            parameters: that it trains.
            is_loss: it is the loss, which is no layer.
        """


class ChunkedModel(Protocol):
    """Runs one chunk of a model at a time, in the engine's forward.

    Attributes:
        needs_inputs: whether every chunk takes the inputs of the micro-batch; else the first alone
            does, and the last takes the labels.
    """

    needs_inputs: bool

    @property
    def chunks(self) -> int:
        """Number of chunks of the whole model."""

    def begin(
        self, chunk: int, received: Any, labels: Any = None, *, with_loss: bool = True
    ) -> None:
        """Say what the next forward of the module is of.

        Args:
            chunk: number of the chunk, along the model; one of this rank's.
            received: what the chunk before has returned; ``None`` for the first.
            labels: of the micro-batch, for the last chunk of a model that has them apart.
            with_loss: the last chunk returns the loss, where the model has that apart.
        """

    def partitions(self) -> list[int]:
        """The first layer of each chunk, and the number of layers."""

    def layers_by_name(self) -> dict[str, nn.Module | None]:
        """All layers of the model, in order; ``None`` for those of other stages."""

    def inputs(
        self, batch: Any, *, with_loss: bool = True
    ) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Take a micro-batch apart: arguments and keywords of the module, and labels."""

    def watch_calls(self, around: Around | None) -> None:
        """From now on call layers without a module of their own, and the loss, through ``around``.

        Args:
            around: is given what to call; ``None``: nothing is between any more.
        """

"""Where chunks that are not computed with wait: in host memory, or where they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch

from drivetrain_sequence.chunks.alike import is_rehearsed

if TYPE_CHECKING:
    from drivetrain.contracts import Accelerator

Chunk = tuple[torch.Tensor, ...]


class Elsewhere:
    """Keeps chunks, and brings them back one ahead of their use.

    With streams, copies run beside the device's work: the next chunk is on its way while the one
    before is computed with, so two of them are on the device at a time. Without streams a copy has
    ended when the call returns, and on a host the second buffer is the memory itself.

    Args:
        accelerator: makes the stream and locks pages.
        device: where chunks are computed with.
        offload: keep chunks in host memory.
    """

    def __init__(self, accelerator: Accelerator, device: torch.device, offload: bool) -> None:
        self._accelerator = accelerator
        self._device = device
        self._away = offload and accelerator.device_type != "cpu"
        self._stream = accelerator.stream() if self._away else None

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of ``x`` that :meth:`each` brings back."""
        x = x.detach()
        if not self._away:
            return x.clone(memory_format=torch.contiguous_format)
        kept = self._accelerator.pin_memory(torch.empty(x.shape, dtype=x.dtype))
        self._write(kept, x)
        return kept

    def keep_whole(self, x: torch.Tensor) -> torch.Tensor:
        """The like for what somebody else holds anyway, of which a host needs no copy."""
        return self.keep(x) if self._away else x

    def zeros(self, kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Zeros of the shape of something kept, in the same memory."""
        make = torch.empty if is_rehearsed(self._device) else torch.zeros  # which would take memory
        found = make(kept.shape, dtype=dtype, device=kept.device)
        return self._accelerator.pin_memory(found) if self._away else found

    def add(self, kept: torch.Tensor, here: torch.Tensor, x: torch.Tensor) -> None:
        """Add ``x`` to ``kept``, of which ``here`` is what :meth:`each` has brought."""
        here += x
        if self._away:
            self._write(kept, here)

    def alike(self, times: int) -> AbstractContextManager[Any]:
        """What runs in the context stands for so many runs, of chunks without memory."""
        return self._accelerator.alike(times)

    def each(self, chunks: Iterable[Chunk], times: Iterable[int] = repeat(1)) -> Iterator[Chunk]:
        """Bring each of ``chunks`` to the device while the one before it is in use.

        Args:
            chunks: tensors that were kept.
            times: how many chunks each of them stands for; more than itself in a rehearsal only.
        """
        waiting: list[tuple[Chunk, Any]] = []
        for chunk, count in zip(chunks, times, strict=False):
            with self.alike(count):
                waiting.append(self._fetch(chunk))
            if len(waiting) == 2:
                yield self._arrived(*waiting.pop(0))
        for one in waiting:
            yield self._arrived(*one)

    def settle(self) -> None:
        """Wait until all that is kept can be read by anybody."""
        if self._stream is not None:
            self._stream.synchronize()

    def _fetch(self, chunk: Chunk) -> tuple[Chunk, Any]:
        if not self._away:
            return chunk, None
        with self._accelerator.on_stream(self._stream):
            here = tuple(x.to(self._device, non_blocking=True) for x in chunk)
            return here, None if self._stream is None else self._stream.record_event()

    def _arrived(self, here: Chunk, event: Any) -> Chunk:
        if event is not None:
            event.wait()
            current = torch.get_device_module(self._device.type).current_stream()
            for x in here:
                x.record_stream(current)
        return here

    def _write(self, kept: torch.Tensor, x: torch.Tensor) -> None:
        if x.is_meta:  # a rehearsal, which has no values
            return
        if self._stream is None:
            kept.copy_(x)
            return
        made = torch.get_device_module(self._device.type).current_stream().record_event()
        with self._accelerator.on_stream(self._stream):
            made.wait()
            kept.copy_(x, non_blocking=True)
            x.record_stream(self._stream)

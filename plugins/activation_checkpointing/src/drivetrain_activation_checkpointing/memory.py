"""Memory in which saved inputs wait: on the device or the host, alone or side by side."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from drivetrain.contracts import Accelerator

logger = logging.getLogger("drivetrain.activation_checkpointing")

_ALIGNMENT = 256
_LEAVING = 2
"""Copies to the host that may be under way before the next one waits for the oldest."""


class Memory:
    """Buffers by size, which are used again if they are contiguous or the host's.

    Args:
        device: where the buffers are.
        slots: buffers of one size that are allocated as one; ``None``: each alone.
        accelerator: locks the pages of the host's; ``None`` on the device.
    """

    def __init__(
        self, device: torch.device, slots: int | None, accelerator: Accelerator | None
    ) -> None:
        self._device = device
        self._slots = slots
        self._accelerator = accelerator
        self._free: dict[int, deque[tuple[torch.Tensor, Any]]] = defaultdict(deque)
        self._begun: set[int] = set()
        self._said_full = False
        # Buffers come back whenever a graph is freed, in the middle of anything.
        self._lock = threading.RLock()

    def take(self, nbytes: int) -> tuple[torch.Tensor, Any]:
        """A buffer of at least ``nbytes`` of uint8, and the end of its last use as an event."""
        size = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            free = self._free[size]
            if not free and self._slots is not None:
                if size in self._begun:
                    self._say_full(size)
                else:
                    self._begun.add(size)
                    whole = self._new(size * self._slots)
                    free.extend((part, None) for part in whole.view(self._slots, size))
            return free.popleft() if free else (self._new(size), None)

    def give(self, buffer: torch.Tensor, end: Any) -> None:
        """Take a buffer back, whose last use ends with the event ``end``, if that is not over."""
        if self._slots is not None or self._accelerator is not None:
            with self._lock:
                self._free[buffer.numel()].append((buffer, end))

    def clear(self) -> None:
        """Give up what is not in use."""
        with self._lock:
            self._free.clear()
            self._begun.clear()

    def _say_full(self, size: int) -> None:
        if not self._said_full:
            self._said_full = True
            logger.warning(
                "activation_checkpointing: more than number_checkpoints (%s) inputs of %d bytes "
                "are saved at a time, so that the rest lies elsewhere",
                self._slots,
                size,
            )

    def _new(self, nbytes: int) -> torch.Tensor:
        plain = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return plain if self._accelerator is None else self._accelerator.pin_memory(plain)


class Copies:
    """Copies from the device to the host beside the device's work, and back.

    Args:
        accelerator: makes the stream; without streams, copies end before they return.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._stream = accelerator.stream()
        self._leaving: deque[tuple[Any, torch.Tensor]] = deque()

    def to_host(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        """Begin to copy; return an event, or ``None`` if it is over.

        The source's memory is held until it is copied: what computes may not write there.
        """
        if self._stream is None:
            target.copy_(source)
            return None
        before = self._mark()
        with self._accelerator.on_stream(self._stream):
            for event in (before, after):
                if event is not None:
                    event.wait()
            target.copy_(source, non_blocking=True)
            end = self._stream.record_event()
        self._leaving.append((end, source))
        self._let_go(_LEAVING)
        return end

    def to_device(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        """Copy in the order of the device's work; return an event, or ``None`` if it is over."""
        self._let_go(0)
        if after is not None:
            after.wait()
        target.copy_(source, non_blocking=True)
        return self._mark()

    def _let_go(self, under_way: int) -> None:
        while len(self._leaving) > under_way:
            self._leaving.popleft()[0].synchronize()

    def _mark(self) -> Any:
        if self._stream is None:
            return None
        module = torch.get_device_module(self._accelerator.device_type)
        return module.current_stream().record_event()

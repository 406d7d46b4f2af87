"""What a chunk's forward depends on beside its arguments: random numbers and autocast."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain.job.random_streams import StreamPositions


class Draws:
    """Random numbers of the chunks of one forward of a block, the same in every repetition.

    Each chunk draws from a generator of its own, seeded by a hash of where the default generator
    is and the chunk's number, since chunks of which a part is repeated would draw the same numbers
    one after the other.

    Args:
        job: whose streams of random numbers and device it is.
        draws: false where nothing is drawn, as in evaluation.
    """

    def __init__(self, job: Job, draws: bool) -> None:
        self._job = job
        self._device = torch.device("cpu") if job.device.type == "meta" else job.device
        self._positions: dict[int, StreamPositions] = {}
        self._base: bytes | None = None
        if draws:
            self._base = bytes(_state(self._device).tolist())
            torch.empty(1, device=self._device).uniform_()  # the next block begins elsewhere

    @contextmanager
    def of(self, chunk: int) -> Iterator[None]:
        """Draw what this chunk draws, from the beginning."""
        if self._base is None:
            yield
            return
        digest = hashlib.sha256(self._base + str(chunk).encode()).digest()
        seed = int.from_bytes(digest[:8], "little") >> 1  # torch takes signed integers
        now = _state(self._device)
        with ExitStack() as around:
            around.callback(_set_state, self._device, now)
            if chunk in self._positions:
                around.enter_context(self._job.random.repeat(self._positions[chunk]))
            else:
                self._positions[chunk] = self._job.random.positions()
            generator = torch.Generator(self._device).manual_seed(seed)
            _set_state(self._device, generator.get_state())
            yield


class Casts:
    """The autocast that surrounds a forward; without its cache, as gradients need casts again.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._kind = "cpu" if device.type == "meta" else device.type  # which has no autocast
        self._enabled = torch.is_autocast_enabled(self._kind)
        self._dtype = torch.get_autocast_dtype(self._kind)

    def again(self) -> Any:
        """The same as a context."""
        return torch.autocast(self._kind, self._dtype, self._enabled, cache_enabled=False)

    def none(self) -> Any:
        """No autocast, as in backward."""
        return torch.autocast(self._kind, enabled=False)


def _state(device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    state: torch.Tensor = torch.get_device_module(device.type).get_rng_state(device)
    return state


def _set_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device.type).set_rng_state(state, device)

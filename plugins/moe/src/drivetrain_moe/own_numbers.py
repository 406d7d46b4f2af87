"""Random numbers of experts on ranks whose default generators are equal.

Ranks along ``tp`` draw the same numbers for what they compute in common. Where they share out
experts, each computes other tokens: experts that draw, as dropout does in a module or in a call,
would take the generators of these ranks to different places.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class OwnNumbers:
    """A stream of one rank's own, made from the default generator that equal ranks have.

    The default generator is advanced by one number, on every rank. All else follows from where it
    was, so that whatever repeats a forward in backward, and restores that generator first, repeats
    these numbers as well. On a host this takes some 30 microseconds.

    Args:
        device: where experts draw.
        rank: of those that have the same generator.
    """

    def __init__(self, device: torch.device, rank: int) -> None:
        self._device = torch.device("cpu") if device.type == "meta" else device
        begin = default_state(self._device)
        torch.rand(1, device=self._device)
        digest = hashlib.blake2b(begin.numpy().tobytes() + rank.to_bytes(4, "little"))
        self._own = torch.Generator(self._device)
        self._own.manual_seed(int.from_bytes(digest.digest()[:8], "little") >> 1)

    def around(self, compute: Compute) -> Compute:
        """``compute``, which draws from this stream, and goes on in it the next time."""

        def drawing(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
            before = default_state(self._device)
            set_default_state(self._device, self._own.get_state())
            try:
                return compute(rows, counts)
            finally:
                self._own.set_state(default_state(self._device))
                set_default_state(self._device, before)

        return drawing


def default_state(device: torch.device) -> torch.Tensor:
    """Where the generator is that draws on ``device`` without a name."""
    if device.type == "cpu":
        return torch.get_rng_state()
    state: torch.Tensor = torch.get_device_module(device.type).get_rng_state(device)
    return state


def set_default_state(device: torch.device, state: torch.Tensor) -> None:
    """Have that generator go on from ``state``."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device.type).set_rng_state(state, device)

"""Sums of gradients that do not depend on their order.

[Note: exact sums] Numbers that are all multiples of one unit ``2**q``, and whose sums stay below
``2**(q + 53)``, are added in float64 without any rounding: float64 is then an integer. So every
gradient is rounded to a multiple of the unit *before* it is added to anything. Which gradients
there are depends on the micro-batches alone, and what their sum is on nothing else.

All ranks, and all layouts, have to agree on the unit before the first gradient of a window is
there. It follows from the norm of the window before, which all of them know bit for bit (see
:mod:`drivetrain_exact.norm`): no element is larger than the norm, and it may grow by ``headroom``
powers of two. With 8 of them the unit is 2**-43 of the norm. A window in which a gradient was
larger is known at its end on all ranks, is skipped like one that overflows in fp16, and teaches the
next one its unit. The first window has no norm before it and begins with a guess.

The idea of rounding before adding is that of Demmel and Nguyen, "Fast Reproducible Floating-Point
Summation" (ARITH 2013), section III; that the unit is agreed on one window ahead is our own, and
makes it cost one pass over each gradient.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import nn

_BITS = 53
"""Bits of a float64's significand."""

FIRST_EXPONENT = 12
"""Sums of gradients of the first window are expected below ``2**12`` times what scales them."""


class Quantum:
    """The unit of one engine's gradients, and what has been seen of them in this window.

    Args:
        headroom: powers of two that a sum may grow beyond the norm of the window before.
        device: where gradients are.

    Attributes:
        exponent: sums of this window are below ``2**exponent``.
    """

    def __init__(self, headroom: int, device: torch.device) -> None:
        self.exponent: int | None = None
        self._headroom = headroom
        self._device = device
        self._next: int | None = None
        self._largest = torch.zeros((), dtype=torch.float64, device=device)
        self._times: Counter[nn.Parameter] = Counter()

    @property
    def unit(self) -> float:
        """What every gradient is a multiple of."""
        assert self.exponent is not None, "the first window has begun"
        return math.ldexp(1.0, self.exponent - _BITS + 2)

    def begin(self, scale: float) -> None:
        """Before the first backward of a run, whose gradients are multiplied by ``scale``."""
        if self.exponent is None:
            self.exponent = FIRST_EXPONENT + math.frexp(scale)[1]

    def receive(self, parameter: nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
        """Return ``gradient`` in float64, each element rounded to a multiple of the unit."""
        self._times[parameter] += 1
        if gradient.numel():
            # In one pass: a norm of infinite order takes twenty times as long on a CPU.
            low, high = torch.aminmax(gradient)  # NaN if one element is
            self._largest = torch.maximum(self._largest, torch.maximum(high, -low).double())
        exact = gradient.double()  # a copy: no parameter is in float64
        # Adding and taking away 1.5 * 2**52 units leaves no digits below one unit; what is that
        # large itself is beyond the limit, and its window is skipped.
        shift = 1.5 * self.unit * 2.0**52
        return exact.add_(shift).sub_(shift)

    def seen(self) -> torch.Tensor:
        """[2] in float64, of which ranks take the maximum: largest element, and how many terms.

        The largest is infinite if some gradient was not finite.
        """
        times = max(self._times.values(), default=0)
        largest = torch.nan_to_num(self._largest, nan=math.inf, posinf=math.inf)
        return torch.stack([largest, torch.full_like(largest, times)])

    def fits(self, largest: float, times: float) -> bool:
        """Whether sums of so many terms, none of them larger, are without rounding.

        What is not finite is left to whoever checks gradients, so it fits.
        """
        assert self.exponent is not None
        return math.isinf(largest) or largest * times < math.ldexp(1.0, self.exponent + 1)

    def learn(self, norm: float) -> None:
        """Choose the next window's unit by the norm of this window's sums."""
        if math.isfinite(norm) and norm > 0:
            self._next = math.frexp(norm)[1] + self._headroom

    def resume(self, exponent: int | None) -> None:
        """Go on from a checkpoint; ``None`` begins like the first window."""
        self.exponent = self._next = None
        self.end()
        self.exponent = exponent

    def end(self) -> None:
        """Begin another window."""
        if self._next is not None:
            self.exponent, self._next = self._next, None
        self._largest = torch.zeros_like(self._largest)
        self._times.clear()

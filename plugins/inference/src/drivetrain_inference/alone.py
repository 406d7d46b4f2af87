"""Small steps between two forwards, in parts for which torch wakes no other threads.

Its threads spin for milliseconds after each time that they were used, on cores which the threads
of the next forward need.
"""

from __future__ import annotations

import torch

_PART = 1 << 14
"""Elements that torch works through in one thread; it is half of what it gives each."""
_MOST = 16
"""Parts up to which their calls cost less than the threads do."""


def as_float32(values: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of ``values`` in float32."""
    if values.numel() > _MOST * _PART:
        return values.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    copied = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    parts = zip(*(torch.split(each.reshape(-1), _PART) for each in (copied, values)), strict=True)
    for to, part in parts:
        to.copy_(part)
    return copied


def highest(rows: torch.Tensor) -> torch.Tensor:
    """The place of each row's largest number, as ``torch.argmax(rows, dim=1)`` has it."""
    if rows.device.type != "cpu" or not 0 < rows.numel() <= _MOST * _PART:
        return torch.argmax(rows, dim=1)
    width = max(1, _PART // len(rows))
    parts = [part.max(dim=1) for part in torch.split(rows, width, dim=1)]
    best = torch.stack([part.values for part in parts]).argmax(dim=0)
    places = torch.stack([part.indices for part in parts])
    return best * width + places.gather(0, best[None])[0]

"""One number for all weights and optimizer states of an engine, whatever its layout.

Every element counts by its bits, its place in the client's tensor and the tensor's name, and the
numbers of all elements are added modulo 2**64. So ranks add up what they have in any order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import Purpose, Tag

if TYPE_CHECKING:
    from drivetrain.contracts import Fragment
    from drivetrain.engine.engine import Engine

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def state_hash(engine: Engine, *, states: bool = True) -> str:
    """16 hexadecimal digits that two engines have in common if all their numbers are the same.

    Also with other numbers of ranks, other ZeRO stages and other homes. It finds accidents; who
    wants to can make two states of one hash. Collective.

    Args:
        engine: whose parameters, buffers, masters and optimizer states are taken.
        states: ``False`` takes the parameters alone.
    """
    engine.states.flush()
    total = torch.zeros((), dtype=torch.int64)
    for fragment in engine.states.fragments():
        wanted = states or fragment.kind == "parameter"
        reset = fragment.on_reshape == "reset"
        if fragment.owner and wanted and not reset and fragment.kind != "gradient":
            for part in _numbers(fragment):
                total += part.sum()
    total = total.to(engine.device)
    tag = Tag(Purpose.CONTROL, site="hash of the state")
    engine.job.communicator.all_reduce(total, "world", tag)
    return f"{int(total) % (1 << 64):016x}"


def _numbers(fragment: Fragment) -> Iterator[torch.Tensor]:
    """A number for every element that is kept here."""
    digest = hashlib.sha256(repr((fragment.name, fragment.kind)).encode()).digest()
    salt = int.from_bytes(digest[:8], "little", signed=True)
    shape = fragment.global_shape
    flat = fragment.read().detach().cpu()
    for box in fragment.boxes:
        values = flat.narrow(0, box.local_offset, box.numel)
        if values.is_complex():
            values = torch.view_as_real(values)
        bits = values.contiguous().view(_INTEGERS[values.element_size()]).to(torch.int64)
        place = torch.zeros((), dtype=torch.int64)
        for extent, start, size in zip(shape, box.global_offset, box.size, strict=True):
            place = place.unsqueeze(-1) * extent + torch.arange(start, start + size)
        places = place.reshape(-1)
        for part in bits.view(places.numel(), -1).unbind(1):
            yield _mixed(_mixed(places + salt) ^ part)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """A permutation of 64-bit integers without visible structure (SplitMix64's last step)."""
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right; torch's keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)

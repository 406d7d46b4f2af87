"""How the ranks agree on a name, and on whether something went wrong on any of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts.world.collective import Op, Purpose, Tag

if TYPE_CHECKING:
    from drivetrain.contracts.world.axis import Axis
    from drivetrain.job.job import Job

_TAG = Tag(Purpose.CONTROL, site="checkpoint agreement")
_TEXT = 1024
"""Bytes of a message that all ranks get; more is cut off."""


def text_of(job: Job, rank: int, text: str) -> str:
    """One rank's text, on every rank. Collective.

    Args:
        job: whose ranks.
        rank: the rank whose text counts; the others' is ignored.
        text: of this rank.
    """
    data = torch.zeros(_TEXT, dtype=torch.int64)
    if job.rank == rank:
        own = torch.frombuffer(bytearray(_encoded(text)[:_TEXT] or b"\0"), dtype=torch.uint8)
        data[: own.numel()] = own
    return bytes(_max(job, data).tolist()).rstrip(b"\0").decode(errors="ignore")


def worst(job: Job, problem: str | None) -> str | None:
    """A problem that any rank has, on every rank; ``None`` when no rank has one. Collective."""
    rank = job.rank if problem is not None else -1
    culprit = int(_max(job, torch.tensor([rank])))
    if culprit < 0:
        return None
    text = text_of(job, culprit, problem or "")
    return text if job.world_size == 1 else f"rank {culprit}: {text}"


def same_everywhere(job: Job, *texts: str, axes: Sequence[Axis] = ("world",)) -> list[bool]:
    """For each text, whether all ranks along ``axes`` have the same one. Collective."""
    numbers = [int.from_bytes(hashlib.sha256(_encoded(t)).digest()[:7], "big") for t in texts]
    values = torch.tensor(numbers, dtype=torch.int64)
    high, low = _max(job, torch.cat([values, -values]), axes).chunk(2)
    same: list[bool] = (high == -low).tolist()
    return same


def texts_along(job: Job, axis: Axis, text: str, site: str = _TAG.site) -> list[str]:
    """The texts of all ranks along ``axis``, in their order. Collective.

    Args:
        job: whose ranks.
        axis: along which they are.
        text: of this rank.
        site: what a rank is said to be at that waits here for others.
    """
    tag = Tag(Purpose.CONTROL, site=site)
    own = torch.tensor(list(_encoded(text)), dtype=torch.uint8)
    padded = own.new_zeros(int(_max(job, torch.tensor([own.numel()]), (axis,), tag))).to(job.device)
    padded[: own.numel()] = own
    every = padded.new_empty(padded.numel() * job.mesh.size(axis))
    job.communicator.all_gather(every, padded, axis, tag)
    rows = every.cpu().view(job.mesh.size(axis), -1)
    return [bytes(row.numpy()).rstrip(b"\0").decode() for row in rows]


def any_rank(job: Job, flags: Sequence[bool]) -> list[bool]:
    """For each flag, whether it is set on any rank. Collective."""
    united: list[bool] = _max(job, torch.tensor(flags, dtype=torch.int64)).bool().tolist()
    return united


def _encoded(text: str) -> bytes:
    """UTF-8, also of names of files that are no text."""
    return text.encode(errors="backslashreplace")


def _max(
    job: Job, values: torch.Tensor, axes: Sequence[Axis] = ("world",), tag: Tag = _TAG
) -> torch.Tensor:
    united = values.to(job.device)
    for axis in axes:
        job.communicator.all_reduce(united, axis, tag, op=Op.MAX)
    return values if united.is_meta else united.cpu()  # ranks in a rehearsal are as this one

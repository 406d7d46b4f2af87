"""How the ranks agree on a name, and on whether something went wrong on any of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts.world.collective import Op, Purpose, Tag

if TYPE_CHECKING:
    from drivetrain.checkpoint.subject import Subject

_TEXT = 1024
"""Bytes of a message that all ranks get; more is cut off."""


def text_of(engine: Subject, rank: int, text: str) -> str:
    """One rank's text, on every rank. Collective.

    Args:
        engine: whose job's ranks.
        rank: the rank whose text counts; the others' is ignored.
        text: of this rank.
    """
    data = torch.zeros(_TEXT, dtype=torch.int64)
    if engine.job.rank == rank:
        own = torch.frombuffer(bytearray(_encoded(text)[:_TEXT] or b"\0"), dtype=torch.uint8)
        data[: own.numel()] = own
    return bytes(_max(engine, data).tolist()).rstrip(b"\0").decode(errors="ignore")


def worst(engine: Subject, problem: str | None) -> str | None:
    """A problem that any rank has, on every rank; ``None`` when no rank has one. Collective."""
    rank = engine.job.rank if problem is not None else -1
    culprit = int(_max(engine, torch.tensor([rank])))
    if culprit < 0:
        return None
    text = text_of(engine, culprit, problem or "")
    return text if engine.job.world_size == 1 else f"rank {culprit}: {text}"


def same_everywhere(engine: Subject, *texts: str) -> list[bool]:
    """For each text, whether all ranks have the same one. Collective."""
    numbers = [int.from_bytes(hashlib.sha256(_encoded(t)).digest()[:7], "big") for t in texts]
    values = torch.tensor(numbers, dtype=torch.int64)
    high, low = _max(engine, torch.cat([values, -values])).chunk(2)
    same: list[bool] = (high == -low).tolist()
    return same


def any_rank(engine: Subject, flags: Sequence[bool]) -> list[bool]:
    """For each flag, whether it is set on any rank. Collective."""
    united: list[bool] = _max(engine, torch.tensor(flags, dtype=torch.int64)).bool().tolist()
    return united


def _encoded(text: str) -> bytes:
    """UTF-8, also of names of files that are no text."""
    return text.encode(errors="backslashreplace")


def _max(engine: Subject, values: torch.Tensor) -> torch.Tensor:
    values = values.to(engine.device)
    tag = Tag(Purpose.CONTROL, site="checkpoint agreement")
    engine.job.communicator.all_reduce(values, "world", tag, op=Op.MAX)
    return values.cpu()

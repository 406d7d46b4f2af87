"""Texts that ranks tell each other while a job is put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import Purpose, Tag

if TYPE_CHECKING:
    from drivetrain.contracts import Communicator
    from drivetrain.job.job import Job

_TAG = Tag(Purpose.CONTROL, site="routes")

_WIDTH = 512
"""Bytes of a rank's text; what is longer is cut."""


def texts_of_ranks(job: Job, inner: Communicator, own: str) -> list[str]:
    """The text of every rank, by rank. Collective.

    Args:
        job: whose ranks they are.
        inner: carries the texts.
        own: this rank's; no more than 512 bytes of it travel.
    """
    body = own.encode()[:_WIDTH]
    row = torch.zeros(_WIDTH, dtype=torch.uint8)
    row[: len(body)] = torch.tensor(list(body), dtype=torch.uint8)
    rows = torch.empty(job.world_size * _WIDTH, dtype=torch.uint8, device=job.device)
    inner.all_gather(rows, row.to(job.device), "world", _TAG)
    return [
        bytes(r.tolist()).rstrip(b"\0").decode(errors="replace")
        for r in rows.cpu().view(job.world_size, _WIDTH)
    ]


def text_of_first(job: Job, inner: Communicator, text: str) -> str:
    """Rank 0's text, of any length, on every rank. Collective."""
    body = text.encode()
    length = torch.tensor([len(body)], dtype=torch.int64, device=job.device)
    inner.broadcast(length, "world", _TAG)
    data = torch.zeros(max(1, int(length)), dtype=torch.uint8)
    if job.rank == 0 and body:
        data.copy_(torch.frombuffer(bytearray(body), dtype=torch.uint8))
    data = data.to(job.device)
    inner.broadcast(data, "world", _TAG)
    return bytes(data.cpu().tolist())[: int(length)].decode()

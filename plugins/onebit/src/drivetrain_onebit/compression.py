"""Averaging over ranks with one bit per element and error feedback.

Tang et al. 2021, "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence
Speed", https://arxiv.org/abs/2102.02888, section 3 and figure 3. What a compression leaves out is
kept and added to what is compressed next, on the workers and again on the servers; every rank is a
worker for the whole tensor and the server of one chunk of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from drivetrain_onebit.signs import mean_signs, pack_signs

if TYPE_CHECKING:
    from drivetrain.contracts import Axis, Communicator, Tag

_SCALE_BYTES = 4
"""Every message is a row of bytes: an fp32 scale, then eight signs a byte, least bit first."""


def chunk_size(numel: int, workers: int) -> int:
    """Elements that each of ``workers`` ranks is the server of: whole bytes of signs."""
    return -(-numel // (8 * workers)) * 8


def average_(
    tensor: torch.Tensor,
    worker_error: torch.Tensor,
    server_error: torch.Tensor,
    communicator: Communicator,
    axis: Axis,
    tag: Tag,
) -> None:
    """Replace ``tensor`` by about its mean over ``axis``, the same bits on every rank.

    1. Each worker adds its error, and sends signs and one scale: the root mean square, so that the
       norm is kept. Its new error is what that leaves out.
    2. The server of a chunk averages the workers' chunks, adds its error, and compresses again.
    3. All ranks gather the chunks.

    Two collectives move 1/32 of what an fp32 all-reduce moves, and 8 bytes per pair of ranks.
    Padding at the end of the last chunk is no part of the tensor, of a scale or of an error.

    Args:
        tensor: [n], fp32 or wider.
        worker_error: [n], what this rank has left out so far; updated.
        server_error: [``chunk_size(n, workers)``], likewise for its chunk; updated.
        communicator: carries the messages.
        axis: ranks to average over.
        tag: names both collectives.
    """
    numel, workers = tensor.numel(), communicator.size(axis)
    chunk = chunk_size(numel, workers)
    width = _SCALE_BYTES + chunk // 8

    tensor.add_(worker_error)
    packed, scale = _compress(tensor, worker_error)
    sent = _messages(packed, scale, rows=workers, chunk=chunk)
    received = torch.empty_like(sent)
    communicator.all_to_all(received.view(-1), sent.view(-1), axis, tag)

    begin = min(communicator.rank(axis) * chunk, numel)
    held = min(chunk, numel - begin)
    mean = _mean(received, held).to(tensor.dtype).add_(server_error[:held])
    packed, scale = _compress(mean, server_error[:held])

    own = _messages(packed, scale, rows=1, chunk=chunk)
    gathered = own.new_empty(workers, width)
    communicator.all_gather(gathered.view(-1), own.view(-1), axis, tag)
    for server, row in enumerate(gathered):
        part = tensor[server * chunk : (server + 1) * chunk]
        part.copy_(_mean(row[None], part.numel()))


def message_bytes(numel: int, workers: int) -> int:
    """Bytes that one rank sends in :func:`average_`: messages to all others, twice."""
    return 2 * (workers - 1) * (_SCALE_BYTES + chunk_size(numel, workers) // 8)


def _compress(values: torch.Tensor, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed signs and fp32 scale [1] of ``values`` [n]; the rest goes to ``error``."""
    norm = torch.linalg.vector_norm(values)
    scale = norm.div(max(values.numel(), 1) ** 0.5).float().view(1)
    if values.dtype == torch.float32 == error.dtype:
        return pack_signs(values, scale, error), scale
    rest = torch.empty_like(values)
    packed = pack_signs(values, scale.to(values.dtype), rest)
    error.copy_(rest)
    return packed, scale


def _messages(packed: torch.Tensor, scale: torch.Tensor, *, rows: int, chunk: int) -> torch.Tensor:
    """Rows of bytes, one per chunk of the (padded) signs."""
    body = packed.new_zeros(rows * chunk // 8)
    body[: packed.numel()] = packed
    head = scale.view(torch.uint8).expand(rows, _SCALE_BYTES)
    return torch.cat([head, body.view(rows, -1)], dim=1)


def _mean(messages: torch.Tensor, numel: int) -> torch.Tensor:
    """The fp32 mean [numel] of the scaled signs of messages [rows, bytes]."""
    scales = messages[:, :_SCALE_BYTES].reshape(-1).clone().view(torch.float32)
    packed = messages[:, _SCALE_BYTES : _SCALE_BYTES + -(-numel // 8)].contiguous()
    return mean_signs(packed, scales, numel)

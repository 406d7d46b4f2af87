"""Averaging over ranks with one bit per element and error feedback.

Tang et al. 2021, "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence
Speed", https://arxiv.org/abs/2102.02888, section 3 and figure 3. What a compression leaves out is
kept and added to what is compressed next, on the workers and again on the servers; every rank is a
worker for the whole tensor and the server of one chunk of it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

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

    signs, scale = _compress_(tensor.add_(worker_error), worker_error)
    sent = _messages(signs, scale, rows=workers, chunk=chunk)
    received = torch.empty_like(sent)
    communicator.all_to_all(received.view(-1), sent.view(-1), axis, tag)

    begin = min(communicator.rank(axis) * chunk, numel)
    held = min(chunk, numel - begin)
    mean = _decode(received, tensor.dtype).mean(dim=0)[:held]
    signs, scale = _compress_(mean.add_(server_error[:held]), server_error[:held])

    own = _messages(signs, scale, rows=1, chunk=chunk)
    gathered = own.new_empty(workers, width)
    communicator.all_gather(gathered.view(-1), own.view(-1), axis, tag)
    tensor.copy_(_decode(gathered, tensor.dtype).view(-1)[:numel])


def _compress_(values: torch.Tensor, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Signs [n] (true from 0 on), fp32 scale of ``values`` [n]; the rest goes to ``error``."""
    scale = torch.linalg.vector_norm(values).div(max(values.numel(), 1) ** 0.5).float()
    signs = values >= 0
    error.copy_(values - torch.where(signs, scale, -scale))
    return signs, scale


def _messages(signs: torch.Tensor, scale: torch.Tensor, *, rows: int, chunk: int) -> torch.Tensor:
    """Rows of bytes, one per chunk of the (padded) signs."""
    bits = signs.new_zeros(rows * chunk, dtype=torch.uint8)
    bits[: signs.numel()] = signs
    place = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=signs.device)
    packed = (bits.view(rows, chunk // 8, 8) * place).sum(dim=-1, dtype=torch.uint8)
    head = scale.view(1).view(torch.uint8).expand(rows, _SCALE_BYTES)
    return torch.cat([head, packed], dim=1)


def _decode(messages: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scaled signs [rows, chunk] of messages [rows, bytes]."""
    scales = messages[:, :_SCALE_BYTES].contiguous().view(torch.float32).to(dtype)
    packed = messages[:, _SCALE_BYTES:]
    signs = _signs_of_bytes(messages.device, dtype)[packed.to(torch.int32)]
    return signs.view(messages.shape[0], -1) * scales


@lru_cache(maxsize=8)
def _signs_of_bytes(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The eight signs [256, 8] of every byte, as -1 and 1."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return (2 * bits - 1).to(dtype)

"""``compressed_allreduce``, as scripts of DeepSpeed call it."""

from __future__ import annotations

from typing import Any

import torch

from drivetrain.contracts import Purpose, Tag
from drivetrain.errors import CommunicationError
from drivetrain.job.job import open_jobs
from drivetrain_onebit.compression import average_, chunk_size

_TAG = Tag(Purpose.STATE, "compressed_allreduce")


class CompressedBackend:
    """DeepSpeed's ``NcclBackend``, ``MpiBackend`` and ``CompressedBackend``.

    The job that was opened last carries the signs, over its axis ``data``.

    Args:
        mpu: accepted, has no effect: the job knows its axes.
        cuda_aware: accepted, has no effect.
    """

    def __init__(self, mpu: Any = None, cuda_aware: bool = False) -> None:
        self.compression_backend = None

    def compressed_allreduce(
        self,
        buffer_m: torch.Tensor,
        worker_error: torch.Tensor,
        server_error: torch.Tensor,
        local_rank: int = 0,
    ) -> torch.Tensor:
        """Replace ``buffer_m`` by about its mean over ranks, with one bit per element.

        Args:
            buffer_m: any shape, n elements, fp32; changed in place.
            worker_error: [n] or longer, what was left out so far; updated.
            server_error: this rank's slice of it, [ceil(n / (8 ranks)) * 8] or longer; updated.
            local_rank: accepted, has no effect.

        Returns:
            ``buffer_m``.

        Raises:
            CommunicationError: no job is open, or an error buffer is too short.
        """
        jobs = open_jobs()
        if not jobs:
            raise CommunicationError(
                "compressed_allreduce needs an open job: call deepspeed.init_distributed() or "
                "deepspeed.initialize() first"
            )
        numel, communicator = buffer_m.numel(), jobs[-1].communicator
        if not numel:
            worker_error.zero_()
            server_error.zero_()
            return buffer_m
        chunk = chunk_size(numel, communicator.size("data"))
        for name, error, needed in (
            ("worker_error", worker_error, numel),
            ("server_error", server_error, chunk),
        ):
            if error.numel() < needed:
                raise CommunicationError(
                    f"compressed_allreduce: {name} has {error.numel()} elements, expected at "
                    f"least {needed} for {numel} elements on {communicator.size('data')} ranks"
                )
        flat = buffer_m.reshape(-1).clone()
        errors = worker_error.view(-1)[:numel], server_error.view(-1)[:chunk]
        average_(flat, *errors, communicator, "data", _TAG)
        return buffer_m.copy_(flat.view_as(buffer_m))

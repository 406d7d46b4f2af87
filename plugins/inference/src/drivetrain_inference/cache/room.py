"""How many blocks a cache has room for: one number for all ranks that compute a model together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import Op, Purpose, Tag
from drivetrain.errors import ConfigError
from drivetrain_inference.cache.paged import LayerSpec, PagedCache

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain_inference.section import InferenceSection

Agree = Callable[[Sequence[int]], list[int]]
"""Returns the least of each number over the ranks that compute a model together."""

_TAG = Tag(Purpose.CONTROL, key="room", site="inference")


def agreement(job: Job) -> Agree:
    """What gives the ranks of ``job`` that share out a model's heads the least of their numbers.

    They schedule without messages, from the same calls and the same number of blocks. One with
    fewer heads than the others has room for more blocks, and would schedule other sequences.

    Returns:
        A function of numbers. Collective over the axes ``sp`` and ``tp``.
    """
    axes = [axis for axis in ("sp", "tp") if job.mesh.size(axis) > 1]

    def least(numbers: Sequence[int]) -> list[int]:
        found = torch.tensor(list(numbers), dtype=torch.int64, device=job.device)
        for axis in axes:
            job.communicator.all_reduce(found, axis, _TAG, op=Op.MIN)
        return [int(each) for each in found.tolist()]

    return least


@dataclass(frozen=True)
class Room:
    """Numbers of blocks.

    Args:
        blocks: on the device.
        host: in host memory; 0 for none.
    """

    blocks: int
    host: int

    @classmethod
    def of(
        cls,
        section: InferenceSection,
        context: int,
        layers: Sequence[LayerSpec],
        dtype: torch.dtype,
        agree: Agree = list,
    ) -> Room:
        """What the section has memory for.

        Args:
            section: limits.
            context: most tokens of a sequence, with the source of one that has an encoder.
            layers: of the model, with this rank's heads.
            dtype: of keys and values.
            agree: see :data:`Agree`; by default the numbers are this rank's.

        Raises:
            ConfigError: there is not room for two blocks; on every rank that agrees.
        """
        size = section.block_size
        each = PagedCache.bytes_per_block(layers, size, dtype, section.cache_format)
        useful = -(-context // size) * section.max_sequences
        own = min(section.cache_blocks or section.cache_bytes // each, useful)
        blocks, host = agree([own, section.host_cache_bytes // each])
        if blocks < 2:
            raise ConfigError(
                f"inference.cache_bytes: {section.cache_bytes} is less than two blocks of {each} "
                "bytes (of this rank, or of one that computes the model with it); give the cache "
                "more memory, or make block_size smaller"
            )
        return cls(blocks, host)

"""Process groups of ranks that share sequences, kept for a whole process.

Scripts call functions of DeepSpeed's module ``parallel_state_sp``, and hand the module itself to
``initialize`` as ``mpu``. What they see are the groups of one
:class:`~drivetrain_sequence.ulysses_scripts.SequenceGroups`.
"""

from __future__ import annotations

import torch.distributed as dist

from drivetrain.errors import ConfigError
from drivetrain_sequence.ulysses_scripts import SequenceGroups

_made: dict[dist.ProcessGroup, SequenceGroups] = {}
"""Group of all ranks -> what was made over it; no more than that of today's group."""


def initialize_sequence_parallel(sequence_parallel_size: int) -> None:
    """Make groups of consecutive ranks that share sequences. Collective over all ranks.

    Args:
        sequence_parallel_size: ranks that share a sequence, a divisor of all, at least 2.

    Raises:
        ConfigError: ranks are not connected, the size is none of these, or there are groups.
    """
    if sequence_parallel_size < 2:
        raise ConfigError(
            f"sequence_parallel_size {sequence_parallel_size}: at least 2 ranks share a sequence; "
            "leave the call out otherwise"
        )
    world = dist.group.WORLD if dist.is_initialized() else None
    if world in _made:
        size = _made[world].get_sequence_parallel_world_size()
        raise ConfigError(f"groups of {size} ranks that share sequences are made already")
    groups = SequenceGroups(sequence_parallel_size)
    assert world is not None, "SequenceGroups refuses ranks that are not connected"
    _made.clear()
    _made[world] = groups


def _groups() -> SequenceGroups:
    world = dist.group.WORLD if dist.is_initialized() else None
    if world not in _made:
        raise ConfigError(
            "there are no groups of ranks that share sequences: call "
            "initialize_sequence_parallel(size) first"
        )
    return _made[world]


def get_sequence_parallel_group() -> dist.ProcessGroup:
    """The ranks of this rank's sequences."""
    return _groups().get_sequence_parallel_group()


def get_sequence_parallel_world_size() -> int:
    """How many these are."""
    return _groups().get_sequence_parallel_world_size()


def get_sequence_parallel_rank() -> int:
    """Which of them this is."""
    return _groups().get_sequence_parallel_rank()


def get_sequence_data_parallel_group() -> dist.ProcessGroup:
    """The ranks over which gradients are summed: all."""
    _groups()
    world = dist.group.WORLD
    assert world is not None, "there are groups over it"
    return world


def get_sequence_data_parallel_world_size() -> int:
    """How many these are."""
    return dist.get_world_size(get_sequence_data_parallel_group())


def get_sequence_data_parallel_rank() -> int:
    """Which of them this is."""
    return dist.get_rank(get_sequence_data_parallel_group())

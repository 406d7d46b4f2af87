"""``deepspeed.checkpointing`` as torch's own activation checkpointing does it.

Partitioned, contiguous and offloaded activations are drivetrain-activation-checkpointing's, which
puts its own functions in the place of these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint as recompute

from drivetrain.errors import ConfigError

_PACKAGE = "drivetrain-activation-checkpointing, which is not released yet"


class _Settings:
    """Whether :func:`configure` was called."""

    configured = False


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function, keep no activations of it, and run it again in backward.

    Args:
        function: of tensors; random numbers are the same both times.
        args: its arguments.
    """
    return recompute(function, *args, use_reentrant=True)


def non_reentrant_checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """As :func:`checkpoint`, without a second graph in backward."""
    return recompute(function, *args, use_reentrant=False)


def configure(
    mpu_: Any | None = None,
    deepspeed_config: Any | None = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Accept settings that ask for nothing but recomputation.

    Args:
        mpu_: accepted; without partitions there is nothing to share.
        deepspeed_config: its ``activation_checkpointing`` section is the engine's.
        partition_activations: must not be true.
        contiguous_checkpointing: must not be true.
        num_checkpoints: of contiguous memory, so without effect.
        checkpoint_in_cpu: must not be true.
        synchronize: accepted, has no effect.
        profile: accepted, has no effect.

    Raises:
        ConfigError: what is asked for needs a package that is not there.
    """
    asked = {
        "partition_activations": partition_activations,
        "contiguous_checkpointing": contiguous_checkpointing,
        "checkpoint_in_cpu": checkpoint_in_cpu,
    }
    wanted = [name for name, value in asked.items() if value]
    if wanted:
        raise ConfigError(
            f"deepspeed.checkpointing.configure: {', '.join(wanted)} needs {_PACKAGE}"
        )
    _Settings.configured = True


def is_configured() -> bool:
    """Whether :func:`configure` was called."""
    return _Settings.configured


def reset() -> None:
    """Forget nothing: no memory is kept between steps."""


def set_num_layers(nlayers: int) -> None:
    """Accepted, has no effect: the number of layers matters to contiguous memory alone."""


def partition_activations_in_checkpoint(partition_activation: bool) -> None:
    """Accepted if false.

    Raises:
        ConfigError: it is true, which needs a package that is not there.
    """
    if partition_activation:
        raise ConfigError(f"partitioned activations need {_PACKAGE}")

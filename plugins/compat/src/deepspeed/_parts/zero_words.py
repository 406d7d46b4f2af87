"""Enumerations with which scripts speak of ZeRO, and what frameworks patch of it."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, IntEnum, StrEnum
from typing import Any

MIN_SWAPPABLE_BYTES = 1024 * 1024
"""Tensors that are smaller stay in memory in DeepSpeed; nothing here reads it, as states of every
size go to files."""


class OffloadDeviceEnum(StrEnum):
    """Where states may live."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class OffloadStateTypeEnum(StrEnum):
    """What ``engine.offload_states`` moves."""

    optim_states = "optim_states"
    hp_params = "hp_params"
    lp_params = "lp_params"
    lp_grads = "lp_grads"
    contiguous_grad_buffer = "contiguous_grad_buffer"


class ZeroParamType(Enum):
    """How a parameter is cut."""

    NORMAL = 1
    PARTITIONED = 2
    REMOTE = 3


class ZeroParamStatus(Enum):
    """Whether a cut parameter is whole on this rank."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class ZeroStageEnum(IntEnum):
    """Stages of ZeRO."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3


def zero_wrapper_for_fp_tensor_constructor(
    function: Callable[..., Any], *_: Any, **__: Any
) -> Callable[..., Any]:
    """Return the function: ``zero.Init`` leaves torch's constructors as they are.

    Transformers puts a function of its own in this place while it builds a model.
    """
    return function

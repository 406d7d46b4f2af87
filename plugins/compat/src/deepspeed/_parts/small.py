"""Small helpers that scripts import from ``deepspeed.runtime.utils`` and ``deepspeed.utils``."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from packaging.version import Version

F = TypeVar("F", bound=Callable[..., Any])


def ensure_directory_exists(filename: str) -> None:
    """Make the folder in which a file is to lie."""
    Path(filename).parent.mkdir(parents=True, exist_ok=True)


def set_random_seed(seed: int) -> None:
    """Seed Python, numpy and torch."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def noop_decorator(function: F) -> F:
    """Return the function."""
    return function


def noop_context(*_: Any, **__: Any) -> AbstractContextManager[None]:
    """Do nothing in a ``with`` block."""
    return nullcontext()


def call_to_str(base: str, *args: Any, **kwargs: Any) -> str:
    """A call as Python writes it, for logs: ``call_to_str("f", 1, x=2)`` is ``"f(1, x=2)"``."""
    named = (f"{name}={value!r}" for name, value in kwargs.items())
    return f"{base}({', '.join((*map(repr, args), *named))})"


def is_model_parallel_parameter(p: torch.Tensor) -> bool:
    """Whether Megatron, or a script, has marked a tensor as one rank's part of a larger one."""
    return any(getattr(p, mark, False) for mark in ("model_parallel", "tensor_model_parallel"))


def instrument_w_nvtx(function: F) -> F:
    """Return the function; ranges of a profiler are named by the engine's spans here."""
    return function


def elasticity_enabled(ds_config: Mapping[str, Any]) -> bool:
    """Whether a config, given as a dict, switches elastic batch sizes on."""
    return bool((ds_config.get("elasticity") or {}).get("enabled", False))


def required_torch_version(
    min_version: str | float | None = None, max_version: str | float | None = None
) -> bool:
    """Whether torch's version lies between two versions, both included.

    Args:
        min_version: oldest one.
        max_version: newest one.
    """
    here = Version(Version(torch.__version__).base_version)
    low = min_version is None or here >= Version(str(min_version))
    return low and (max_version is None or here <= Version(str(max_version)))

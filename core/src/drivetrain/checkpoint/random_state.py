"""The random state of one process: named streams, and every generator that draws without a name."""

from __future__ import annotations

import base64
import random
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from drivetrain.job.job import Job


def random_state(job: Job) -> dict[str, Any]:
    """All of it, as plain data."""
    state: dict[str, Any] = {
        "streams": job.random.state_dict(),
        "torch": _encode(torch.get_rng_state()),
        "python": random.getstate(),
    }
    if job.device.type not in ("cpu", "meta"):
        module = torch.get_device_module(job.device.type)
        state["device"] = _encode(module.get_rng_state(job.device))
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = [kind, keys.tolist(), *rest]
    return state


def load_random_state(job: Job, state: Mapping[str, Any]) -> None:
    """Continue from :func:`random_state` of the same rank."""
    job.random.load_state_dict(state["streams"])
    torch.set_rng_state(_decode(state["torch"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "device" in state and job.device.type not in ("cpu", "meta"):
        torch.get_device_module(job.device.type).set_rng_state(_decode(state["device"]), job.device)
    if "numpy" in state:
        import numpy as np

        np.random.set_state(tuple(state["numpy"]))


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

"""``deepspeed.git_version_info``: what DeepSpeed writes down when it is installed."""

from __future__ import annotations

import re
from typing import Any

import torch

from deepspeed import __version__ as version
from deepspeed._parts.op_builder import compatible_ops

__all__ = ["accelerator_name", "git_branch", "git_hash", "installed_ops", "torch_info", "version"]

git_hash = git_branch = "unknown"
accelerator_name = ""  # asked for when it is needed, see deepspeed.accelerator
installed_ops = compatible_ops()


def _shortened(full: str | None) -> str:
    """The first two numbers of a version, which is how DeepSpeed keeps them; ``"0.0"`` if none."""
    found = re.match(r"\d+\.\d+", full or "")
    return found.group() if found else "0.0"


def _nccl() -> str:
    if not torch.distributed.is_nccl_available() or torch.version.cuda is None:
        return "0.0"
    return ".".join(str(number) for number in torch.cuda.nccl.version()[:2])  # type: ignore[no-untyped-call]


torch_info: dict[str, Any] = {
    "version": _shortened(torch.__version__),
    "bf16_support": True,
    "cuda_version": _shortened(torch.version.cuda),
    "nccl_version": _nccl(),
    "hip_version": _shortened(torch.version.hip),
}
"""Versions of torch and of what it was built with."""

"""AMD GPUs as an accelerator: RCCL between ranks, kernels in HIP and Triton."""

from __future__ import annotations

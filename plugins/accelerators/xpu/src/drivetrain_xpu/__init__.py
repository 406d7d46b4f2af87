"""Intel GPUs as an accelerator: XCCL between ranks, kernels in Triton."""

from __future__ import annotations

"""NVIDIA GPUs as an accelerator: NCCL between ranks, kernels in CUDA C++ and Triton."""

from __future__ import annotations

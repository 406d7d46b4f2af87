"""Tensor parallelism: each of some ranks has a part of every layer.

Names are imported when they are first used, so that a config can be checked without torch.
"""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "section": "TensorParallelSection",
        "scripts": "tp_model_init",
        "cross_entropy": "vocab_parallel_cross_entropy",
        "lazy_tensor": "whole_logits",
    },
)

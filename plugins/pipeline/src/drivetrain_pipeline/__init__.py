"""Pipelines: models split into stages over ranks, and micro-batches that run through them.

Names are imported when they are first used, so that a config can be checked without torch.
"""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "layers": "LayerSpec TiedLayerSpec",
        "measuring": "measure",
        "module": "PipelineModule",
        "scripts": "Evaluation PipelineEngine evaluate",
        "section": "PipelineSection",
    },
)

"""Engines that generate: paged cache, continuous batching, streaming; and encoders.

Names are imported when they are first used, so that a config can be checked without torch.
"""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "cache.blocks": "BlockManager OutOfBlocksError",
        "engine": "InferenceEngine QueueFullError",
        "encoders.encoder": "Classified Encoder",
        "encoders.loading": "engine_for load_encoder",
        "weights.blocks": "Q40 Q41 Q80 W8A8",
        "weights.grouped": "Int4 Int8",
        "weights.minifloats": "Fp6 Fp8",
        "loading": "load_model load_tokenizer serve",
        "ragged": "RaggedEngine SchedulingError SchedulingResult",
        "requests": "Completion Progress SamplingParams TokenLogprobs",
        "sampling.sampler": "Sampler",
        "scheduler": "Scheduler",
        "section": "InferenceSection",
        "streaming": "AsyncEngine EngineStoppedError",
    },
)

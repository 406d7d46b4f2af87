"""Activations that are computed again in backward instead of being kept.

Names are imported when they are first used, so that a config can be checked without torch.
"""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "section": "ActivationCheckpointingSection",
        "scripts": "checkpoint configure is_configured non_reentrant_checkpoint "
        "partition_activations_in_checkpoint reset set_num_layers",
        "streams": "ParallelStreams get_cuda_rng_tracker model_parallel_cuda_manual_seed "
        "model_parallel_reconfigure_tp_seed",
    },
)

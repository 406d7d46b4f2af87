"""Core's own defaults, written as plugins: the same mechanism for everybody, asked last."""

from __future__ import annotations

_BATCH = "drivetrain.builtin.batch:BatchPlan"
_PRECISION = "drivetrain.builtin.precision:Precision"
_OPTIMIZATION = "drivetrain.builtin.optimization:Optimization"
_OBSERVABILITY = "drivetrain.builtin.observability:Observability"
_DATA = "drivetrain.builtin.data:Data"
_MESH = "drivetrain.builtin.mesh:Mesh"
_CHECKPOINTS = "drivetrain.builtin.checkpoints:Checkpoints"
_LEGACY = "drivetrain.builtin.legacy:Legacy"
_DEFAULTS = "drivetrain.builtin.defaults:Defaults"

ENTRIES: dict[str, dict[str, str]] = {
    "plugins": {
        "train_batch_size": _BATCH,
        "train_micro_batch_size_per_gpu": _BATCH,
        "gradient_accumulation_steps": _BATCH,
        "managed_gradient_accumulation": _BATCH,
        "fp16": _PRECISION,
        "bf16": _PRECISION,
        "bfloat16": _PRECISION,
        "torch_autocast": _PRECISION,
        "data_types": _PRECISION,
        "communication_data_type": _PRECISION,
        "optimizer": _OPTIMIZATION,
        "scheduler": _OPTIMIZATION,
        "gradient_clipping": _OPTIMIZATION,
        "prescale_gradients": _OPTIMIZATION,
        "gradient_predivide_factor": _OPTIMIZATION,
        "gradient_allreduce_op": _OPTIMIZATION,
        "sparse_gradients": _OPTIMIZATION,
        "steps_per_print": _OBSERVABILITY,
        "wall_clock_breakdown": _OBSERVABILITY,
        "memory_breakdown": _OBSERVABILITY,
        "dump_state": _OBSERVABILITY,
        "log_level": _OBSERVABILITY,
        "timers": _OBSERVABILITY,
        "dataloader_drop_last": _DATA,
        "vocabulary_size": _DATA,
        "seed": _DATA,
        "data_parallel_size": _MESH,
        "sequence_parallel_size": _MESH,
        "accelerator": _MESH,
        "data_parallel": _DEFAULTS,
        "checkpoint": _CHECKPOINTS,
        "amp": _LEGACY,
        "nebula": _LEGACY,
        "datastates_ckpt": _LEGACY,
        "disable_allgather": _LEGACY,
        "graph_harvesting": _LEGACY,
        "zero_allow_untested_optimizer": _LEGACY,
        "zero_force_ds_cpu_optimizer": _LEGACY,
    },
}
"""Group -> name -> ``module:attribute``, in the form of entry points."""

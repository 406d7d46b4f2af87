"""Core's own defaults, written as plugins: the same mechanism for everybody, asked last."""

from __future__ import annotations

_PATHS = {
    "sections.batch:BatchPlan": "train_batch_size train_micro_batch_size_per_gpu "
    "gradient_accumulation_steps managed_gradient_accumulation",
    "sections.precision:Precision": "fp16 bf16 bfloat16 torch_autocast data_types "
    "communication_data_type",
    "sections.optimization:Optimization": "optimizer scheduler gradient_clipping "
    "prescale_gradients "
    "gradient_predivide_factor gradient_allreduce_op sparse_gradients",
    "sections.observability:Observability": "steps_per_print wall_clock_breakdown memory_breakdown "
    "dump_state log_level timers",
    "sections.data:Data": "dataloader_drop_last vocabulary_size seed",
    "sections.mesh:Mesh": "data_parallel_size accelerator",
    "engine.defaults:Defaults": "data_parallel",
    "sections.checkpoints:Checkpoints": "checkpoint",
    "sections.legacy:Legacy": "amp nebula datastates_ckpt disable_allgather graph_harvesting "
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer compute_grad_norm "
    "parameter_alignment comms_config",
}

_SCHEDULES = ("LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR")

_TORCH_OPTIMIZERS = "SGD Adagrad Adadelta Adamax NAdam RAdam RMSprop Rprop ASGD"
_TORCH_SCHEDULES = (
    "StepLR MultiStepLR ConstantLR LinearLR ExponentialLR CosineAnnealingLR "
    "CosineAnnealingWarmRestarts PolynomialLR CyclicLR OneCycleLR ReduceLROnPlateau"
)


def _torch_params(names: str) -> dict[str, str]:
    return {name: f"drivetrain.sections.torch_params:{name}" for name in names.split()}


ENTRIES: dict[str, dict[str, str]] = {
    "plugins": {
        path: f"drivetrain.{value}" for value, paths in _PATHS.items() for path in paths.split()
    },
    "optimizers": {
        "Adam": "drivetrain.optimization.factory:adam",
        "AdamW": "drivetrain.optimization.factory:adamw",
    },
    "schedulers": {name: f"drivetrain.optimization.schedules:{name}" for name in _SCHEDULES},
    "optimizer_params": {
        "Adam": "drivetrain.sections.params:AdamParams",
        "AdamW": "drivetrain.sections.params:AdamWParams",
        **_torch_params(_TORCH_OPTIMIZERS),
    },
    "scheduler_params": {name: f"drivetrain.sections.params:{name}Params" for name in _SCHEDULES}
    | _torch_params(_TORCH_SCHEDULES),
}
"""Group -> name -> ``module:attribute``, in the form of entry points."""

"""Names that core knows without importing their owners, so that an error can say what to install.

A test holds these tables against the workspace: every path that a first-party distribution serves
is listed under that distribution.
"""

from __future__ import annotations

SECTIONS = {
    "activation_checkpointing": "drivetrain-activation-checkpointing",
    "aio": "drivetrain-offload",
    "autotuning": "drivetrain-autotuning",
    "checkpoint.background": "drivetrain-checkpoint-tools",
    "comet": "drivetrain-comet",
    "comms_logger": "drivetrain-comms-logger",
    "compile": "drivetrain-compile",
    "compression_training": "drivetrain-compression",
    "cpu": "drivetrain-cpu",
    "csv_monitor": "drivetrain-csv",
    "curriculum_learning": "drivetrain-curriculum",
    "data_efficiency": "drivetrain-data-efficiency",
    "eigenvalue": "drivetrain-compression",
    "elasticity": "drivetrain-elasticity",
    "expert_parallel": "drivetrain-moe",
    "flops_profiler": "drivetrain-flops-profiler",
    "hybrid_engine": "drivetrain-hybrid-engine",
    "inference": "drivetrain-inference",
    "moe": "drivetrain-moe",
    "pipeline": "drivetrain-pipeline",
    "progressive_layer_drop": "drivetrain-progressive-layer-drop",
    "seq_parallel_communication_data_type": "drivetrain-sequence",
    "sequence_parallel": "drivetrain-sequence",
    "sparse_attention": "drivetrain-sparse-attention",
    "tensor_parallel": "drivetrain-tensor",
    "tensorboard": "drivetrain-tensorboard",
    "use_data_before_expert_parallelism": "drivetrain-moe",
    "wandb": "drivetrain-wandb",
    "weight_quantization": "drivetrain-compression",
    "zero_optimization": "drivetrain-zero",
    "zero_optimization.offload_optimizer": "drivetrain-offload",
    "zero_optimization.offload_param": "drivetrain-offload",
}
"""Config path -> first-party distribution that serves it."""

OPTIMIZERS = {
    "FusedAdagrad": "drivetrain-kernels",
    "FusedAdam": "drivetrain-kernels",
    "FusedAdamW": "drivetrain-kernels",
    "FusedLamb": "drivetrain-kernels",
    "FusedLion": "drivetrain-kernels",
    "FusedSGD": "drivetrain-kernels",
    "Lamb": "drivetrain-optimizers",
    "Lion": "drivetrain-optimizers",
    "MuAdam": "drivetrain-mup",
    "MuAdamW": "drivetrain-mup",
    "MuSGD": "drivetrain-mup",
    "Muon": "drivetrain-optimizers",
    "OneBitAdam": "drivetrain-onebit",
}
"""``optimizer.type`` -> first-party distribution that serves it."""

COMMANDS = {
    "build": "drivetrain-kernels",
    "checkpoint": "drivetrain-checkpoint-tools",
    **dict.fromkeys(("config", "explain", "new-plugin", "plugins"), "drivetrain-cli"),
    **dict.fromkeys(("report", "run", "test-plugin"), "drivetrain-cli"),
}
"""Command -> first-party distribution that has it."""

ACCELERATORS = {name: f"drivetrain-{name}" for name in ("cuda", "rocm", "xpu")}
"""Accelerator -> first-party distribution that brings it; core has one for the CPU itself."""

OWNERS = {
    "accelerators": ACCELERATORS,
    "commands": COMMANDS,
    "optimizers": OPTIMIZERS,
    "plugins": SECTIONS,
}
"""Entry point group -> name -> first-party distribution that serves it."""

TORCH_OPTIMIZERS = (
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon"),
    *("NAdam", "RAdam", "RMSprop", "Rprop", "SGD", "SparseAdam"),
)
"""Classes of ``torch.optim``, which are looked up there when no entry serves them."""

TORCH_SCHEDULERS = (
    *("ChainedScheduler", "ConstantLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts"),
    *("CyclicLR", "ExponentialLR", "LambdaLR", "LinearLR", "MultiStepLR", "MultiplicativeLR"),
    *("OneCycleLR", "PolynomialLR", "ReduceLROnPlateau", "SequentialLR", "StepLR"),
)
"""Classes of ``torch.optim.lr_scheduler``, likewise."""

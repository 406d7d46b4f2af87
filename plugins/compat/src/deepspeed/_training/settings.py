"""Methods of DeepSpeed's engine that return one value of the config."""

from __future__ import annotations

from collections.abc import Mapping

SETTINGS: Mapping[str, str] = {
    "bf16_master_weights_and_gradients": "bf16.bf16_master_weights_and_grads",
    "bf16_optimizer_states": "bf16.bf16_optimizer_states",
    "bfloat16_enabled": "bf16.enabled",
    "checkpoint_serialization_enabled": "checkpoint.checkpoint_serialization",
    "curriculum_enabled_legacy": "curriculum_learning.enabled",
    "dataloader_drop_last": "dataloader_drop_last",
    "dump_state": "dump_state",
    "flops_profiler_enabled": "flops_profiler.enabled",
    "fp16_auto_cast": "fp16.auto_cast",
    "fp16_enabled": "fp16.enabled",
    "fp16_master_weights_and_gradients": "fp16.fp16_master_weights_and_grads",
    "gradient_predivide_factor": "gradient_predivide_factor",
    "initial_dynamic_scale": "fp16.initial_scale_power",
    "load_universal_checkpoint": "checkpoint.load_universal",
    "managed_gradient_accumulation": "managed_gradient_accumulation",
    "memory_breakdown": "memory_breakdown",
    "optimizer_legacy_fusion": "optimizer.legacy_fusion",
    "optimizer_params": "optimizer.params",
    "pld_enabled": "progressive_layer_drop.enabled",
    "scheduler_params": "scheduler.params",
    "sparse_gradients_enabled": "sparse_gradients",
    "steps_per_print": "steps_per_print",
    "torch_autocast_dtype": "torch_autocast.dtype",
    "torch_autocast_enabled": "torch_autocast.enabled",
    "torch_autocast_lower_precision_safe_modules": "torch_autocast.lower_precision_safe_modules",
    "use_node_local_storage": "checkpoint.use_node_local_storage",
    "wall_clock_breakdown": "wall_clock_breakdown",
    "zero_allgather_bucket_size": "zero_optimization.allgather_bucket_size",
    "zero_allgather_partitions": "zero_optimization.allgather_partitions",
    "zero_allow_untested_optimizer": "zero_allow_untested_optimizer",
    "zero_contiguous_gradients": "zero_optimization.contiguous_gradients",
    "zero_elastic_checkpoint": "zero_optimization.elastic_checkpoint",
    "zero_force_ds_cpu_optimizer": "zero_force_ds_cpu_optimizer",
    "zero_gather_16bit_weights_on_model_save": "zero_optimization."
    "stage3_gather_16bit_weights_on_model_save",
    "zero_hpz_partition_size": "zero_optimization.zero_hpz_partition_size",
    "zero_ignore_unused_parameters": "zero_optimization.ignore_unused_parameters",
    "zero_legacy_stage1": "zero_optimization.legacy_stage1",
    "zero_load_from_fp32_weights": "zero_optimization.load_from_fp32_weights",
    "zero_log_trace_cache_warnings": "zero_optimization.log_trace_cache_warnings",
    "zero_max_live_parameters": "zero_optimization.stage3_max_live_parameters",
    "zero_max_reuse_distance": "zero_optimization.stage3_max_reuse_distance",
    "zero_model_persistence_threshold": "zero_optimization.stage3_model_persistence_threshold",
    "zero_module_granularity_threshold": "zero_optimization.stage3_module_granularity_threshold",
    "zero_multi_rank_bucket_allreduce": "zero_optimization.use_multi_rank_bucket_allreduce",
    "zero_overlap_comm": "zero_optimization.overlap_comm",
    "zero_param_persistence_threshold": "zero_optimization.stage3_param_persistence_threshold",
    "zero_prefetch_bucket_size": "zero_optimization.stage3_prefetch_bucket_size",
    "zero_quantized_gradients": "zero_optimization.zero_quantized_gradients",
    "zero_quantized_nontrainable_weights": "zero_optimization.zero_quantized_nontrainable_weights",
    "zero_quantized_weights": "zero_optimization.zero_quantized_weights",
    "zero_reduce_bucket_size": "zero_optimization.reduce_bucket_size",
    "zero_reduce_scatter": "zero_optimization.reduce_scatter",
    "zero_round_robin_gradients": "zero_optimization.round_robin_gradients",
    "zero_sub_group_size": "zero_optimization.sub_group_size",
}
"""Method -> config path."""

CALLS = (
    *("backward", "compile", "eval_batch", "get_lr", "get_mom", "load_checkpoint"),
    *("load_module_state_dict", "module_state_dict"),
    *("save_16bit_model", "save_checkpoint", "save_fp16_model", "scale"),
    *("set_gradient_accumulation_boundary", "set_train_batch_size", "set_train_micro_batch_size"),
    *("step", "train_batch", "zero_grad"),
)
"""Methods whose errors are of DeepSpeed's classes, too."""

SHARED = (
    *("backward", "coalesce_grad_reduction", "deepspeed_io", "destroy", "device", "eval_batch"),
    *("get_global_grad_norm", "get_lr", "get_mom", "get_type", "global_samples", "global_steps"),
    *("gradient_accumulation_steps", "gradient_clipping", "is_gradient_accumulation_boundary"),
    *("lr_scheduler", "micro_steps", "module", "no_sync", "offload_states", "optimizer"),
    *("reload_states", "scale", "set_gradient_accumulation_boundary", "set_train_batch_size"),
    *("set_train_micro_batch_size", "skipped_steps", "step", "train_batch", "train_batch_size"),
    *("train_micro_batch_size_per_gpu", "training_dataloader", "was_step_applied"),
)
"""What DeepSpeed's engine and Drivetrain's both have under the same name."""

"""The table of names: what this package serves itself, and what becomes of the rest.

Other packages of Drivetrain declare the names that they serve by entry points of
``drivetrain.deepspeed``, which go before the names here. Here is only which package that is, so
that an error can say what to install. All names are without ``deepspeed.``.
"""

from __future__ import annotations

from collections.abc import Mapping

_GROUPS_OF_SCRIPTS = " ".join(
    f"_get_{axis}_parallel_{what}=get_{axis}_parallel_{what}"
    for axis in ("data", "model", "sequence", "sequence_data")
    for what in ("group", "rank", "world_size")
)
"""Scripts that shard sequences call these, although their names begin with an underscore."""

OWN: Mapping[str, Mapping[str, str]] = {
    "": {
        "deepspeed._training.initialize": "initialize add_config_arguments",
        "deepspeed._training.engine": "DeepSpeedEngine",
        "deepspeed._training.optimizer": "DeepSpeedOptimizer",
        "deepspeed._config.view": "DeepSpeedConfig",
        "drivetrain.engine.loader": "DeepSpeedDataLoader=DataLoader",
        "deepspeed._transformer.config": "DeepSpeedTransformerConfig",
        "deepspeed._transformer.layer": "DeepSpeedTransformerLayer",
        "drivetrain.errors": "DeepSpeedConfigError=ConfigError",
    },
    "accelerator": {
        "deepspeed._parts.accelerator": "get_accelerator DeepSpeedAccelerator "
        "is_current_accelerator_supported",
    },
    "checkpoint.ds_to_universal": {"deepspeed._commands.universal": "main"},
    "checkpoint.utils": {"deepspeed._parts.tensors": "clone_tensors_for_torch_save"},
    "comm": {
        "deepspeed._parts.comm": "init_distributed get_rank get_world_size get_local_rank "
        "get_world_group get_global_rank get_all_ranks_from_group inference_all_reduce "
        "reduce_scatter_fn allgather_fn has_all_gather_into_tensor has_reduce_scatter_tensor "
        "has_all_reduce_coalesced has_coalescing_manager all_gather_coalesced "
        "all_reduce_coalesced",
        "torch.distributed": "ProcessGroup ReduceOp P2POp all_gather all_gather_into_tensor "
        "all_gather_object all_reduce all_to_all all_to_all_single barrier batch_isend_irecv "
        "broadcast broadcast_object_list destroy_process_group gather irecv is_available "
        "is_initialized isend monitored_barrier new_group recv reduce reduce_scatter "
        "reduce_scatter_tensor scatter send",
        "torch.distributed.device_mesh": "initialize_mesh_device=init_device_mesh",
    },
    "comm.torch": {
        "deepspeed._parts.comm_switches": "all_gather_comm_off all_reduce_comm_off "
        "backward_comm_off broadcast_comm_off reduce_scatter_comm_off",
    },
    "elasticity": {"deepspeed._parts.small": "elasticity_enabled"},
    "elasticity.config": {
        "drivetrain.errors": "ElasticityConfigError=ConfigError ElasticityError=ConfigError "
        "ElasticityIncompatibleWorldSize=ConfigError",
    },
    "env_report": {"deepspeed._commands.report": "main cli_main=main"},
    "git_version_info": {
        "deepspeed._parts.version_info": "accelerator_name git_branch git_hash installed_ops "
        "torch_info version",
    },
    "launcher.runner": {
        "deepspeed._commands.launch": "main=run DEEPSPEED_ENVIRONMENT_NAME EXPORT_ENVS",
    },
    "monitor.config": {
        "deepspeed._parts.monitor": "DeepSpeedMonitorConfig get_monitor_config",
    },
    "monitor.monitor": {"deepspeed._parts.monitor": "MonitorMaster"},
    "monitor.comet": {"deepspeed._parts.monitor": "CometMonitor=SingleMonitor"},
    "monitor.csv_monitor": {"deepspeed._parts.monitor": "csvMonitor=SingleMonitor"},
    "monitor.tensorboard": {"deepspeed._parts.monitor": "TensorBoardMonitor=SingleMonitor"},
    "monitor.wandb": {"deepspeed._parts.monitor": "WandbMonitor=SingleMonitor"},
    "ops": {
        "deepspeed._parts.version_info": "__compatible_ops__=installed_ops "
        "__installed_ops__=installed_ops",
    },
    "ops.adagrad": {"deepspeed._parts.optimizers": "DeepSpeedCPUAdagrad"},
    "ops.adam": {"deepspeed._parts.optimizers": "DeepSpeedCPUAdam FusedAdam"},
    "ops.lamb": {"deepspeed._parts.optimizers": "FusedLamb"},
    "ops.lion": {"deepspeed._parts.optimizers": "DeepSpeedCPULion FusedLion"},
    "ops.op_builder": {
        "deepspeed._parts.op_builder": "OpBuilder AsyncIOBuilder CPUAdagradBuilder CPUAdamBuilder "
        "CPULionBuilder FusedAdamBuilder FusedLambBuilder FusedLionBuilder QuantizerBuilder "
        "UtilsBuilder",
    },
    "ops.utils": {"deepspeed._parts.tensors": "flatten unflatten"},
    "runtime.base_optimizer": {"deepspeed._training.kinds": "ZeROOptimizer"},
    "runtime.bf16_optimizer": {"deepspeed._training.kinds": "BF16_Optimizer"},
    "runtime.config": {
        "deepspeed._config.sections": "ADAGRAD_OPTIMIZER ADAMW_OPTIMIZER ADAM_OPTIMIZER "
        "LAMB_OPTIMIZER LION_OPTIMIZER ONEBIT_ADAM_OPTIMIZER get_gradient_clipping "
        "get_log_level",
    },
    "runtime.config_utils": {
        "deepspeed._config.model": "DeepSpeedConfigModel",
        "deepspeed._config.sections": "dict_raise_error_on_duplicate_keys",
    },
    "runtime.constants": {
        "deepspeed._config.sections": "GRADIENT_CLIPPING_DEFAULT LOG_LEVEL_DEFAULT",
    },
    "runtime.dataloader": {"drivetrain.engine.loader": "RepeatingLoader"},
    "runtime.fp16.fused_optimizer": {"deepspeed._training.kinds": "FP16_Optimizer"},
    "runtime.fp16.unfused_optimizer": {
        "deepspeed._training.kinds": "FP16_UnfusedOptimizer=FP16_Optimizer",
    },
    "runtime.fp16.onebit.adam": {"deepspeed._parts.onebit": "OnebitAdam"},
    "runtime.fp16.onebit.lamb": {"deepspeed._parts.onebit": "OnebitLamb"},
    "runtime.fp16.onebit.zoadam": {"deepspeed._parts.onebit": "ZeroOneAdam"},
    "runtime.lr_schedules": {
        "drivetrain.optimization.schedules": "LRRangeTest OneCycle WarmupCosineLR WarmupDecayLR "
        "WarmupLR",
        "deepspeed._parts.schedules": "LR_RANGE_TEST LR_SCHEDULE ONE_CYCLE VALID_LR_SCHEDULES "
        "WARMUP_COSINE_LR WARMUP_DECAY_LR WARMUP_LR LR_RANGE_TEST_MIN_LR LR_RANGE_TEST_STEP_RATE "
        "LR_RANGE_TEST_STEP_SIZE LR_RANGE_TEST_STAIRCASE CYCLE_MIN_LR CYCLE_MAX_LR "
        "CYCLE_FIRST_STEP_SIZE CYCLE_FIRST_STAIR_COUNT CYCLE_SECOND_STEP_SIZE "
        "CYCLE_SECOND_STAIR_COUNT CYCLE_MIN_MOM CYCLE_MAX_MOM DECAY_STEP_SIZE DECAY_LR_RATE "
        "DECAY_MOM_RATE WARMUP_MIN_LR WARMUP_MAX_LR WARMUP_NUM_STEPS WARMUP_TYPE WARMUP_LOG_RATE "
        "WARMUP_LINEAR_RATE TOTAL_NUM_STEPS WARMUP_MIN_RATIO COS_MIN_RATIO",
    },
    "runtime.precision_config": {
        "deepspeed._config.sections": "DeepSpeedBF16Config DeepSpeedFP16Config get_bfloat16_config",
    },
    "runtime.swap_tensor": {"deepspeed._parts.zero_words": "MIN_SWAPPABLE_BYTES"},
    "runtime.zero.config": {"deepspeed._config.sections": "DeepSpeedZeroConfig"},
    "runtime.zero.leaf_module_config": {
        "deepspeed._config.sections": "DEFAULT_LEAF_MODULE_CLASSES DEFAULT_LEAF_MODULE_NAMES "
        "DEFAULT_LEAF_MODULE_NAME_SUFFIXES",
    },
    "runtime.zero.offload_config": {
        "deepspeed._config.sections": "DeepSpeedZeroOffloadOptimizerConfig "
        "DeepSpeedZeroOffloadParamConfig",
    },
    "runtime.zero.utils": {"drivetrain.errors": "ZeRORuntimeException=DrivetrainError"},
    "runtime.zero.stage3": {"deepspeed._training.kinds": "DeepSpeedZeroOptimizer_Stage3"},
    "runtime.zero.stage_1_and_2": {"deepspeed._training.kinds": "DeepSpeedZeroOptimizer"},
    "runtime.zero.partition_parameters": {
        "deepspeed._parts.zero_words": "zero_wrapper_for_fp_tensor_constructor",
    },
    "runtime.utils": {
        "deepspeed._parts.tensors": "move_to_device",
        "deepspeed._parts.partitioned": "PartitionedTensor",
        "deepspeed._parts.memory": "empty_cache memory_status see_memory_usage",
        "deepspeed._parts.small": "call_to_str ensure_directory_exists "
        "is_model_parallel_parameter noop_context noop_decorator set_random_seed",
        "deepspeed._parts.clipping": "clip_grad_norm_",
    },
    "utils": {
        "deepspeed._parts.logs": "log_dist log_dist_once logger set_log_level_from_string",
        "deepspeed._parts.on_device": "OnDevice",
        "deepspeed._parts.small": "instrument_w_nvtx required_torch_version",
    },
    "utils.numa": {"drivetrain_cli.cores": "parse_range_list=parse_cores"},
    "utils.timer": {
        "deepspeed._parts.timers": "NoopTimer SynchronizedWallClockTimer ThroughputTimer trim_mean",
    },
    "utils.groups": {
        "deepspeed._parts.groups": "get_data_parallel_group get_data_parallel_rank "
        "get_data_parallel_world_size get_model_parallel_group get_model_parallel_rank "
        "get_model_parallel_world_size get_sequence_data_parallel_group "
        "get_sequence_data_parallel_rank get_sequence_data_parallel_world_size "
        "get_sequence_parallel_group get_sequence_parallel_rank "
        "get_sequence_parallel_world_size get_tensor_model_parallel_group "
        "get_tensor_model_parallel_rank get_tensor_model_parallel_world_size get_world_group "
        "get_world_rank get_world_size " + _GROUPS_OF_SCRIPTS,
    },
    "zero": {
        "deepspeed._parts.zero_words": "OffloadDeviceEnum OffloadStateTypeEnum "
        "ZeroParamStatus ZeroParamType ZeroStageEnum",
    },
}
"""Module -> where its names are -> names, ``theirs=ours`` where they differ."""

SHOWS: Mapping[str, tuple[str, ...]] = {
    "accelerator.abstract_accelerator": ("accelerator",),
    "accelerator.real_accelerator": ("accelerator",),
    "comm.comm": ("comm",),
    "moe": ("moe.layer",),
    "ops.adam.cpu_adam": ("ops.adam",),
    "ops.adam.fused_adam": ("ops.adam",),
    "ops.adagrad.cpu_adagrad": ("ops.adagrad",),
    "ops.lamb.fused_lamb": ("ops.lamb",),
    "ops.lion.cpu_lion": ("ops.lion",),
    "ops.lion.fused_lion": ("ops.lion",),
    "profiling.flops_profiler.profiler": ("profiling.flops_profiler",),
    "runtime.activation_checkpointing.checkpointing": ("checkpointing",),
    "runtime.fp16.onebit": (
        *("runtime.fp16.onebit.adam", "runtime.fp16.onebit.lamb"),
        "runtime.fp16.onebit.zoadam",
    ),
    "runtime.pipe": ("pipe",),
    "runtime.pipe.module": ("pipe",),
    "runtime.zero": ("zero",),
    "runtime.zero.config": ("zero", "runtime.zero.offload_config"),
    "runtime.zero.mics": ("zero",),
    "runtime.zero.offload_config": ("zero",),
    "runtime.zero.partition_parameters": ("zero",),
    "runtime.zero.stage3": ("zero",),
    "runtime.zero.stage_1_and_2": ("zero",),
    "runtime.zero.tiling": ("zero",),
    "sequence": (
        *("sequence.auto_sp", "sequence.autosp_detector"),
        *("sequence.autosp_fusion", "sequence.autosp_vit"),
    ),
    "utils.init_on_device": ("utils",),
    "utils.logging": ("utils",),
    "utils.tensor_fragment": ("utils",),
    "utils.torch": ("utils",),
    "utils.nvtx": ("utils",),
    "utils.z3_leaf_module": ("utils",),
}
"""Module -> modules whose names it shows, too."""

SAME: Mapping[str, str] = {
    "OnDevice": "utils.OnDevice",
    "PipelineEngine": "runtime.pipe.engine.PipelineEngine",
    "PipelineModule": "pipe.PipelineModule",
    "get_accelerator": "accelerator.get_accelerator",
    "autotuning.autotuner.Autotuner": "autotuning.Autotuner",
    "init_distributed": "comm.init_distributed",
    "log_dist": "utils.log_dist",
    "logger": "utils.logger",
    "ops.transformer.DeepSpeedTransformerConfig": "DeepSpeedTransformerConfig",
    "ops.transformer.DeepSpeedTransformerLayer": "DeepSpeedTransformerLayer",
    "ops.aio.AsyncIOBuilder": "ops.op_builder.AsyncIOBuilder",
    "runtime.base_optimizer.DeepSpeedOptimizer": "DeepSpeedOptimizer",
    "runtime.config.DeepSpeedConfig": "DeepSpeedConfig",
    "runtime.config.DeepSpeedConfigError": "DeepSpeedConfigError",
    "runtime.dataloader.DeepSpeedDataLoader": "DeepSpeedDataLoader",
    "runtime.engine.DeepSpeedEngine": "DeepSpeedEngine",
    "utils.RepeatingLoader": "runtime.dataloader.RepeatingLoader",
}
"""Name -> the name under which it is declared."""

READS_CONFIG = frozenset({"zero.Init", "zero.MiCS_Init"})
"""Names of other packages' classes whose constructors read a config of DeepSpeed."""

RAISES = frozenset({
    "launcher.runner._parse_hostfile",
    "launcher.runner.fetch_hostfile",
    "launcher.runner.parse_inclusion_exclusion",
    "launcher.runner.parse_resource_filter",
    "utils.numa.parse_range_list",
    "utils.set_z3_leaf_modules",
    "utils.set_z3_leaf_modules_by_name",
    "utils.set_z3_leaf_modules_by_suffix",
    "utils.unset_z3_leaf_modules",
    "utils.zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict",
    "utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint",
    "utils.zero_to_fp32.load_state_dict_from_zero_checkpoint",
    "zero.TiledLinear",
    "zero.TiledLinearReturnBias",
})  # fmt: skip
"""Names whose errors scripts catch by the classes of DeepSpeed's."""

NEEDS: Mapping[str, Mapping[str, str]] = {
    "drivetrain-activation-checkpointing": {
        "checkpointing": "checkpoint configure get_cuda_rng_tracker is_configured "
        "model_parallel_cuda_manual_seed model_parallel_reconfigure_tp_seed "
        "non_reentrant_checkpoint partition_activations_in_checkpoint reset set_num_layers",
    },
    "drivetrain-autotuning": {"autotuning": "Autotuner"},
    "drivetrain-checkpoint-tools": {
        "checkpoint": "import_deepspeed",
        "utils.zero_to_fp32": "convert_zero_checkpoint_to_fp32_state_dict "
        "get_fp32_state_dict_from_zero_checkpoint load_state_dict_from_zero_checkpoint",
    },
    "drivetrain-compression": {
        "compression": "compression_scheduler convert_conv1d_to_linear init_compression "
        "redundancy_clean",
        "compression.compress": "init_compression redundancy_clean student_initialization",
        "compression.helper": "convert_conv1d_to_linear",
        "compression.scheduler": "compression_scheduler",
        "inference.quantization.quantization": "_init_group_wise_weight_quantization",
        "linear": "LoRAConfig LoRAOptimizedLinear OptimizedLinear QuantizationConfig "
        "QuantizedLinear QuantizedParameter init_lora",
        "ops.quantizer": "ds_quantizer",
    },
    "drivetrain-data-efficiency": {
        "runtime.data_pipeline.config": "get_data_efficiency_config",
        "runtime.data_pipeline.curriculum_scheduler": "CurriculumScheduler",
        "runtime.data_pipeline.data_routing.basic_layer": "RandomLayerTokenDrop",
        "runtime.data_pipeline.data_routing.helper": "convert_to_random_ltd "
        "remove_random_ltd_state_dict save_without_random_ltd",
        "runtime.data_pipeline.data_routing.scheduler": "BaseScheduler RandomLTDScheduler",
        "runtime.data_pipeline.data_sampling.data_analyzer": "DataAnalyzer DistributedDataAnalyzer",
        "runtime.data_pipeline.data_sampling.data_sampler": "DeepSpeedDataSampler",
        "runtime.data_pipeline.data_sampling.indexed_dataset": "MMapIndexedDataset "
        "MMapIndexedDatasetBuilder data_file_path dataset_exists index_file_path "
        "infer_dataset_impl make_builder make_dataset",
        "runtime.data_pipeline.data_sampling.utils": "close_mmap_dataset_builder "
        "create_mmap_dataset_builder find_fit_int_dtype split_dataset split_index",
        "runtime.data_pipeline.data_sampling.variable_batch_size_and_lr": "batch_by_seqlens "
        "scale_lr",
    },
    "drivetrain-elasticity": {"elasticity": "compute_elastic_config"},
    "drivetrain-hybrid-engine": {
        "runtime.hybrid_engine": "DeepSpeedHybridEngine",
        "runtime.rollout": "RolloutBatch RolloutConfig RolloutEngine RolloutRequest "
        "SamplingConfig build_rollout",
    },
    "drivetrain-inference": {
        "": "InferenceEngine default_inference_config init_inference",
        "inference": "InferenceEngine",
        "inference.v2": "InferenceEngineV2 SchedulingError SchedulingResult build_hf_engine",
    },
    "drivetrain-launch": {
        "launcher.runner": "_parse_hostfile encode_world_info fetch_hostfile "
        "parse_inclusion_exclusion parse_resource_filter",
    },
    "drivetrain-moe": {
        "moe.layer": "MoE",
        "moe.utils": "configure_moe_param_groups has_moe_layers is_moe_param "
        "split_params_into_different_moe_groups_for_optimizer "
        "split_params_into_shared_and_expert_params",
        "utils.groups": "get_expert_data_parallel_group get_expert_parallel_group "
        "get_expert_parallel_rank get_expert_parallel_world_size",
    },
    "drivetrain-offload": {
        "ops.aio": "aio_handle",
        "runtime.zero.offload_states": "get_state_devices",
    },
    "drivetrain-onebit": {
        "runtime.comm.compressed": "CompressedBackend",
        "runtime.comm.mpi": "MpiBackend",
        "runtime.comm.nccl": "NcclBackend",
    },
    "drivetrain-pipeline": {
        "pipe": "LayerSpec PipelineModule TiedLayerSpec",
        "runtime.pipe.engine": "PipelineEngine",
        "runtime.pipe.topology": "PipeDataParallelTopology PipeModelDataParallelTopology "
        "ProcessTopology",
        "runtime.utils": "partition_balanced partition_uniform prefix_sum_inc",
    },
    "drivetrain-profiler": {
        "comm": "configure get_comm_operation_count has_comm_data log_summary reset_log",
        "profiling.flops_profiler": "FlopsProfiler get_model_profile",
    },
    "drivetrain-progressive-layer-drop": {
        "runtime.progressive_layer_drop": "ProgressiveLayerDrop",
    },
    "drivetrain-sequence": {
        "runtime.sequence_parallel.parallel_state_sp": "get_model_parallel_group "
        "get_model_parallel_rank get_model_parallel_world_size get_sequence_data_parallel_group "
        "get_sequence_data_parallel_rank get_sequence_data_parallel_world_size "
        "get_sequence_parallel_group get_sequence_parallel_rank get_sequence_parallel_world_size "
        "initialize_sequence_parallel",
        "runtime.sequence_parallel.ulysses_sp": "SequenceTiledCompute TiledFusedLogitsLoss "
        "TiledLoss TiledMLP UlyssesSPAttentionHF UlyssesSPDataLoaderAdapter "
        "UlyssesSPFwdLossBwdWithLogits sequence_tiled_compute",
        "sequence.auto_sp": "auto_wrap_model_for_sp",
        "sequence.autosp_detector": "SPModelInfo detect_model_sp_info",
        "sequence.autosp_fusion": "InternVLFusionAdapter LlavaFusionAdapter "
        "ModalityFusionSPAdapter Qwen2VLFusionAdapter",
        "sequence.autosp_vit": "UlyssesSPViTAttention",
        "sequence.cross_entropy": "vocab_sequence_parallel_cross_entropy",
        "sequence.fpdt_layer": "FPDT_Attention FPDT_FFN FPDT_InputConstruct FPDT_LogitsLoss",
        "sequence.layer": "DistributedAttention",
    },
    "drivetrain-sparse-attention": {
        "ops.sparse_attention": "BSLongformerSparsityConfig BertSparseSelfAttention "
        "BigBirdSparsityConfig DenseSparsityConfig FixedSparsityConfig "
        "LocalSlidingWindowSparsityConfig SparseAttentionUtils SparseSelfAttention SparsityConfig "
        "VariableSparsityConfig",
        "ops.sparse_attention.matmul": "MatMul",
        "ops.sparse_attention.softmax": "Softmax",
    },
    "drivetrain-tensor": {"": "tp_model_init"},
    "drivetrain-zero": {
        "utils": "get_z3_leaf_modules safe_get_full_fp32_param safe_get_full_grad "
        "safe_get_full_optimizer_state safe_get_local_fp32_param safe_get_local_grad "
        "safe_get_local_optimizer_state safe_set_full_fp32_param safe_set_full_grad "
        "safe_set_full_optimizer_state safe_set_local_fp32_param safe_set_local_grad "
        "safe_set_local_optimizer_state safe_update_full_grad_vectorized set_z3_leaf_module "
        "set_z3_leaf_modules set_z3_leaf_modules_by_name set_z3_leaf_modules_by_suffix "
        "unset_z3_leaf_modules z3_leaf_module z3_leaf_parameter",
        "zero": "GatheredParameters Init MiCS_Init TiledLinear TiledLinearReturnBias "
        "estimate_zero2_model_states_mem_needs estimate_zero2_model_states_mem_needs_all_cold "
        "estimate_zero2_model_states_mem_needs_all_live estimate_zero3_model_states_mem_needs "
        "estimate_zero3_model_states_mem_needs_all_cold "
        "estimate_zero3_model_states_mem_needs_all_live register_external_parameter "
        "unregister_external_parameter unwrap_model_for_generation",
    },
}
"""Package -> module -> names that it serves, or is to serve."""

INSTEAD: Mapping[str, str] = {
    "runtime.data_pipeline.data_sampling.indexed_dataset.IndexedCachedDataset": "MMapIndexedDataset"
    ", for the mmap format alone; write older files again with MMapIndexedDatasetBuilder",
    "runtime.data_pipeline.data_sampling.indexed_dataset.IndexedDataset": "MMapIndexedDataset, for "
    "the mmap format alone; write older files again with MMapIndexedDatasetBuilder",
    "runtime.data_pipeline.data_sampling.indexed_dataset.IndexedDatasetBuilder": "make_builder or "
    "MMapIndexedDatasetBuilder",
    **{
        f"runtime.data_pipeline.data_sampling.variable_batch_size_and_lr.{name}": "training_data "
        "of initialize, with the config's data_efficiency.data_sampling.dynamic_batching"
        for name in (
            "VariableBatchLRScheduler",
            "dataloader_for_variable_batch_size",
            "get_dataloader_and_lr_scheduler_for_variable_batch_size",
            "get_dataloader_and_lr_scheduler_for_variable_batch_size_deepspeed",
            "lr_scheduler_for_variable_batch_size",
        )
    },
    "checkpoint.DeepSpeedCheckpoint": "drivetrain checkpoint inspect FOLDER",
    "comm.backend.Backend": "the config's communication.routes, which chooses among backends",
    "comm.ccl.CCLBackend": "init_distributed(dist_backend='ccl') with oneCCL's bindings for torch",
    "comm.enable_symm_mem_for_group": "nothing: on CPUs ranks of a host share memory by themselves",
    "comm.get_logged_comm_ops": "engine.job.byte_log.items()",
    "comm.torch.TorchBackend": "torch.distributed, or engine.job.communicator",
    "comm.torch.reduce_comm_off": "all_reduce_comm_off: nothing is reduced to one rank alone",
    "runtime.comm.coalesced_collectives.all_to_all_loco_quant_reduce": "the config's "
    "zero_optimization.zero_quantized_gradients with zeropp_loco_param",
    "runtime.comm.coalesced_collectives.all_to_all_quant_reduce": "the config's "
    "zero_optimization.zero_quantized_gradients",
    "runtime.comm.coalesced_collectives.reduce_scatter_coalesced": "comm.reduce_scatter_tensor of "
    "one flat tensor, as the engine does",
    "runtime.comm.hccl.HcclBackend": "runtime.comm.compressed.CompressedBackend, on any device",
    "compat.get_accelerator": "deepspeed.accelerator.get_accelerator",
    "elasticity.ensure_immutable_elastic_config": "nothing: ranks compare their configs",
    "io.FastFileWriter": "the config's checkpoint.background, which saves while training goes on",
    "inference.config.DeepSpeedInferenceConfig": "a dict for init_inference",
    "linear.Init": "drivetrain_compression.lora_over_quantised(model)",
    "module_inject.replace_transformer_layer": "init_inference",
    "module_inject.revert_transformer_layer": "nothing: modules are not replaced",
    "ops.adam.ZenFlowCPUAdam": "the config's zero_optimization.zenflow",
    "ops.adam.ZenFlowSelectiveAdamW": "the config's zero_optimization.zenflow",
    "pipe.DualPipeVModule": "pipe.PipelineModule with the config's pipeline.schedule zb_v",
    "runtime.fp16.loss_scaler.DynamicLossScaler": "engine.loss_scaler",
    "runtime.fp16.loss_scaler.LossScaler": "engine.loss_scaler",
    "runtime.lr_schedules.add_tuning_arguments": "arguments of the script's own; schedules are "
    "set in the config",
    "runtime.sequence_parallel.ulysses_sp.AutogradComputeMLP": "TiledMLP, with one tile",
    "sequence.cross_entropy.vocab_parallel_cross_entropy": "nothing yet",
    "sequence.layer.single_all_to_all": "sequence.layer.DistributedAttention, or to_heads and "
    "from_heads of drivetrain_sequence",
    "set_autotp_mode": "the config's tensor_parallel.autotp_size, for training and inference",
    "zero.DeepSpeedZeRoOffload": "an engine without optimizer at stage 3",
}
"""Name that nothing serves -> what to use."""

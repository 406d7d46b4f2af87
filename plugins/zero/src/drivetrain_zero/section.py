"""The config section ``zero_optimization``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from drivetrain.contracts import (
    NO_EFFECT,
    Bool,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Section,
)

_MOVED = {
    "cpu_offload": 'offload_optimizer: {"device": "cpu"}',
    "cpu_offload_params": 'offload_param: {"device": "cpu"}',
    "cpu_offload_param": 'offload_param: {"device": "cpu"}',
    "cpu_offload_use_pin_memory": "pin_memory in offload_optimizer and offload_param",
}
"""Keys of old configs, which may stay as long as they are off; what they are called now."""

_OTHER_NAMES = {
    **{
        name: f"stage3_{name}"
        for name in (
            *("prefetch_bucket_size", "param_persistence_threshold", "max_live_parameters"),
            *("model_persistence_threshold", "max_reuse_distance", "module_granularity_threshold"),
            *("gather_16bit_weights_on_model_save", "use_all_reduce_for_fetch_params"),
            "allgather_sequential",
        )
    },
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
}


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
"""Several names, or one that stands for a list of itself."""


class LeafModules(Section):
    """Modules that are fetched whole; accepted, because every unit is."""

    classes: Names = Field(default=(), description="Names of module classes.")
    names: Names = Field(default=(), description="Paths of modules.")
    name_suffixes: Names = Field(default=(), description="Ends of paths of modules.")


class LoCo(Section):
    """Error feedback of quantised gradients (LoCo-Zero++, arXiv:2407.04480)."""

    err_beta: NonNegativeFloat = Field(
        default=0.8, gt=0.0, le=1.0, description="Weight of the newest error in its moving average."
    )
    reset_T: PositiveInt = Field(  # noqa: N815 - the key's name
        default=1024, description="Steps after which the kept error is forgotten."
    )


class ZeroSection(Section):
    """ZeRO: model states sharded over data-parallel ranks (arXiv:1910.02054)."""

    renamed: ClassVar[Mapping[str, str]] = _OTHER_NAMES

    stage: Int = Field(
        default=0,
        ge=0,
        le=3,
        description="What is sharded: 1 optimizer states, 2 and gradients, 3 and parameters; 0 "
        "switches ZeRO off.",
    )
    gradient_reduction: Literal["micro_batch", "boundary"] | None = Field(
        default=None,
        description="When gradients of several micro-batches are reduced: after each (least "
        "memory) or once (least traffic). Default: at the boundary at stage 1, else each.",
    )
    reduce_bucket_size: PositiveInt | None = Field(
        default=None,
        description="Largest number of gradients reduced by one call at stages 1 and 2; by "
        "default 25 MiB of them. At stage 3 a unit is reduced by one call.",
    )
    overlap_comm: Bool | None = Field(
        default=None,
        description="Communicate while the device computes. Default: on every device but a CPU, "
        "which would have to do both.",
    )
    overlap_param_gather: Bool = Field(
        default=False,
        description="At stages 1 and 2, gather what was updated unit by unit in the next forward, "
        "ahead of its use where communication overlaps. Between steps parameters then read as NaN, "
        "as at stage 3, which always gathers in forward.",
    )
    round_robin_gradients: Bool = Field(
        default=False, description=f"{NO_EFFECT}every bucket is spread over all ranks already."
    )
    contiguous_gradients: Bool = Field(
        default=True, description=f"{NO_EFFECT}gradients are always reduced from flat buffers."
    )
    reduce_scatter: Bool = Field(
        default=True, description=f"{NO_EFFECT}gradients are always reduce-scattered."
    )
    use_multi_rank_bucket_allreduce: Bool = Field(
        default=True, description=f"{NO_EFFECT}gradients are always reduce-scattered."
    )
    allgather_partitions: Bool = Field(
        default=True, description=f"{NO_EFFECT}parameters are always all-gathered."
    )
    allgather_bucket_size: NonNegativeInt = Field(
        default=500_000_000, description=f"{NO_EFFECT}a bucket is gathered by one call."
    )
    load_from_fp32_weights: Bool = Field(
        default=True, description=f"{NO_EFFECT}masters are loaded where there are any."
    )
    elastic_checkpoint: Bool = Field(
        default=False, description=f"{NO_EFFECT}checkpoints load at every world size."
    )
    sub_group_size: NonNegativeInt = Field(
        default=1_000_000_000, description=f"{NO_EFFECT}updates run bucket by bucket."
    )
    ignore_unused_parameters: Bool = Field(
        default=True,
        description="false: a parameter without a gradient in a window is an error.",
    )
    legacy_stage1: Bool = Field(default=False, description="true is refused; use stage 1.")
    pipeline_loading_checkpoint: Bool = Field(
        default=False, description=f"{NO_EFFECT}loading reads only what a rank needs."
    )
    enable_sanity_checks: Bool = Field(
        default=False,
        description="Find parameters that were changed behind ZeRO's back, once a step.",
    )

    stage3_prefetch_bucket_size: NonNegativeInt = Field(
        default=50_000_000,
        description="Largest number of parameters gathered ahead of their use; 0 for none.",
    )
    stage3_param_persistence_threshold: NonNegativeInt = Field(
        default=100_000,
        description="Units with at most this many parameters stay gathered.",
    )
    stage3_model_persistence_threshold: NonNegativeInt = Field(
        default=2**63 - 1, description="Largest number of parameters that stay gathered."
    )
    stage3_max_live_parameters: NonNegativeInt = Field(
        default=1_000_000_000, description="Nothing is gathered ahead beyond this number."
    )
    stage3_max_reuse_distance: NonNegativeInt | None = Field(
        default=None,
        description="Keep a unit gathered when it is used again within this many parameters. "
        "Default: only the unit whose backward comes next.",
    )
    stage3_gather_16bit_weights_on_model_save: Bool = Field(
        default=False, description="Whether save_16bit_model may gather the weights."
    )
    stage3_module_granularity_threshold: NonNegativeInt = Field(
        default=0, description=f"{NO_EFFECT}repeated blocks are gathered as a whole."
    )
    stage3_use_all_reduce_for_fetch_params: Bool = Field(
        default=False, description=f"{NO_EFFECT}parameters are always all-gathered."
    )
    stage3_allgather_sequential: Bool = Field(
        default=False, description=f"{NO_EFFECT}a unit is gathered without a second copy."
    )
    memory_efficient_linear: Bool = Field(
        default=True, description=f"{NO_EFFECT}no linear layer keeps gathered weights."
    )
    override_module_apply: Bool = Field(
        default=True, description=f"{NO_EFFECT}Module.apply works inside zero.Init."
    )
    log_trace_cache_warnings: Bool = Field(
        default=False, description="Log when units are used in another order than learned."
    )
    leaf_module: LeafModules = Field(
        default_factory=LeafModules,
        description=f"{NO_EFFECT}everything in a unit travels together.",
    )
    save_muon_momentum_buffer_in_memory: Bool = Field(
        default=False, description=f"{NO_EFFECT}a state's home decides."
    )

    zero_hpz_partition_size: PositiveInt = Field(
        default=1,
        description="hpZ: ranks over which a second copy of the parameters is sharded, which "
        "backward gathers from; 1 for none (ZeRO++, arXiv:2306.10209).",
    )
    zero_quantized_weights: Bool = Field(
        default=False, description="qwZ: gather parameters as int8 blocks."
    )
    zero_quantized_nontrainable_weights: Bool = Field(
        default=False, description="Gather frozen parameters as int8 blocks."
    )
    zero_quantized_gradients: Bool = Field(
        default=False, description="qgZ: reduce gradients as int4 blocks."
    )
    zero_ranks_per_node: PositiveInt | None = Field(
        default=None,
        description="Ranks between which communication is fast: qgZ adds up gradients among them "
        "first and sends only sums further. Default: those on one host.",
    )
    zeropp_loco_param: LoCo | None = Field(
        default=None, description="Error feedback for qgZ; null for none."
    )
    mics_shard_size: Int = Field(
        default=-1,
        description="MiCS: ranks over which states are sharded, replicated over the others; -1 "
        "for all (arXiv:2205.00119).",
    )
    mics_hierarchical_params_gather: Bool = Field(
        default=False, description=f"{NO_EFFECT}the communicator chooses the route."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_old_spelling(cls, value: Any) -> Any:
        """``true`` once meant stage 1, and some keys had other names."""
        if isinstance(value, bool):
            return {"stage": int(value)}
        if not isinstance(value, dict):
            return value
        for key, successor in _MOVED.items():
            if value.get(key):
                raise ValueError(f"{key} is {successor} now")
        return {key: item for key, item in value.items() if key not in _MOVED}

    @model_validator(mode="after")
    def _possible(self) -> ZeroSection:
        if self.legacy_stage1:
            raise ValueError("legacy_stage1 is not supported: use stage 1")
        if self.mics_shard_size == 0 or self.mics_shard_size < -1:
            raise ValueError(
                f"mics_shard_size is {self.mics_shard_size}, expected -1 or at least 1"
            )
        if self.mics_shard_size > 0 and self.zero_hpz_partition_size > 1:
            raise ValueError(
                "mics_shard_size and zero_hpz_partition_size are both set; MiCS gathers inside a "
                "shard group already, so give one of them"
            )
        for key in ("zeropp_loco_param", "zero_ranks_per_node"):
            if getattr(self, key) is not None and not self.zero_quantized_gradients:
                raise ValueError(f"{key} needs zero_quantized_gradients: true")
        needs_any = {
            "zero_quantized_weights": self.zero_quantized_weights,
            "zero_quantized_gradients": self.zero_quantized_gradients,
            "mics_shard_size": self.mics_shard_size > 0,
        }
        for key, wanted in needs_any.items():
            if wanted and self.stage == 0:
                raise ValueError(f"{key} needs stage 1, 2 or 3, got stage 0, which shards nothing")
        needs_three = {
            "zero_hpz_partition_size": self.zero_hpz_partition_size > 1,
            "zero_quantized_nontrainable_weights": self.zero_quantized_nontrainable_weights,
        }
        for key, wanted in needs_three.items():
            if wanted and self.stage < 3:
                raise ValueError(f"{key} needs stage 3, got stage {self.stage}")
        return self

    @property
    def shards_gradients(self) -> bool:
        """Whether whole gradients are given up after every micro-batch."""
        if self.gradient_reduction is not None:
            return self.gradient_reduction == "micro_batch"
        return self.stage >= 2

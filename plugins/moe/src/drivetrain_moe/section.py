"""The config sections ``moe`` and ``expert_parallel``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, RootModel, model_validator

from drivetrain.contracts import (
    NO_EFFECT,
    Bool,
    Float,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Section,
)

MOE, EXPERT_PARALLEL = "moe", "expert_parallel"

_BY_ITSELF = (
    f"{NO_EFFECT}the model's own router runs as it is, and its experts are found by structure."
)


class MoESection(Section):
    """Layers of the class ``MoE`` in the model; they switch the plugin on by themselves."""

    ep_size: PositiveInt | None = Field(
        default=None,
        description="Ranks that share out the experts of a layer; by default what each layer says.",
    )
    report: Bool = Field(
        default=True,
        description="Put load of experts, its entropy and dropped tokens into the report of a "
        "step, by layer.",
    )
    over_tensor: Bool = Field(
        default=False,
        description="Where layers are tensor-parallel, share out experts over these ranks first. "
        "They have the same tokens, so each sends a share of them. Without, each sends all. For "
        "experts that are whole on each rank, as fused ones are.",
    )
    halves: Bool = Field(
        default=False,
        description="Have tokens travel in two halves: one travels while experts compute the "
        "other. For links that take as long as experts do.",
    )
    cached_experts: NonNegativeInt = Field(
        default=0,
        description="Of each layer, experts that the device of an engine which serves has room "
        "for; all weights lie in host memory, and are copied when they are needed. 0 keeps all on "
        "the device.",
    )


class ExpertParallelSection(Section):
    """Experts of a model of Transformers, or of one built alike, on ranks of their own."""

    enabled: Bool = Field(default=False, description="Share out the experts over ranks.")
    autoep_size: PositiveInt = Field(
        default=1,
        description="Ranks that share out the experts of a layer; divides their number.",
    )
    expert_tensor_parallel_size: Literal[1] = Field(
        default=1, description="Only 1: an expert is whole on its rank."
    )
    expert_pattern: str | None = Field(
        default=None,
        description="Regular expression of the names of modules with experts; by default those are "
        "taken that look like it.",
    )
    bias_update_rate: NonNegativeFloat = Field(
        default=0.0,
        description="Step by which the correction bias of a router (a buffer of one number for "
        "each expert) moves towards equal load after each update; 0 leaves it.",
    )
    check: Bool = Field(
        default=True,
        description="Compare each layer's experts on this rank with the model's own, on a few "
        "random tokens.",
    )
    preset_model: str | None = Field(default=None, description=_BY_ITSELF)
    use_grouped_mm: Bool = Field(default=True, description=_BY_ITSELF)
    disable_triton_grouped_mm: Bool = Field(default=False, description=_BY_ITSELF)
    score_func: Literal["auto", "softmax", "sigmoid"] = Field(
        default="auto", description=_BY_ITSELF
    )
    score_apply: Literal["auto", "pre", "post"] = Field(default="auto", description=_BY_ITSELF)
    combine_impl: Literal["auto", "weighted_sum", "legacy_bmm"] = Field(
        default="auto", description=_BY_ITSELF
    )
    route_norm: Bool | None = Field(default=None, description=_BY_ITSELF)
    route_scale: Float = Field(default=1.0, description=_BY_ITSELF)
    routed_scaling_factor: Float | Literal["auto"] = Field(default="auto", description=_BY_ITSELF)
    top_k: PositiveInt | Literal["auto"] = Field(default="auto", description=_BY_ITSELF)
    top_k_attr: str | None = Field(default=None, description=_BY_ITSELF)
    num_experts_attr: str | None = Field(default=None, description=_BY_ITSELF)
    num_expert_groups: PositiveInt | None = Field(default=None, description=_BY_ITSELF)
    num_limited_groups: PositiveInt | None = Field(default=None, description=_BY_ITSELF)
    moe_layer_pattern: str | None = Field(default=None, description=_BY_ITSELF)
    router_pattern: str | None = Field(default=None, description=_BY_ITSELF)
    expert_w1: str | None = Field(default=None, description=_BY_ITSELF)
    expert_w2: str | None = Field(default=None, description=_BY_ITSELF)
    expert_w3: str | None = Field(default=None, description=_BY_ITSELF)
    has_shared_experts: Bool | None = Field(default=None, description=_BY_ITSELF)
    shared_experts_pattern: str | None = Field(default=None, description=_BY_ITSELF)
    shared_experts_gate_pattern: str | None = Field(default=None, description=_BY_ITSELF)
    validate_folding_routing: Bool = Field(default=False, description=_BY_ITSELF)
    load_balance_coeff: Any = Field(
        default=None, description="Only null: give bias_update_rate for balance without a loss."
    )

    @property
    def ranks(self) -> int:
        """Over how many ranks experts are shared out; 1 where the section is switched off."""
        return self.autoep_size if self.enabled else 1

    @model_validator(mode="after")
    def _possible(self) -> ExpertParallelSection:
        if self.load_balance_coeff is not None:
            raise ValueError(
                "load_balance_coeff must be null: Transformers adds a balancing loss where the "
                "model's config has output_router_logits, and bias_update_rate balances without one"
            )
        return self


class DataBeforeExperts(RootModel[Bool]):
    """``use_data_before_expert_parallelism``: which ranks share out experts."""

    root: Bool = False

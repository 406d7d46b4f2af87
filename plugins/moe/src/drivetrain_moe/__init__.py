"""Mixtures of experts: a layer, and experts of any model shared out over ranks.

Names are imported when they are first used, so that a config can be checked without torch.
"""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "found": "FoundExperts find_experts",
        "experts": "ExpertList GroupedMLP",
        "grouped": "grouped_linear",
        "layer": "MoE",
        "routing": "Routed Routing route",
        "section": "ExpertParallelSection MoESection",
        "upcycling": "FoundMLP UpcycledMLP find_mlps upcycle",
        "utils": "configure_moe_param_groups get_expert_data_parallel_group "
        "get_expert_parallel_group get_expert_parallel_rank get_expert_parallel_world_size "
        "has_moe_layers is_moe_param "
        "split_params_into_different_moe_groups_for_optimizer "
        "split_params_into_shared_and_expert_params",
    },
)

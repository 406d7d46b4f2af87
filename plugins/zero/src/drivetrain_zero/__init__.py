"""ZeRO for Drivetrain: model states sharded over data-parallel ranks (arXiv:1910.02054).

Names are imported when they are first used, so that a config can be checked without torch.
"""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "scripts.estimates": (
            "estimate_zero2_model_states_mem_needs estimate_zero2_model_states_mem_needs_all_cold "
            "estimate_zero2_model_states_mem_needs_all_live estimate_zero3_model_states_mem_needs "
            "estimate_zero3_model_states_mem_needs_all_cold "
            "estimate_zero3_model_states_mem_needs_all_live"
        ),
        "scripts.export": "save_16bit_model",
        "init.init": "Init",
        "scripts.leaves": (
            "get_z3_leaf_modules set_z3_leaf_module set_z3_leaf_modules "
            "set_z3_leaf_modules_by_name set_z3_leaf_modules_by_suffix unset_z3_leaf_modules "
            "z3_leaf_module z3_leaf_parameter"
        ),
        "scripts.tensor_access": (
            "safe_get_full_fp32_param safe_get_full_grad safe_get_full_optimizer_state "
            "safe_get_local_fp32_param safe_get_local_grad safe_get_local_optimizer_state "
            "safe_set_full_fp32_param safe_set_full_grad safe_set_full_optimizer_state "
            "safe_set_local_fp32_param safe_set_local_grad safe_set_local_optimizer_state "
            "safe_update_full_grad_vectorized"
        ),
        "scripts.tiling": "TiledLinear TiledLinearReturnBias",
        "scripts.whole_use": (
            "GatheredParameters register_external_parameter unregister_external_parameter "
            "unwrap_model_for_generation"
        ),
    },
)

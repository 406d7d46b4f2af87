"""ZeRO for Drivetrain: model states sharded over data-parallel ranks (arXiv:1910.02054).

Names are imported when they are first used, so that a config can be checked without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drivetrain_zero.estimates import (
        estimate_zero2_model_states_mem_needs,
        estimate_zero2_model_states_mem_needs_all_cold,
        estimate_zero2_model_states_mem_needs_all_live,
        estimate_zero3_model_states_mem_needs,
        estimate_zero3_model_states_mem_needs_all_cold,
        estimate_zero3_model_states_mem_needs_all_live,
    )
    from drivetrain_zero.export import (
        save_16bit_model,
    )
    from drivetrain_zero.init import (
        Init,
    )
    from drivetrain_zero.leaves import (
        get_z3_leaf_modules,
        set_z3_leaf_module,
        set_z3_leaf_modules,
        set_z3_leaf_modules_by_name,
        set_z3_leaf_modules_by_suffix,
        unset_z3_leaf_modules,
        z3_leaf_module,
        z3_leaf_parameter,
    )
    from drivetrain_zero.tensor_access import (
        safe_get_full_fp32_param,
        safe_get_full_grad,
        safe_get_full_optimizer_state,
        safe_get_local_fp32_param,
        safe_get_local_grad,
        safe_get_local_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_grad,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_grad,
        safe_set_local_optimizer_state,
        safe_update_full_grad_vectorized,
    )
    from drivetrain_zero.tiling import (
        TiledLinear,
        TiledLinearReturnBias,
    )
    from drivetrain_zero.whole_use import (
        GatheredParameters,
        register_external_parameter,
        unregister_external_parameter,
        unwrap_model_for_generation,
    )

__all__ = [
    "GatheredParameters",
    "Init",
    "TiledLinear",
    "TiledLinearReturnBias",
    "estimate_zero2_model_states_mem_needs",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
    "estimate_zero3_model_states_mem_needs",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
    "get_z3_leaf_modules",
    "register_external_parameter",
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
    "safe_update_full_grad_vectorized",
    "save_16bit_model",
    "set_z3_leaf_module",
    "set_z3_leaf_modules",
    "set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix",
    "unregister_external_parameter",
    "unset_z3_leaf_modules",
    "unwrap_model_for_generation",
    "z3_leaf_module",
    "z3_leaf_parameter",
]

_HOME = {
    "estimate_zero2_model_states_mem_needs": "estimates",
    "estimate_zero2_model_states_mem_needs_all_cold": "estimates",
    "estimate_zero2_model_states_mem_needs_all_live": "estimates",
    "estimate_zero3_model_states_mem_needs": "estimates",
    "estimate_zero3_model_states_mem_needs_all_cold": "estimates",
    "estimate_zero3_model_states_mem_needs_all_live": "estimates",
    "save_16bit_model": "export",
    "Init": "init",
    "get_z3_leaf_modules": "leaves",
    "set_z3_leaf_module": "leaves",
    "set_z3_leaf_modules": "leaves",
    "set_z3_leaf_modules_by_name": "leaves",
    "set_z3_leaf_modules_by_suffix": "leaves",
    "unset_z3_leaf_modules": "leaves",
    "z3_leaf_module": "leaves",
    "z3_leaf_parameter": "leaves",
    "safe_get_full_fp32_param": "tensor_access",
    "safe_get_full_grad": "tensor_access",
    "safe_get_full_optimizer_state": "tensor_access",
    "safe_get_local_fp32_param": "tensor_access",
    "safe_get_local_grad": "tensor_access",
    "safe_get_local_optimizer_state": "tensor_access",
    "safe_set_full_fp32_param": "tensor_access",
    "safe_set_full_grad": "tensor_access",
    "safe_set_full_optimizer_state": "tensor_access",
    "safe_set_local_fp32_param": "tensor_access",
    "safe_set_local_grad": "tensor_access",
    "safe_set_local_optimizer_state": "tensor_access",
    "safe_update_full_grad_vectorized": "tensor_access",
    "TiledLinear": "tiling",
    "TiledLinearReturnBias": "tiling",
    "GatheredParameters": "whole_use",
    "register_external_parameter": "whole_use",
    "unregister_external_parameter": "whole_use",
    "unwrap_model_for_generation": "whole_use",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'drivetrain_zero' has no attribute {name!r}")
    value = getattr(import_module(f"drivetrain_zero.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

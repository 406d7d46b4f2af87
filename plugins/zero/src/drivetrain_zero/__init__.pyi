from drivetrain_zero.init.init import (
    Init as Init,
)
from drivetrain_zero.scripts.estimates import (
    estimate_zero2_model_states_mem_needs as estimate_zero2_model_states_mem_needs,
)
from drivetrain_zero.scripts.estimates import (
    estimate_zero2_model_states_mem_needs_all_cold as estimate_zero2_model_states_mem_needs_all_cold,
)
from drivetrain_zero.scripts.estimates import (
    estimate_zero2_model_states_mem_needs_all_live as estimate_zero2_model_states_mem_needs_all_live,
)
from drivetrain_zero.scripts.estimates import (
    estimate_zero3_model_states_mem_needs as estimate_zero3_model_states_mem_needs,
)
from drivetrain_zero.scripts.estimates import (
    estimate_zero3_model_states_mem_needs_all_cold as estimate_zero3_model_states_mem_needs_all_cold,
)
from drivetrain_zero.scripts.estimates import (
    estimate_zero3_model_states_mem_needs_all_live as estimate_zero3_model_states_mem_needs_all_live,
)
from drivetrain_zero.scripts.export import (
    save_16bit_model as save_16bit_model,
)
from drivetrain_zero.scripts.leaves import (
    get_z3_leaf_modules as get_z3_leaf_modules,
)
from drivetrain_zero.scripts.leaves import (
    set_z3_leaf_module as set_z3_leaf_module,
)
from drivetrain_zero.scripts.leaves import (
    set_z3_leaf_modules as set_z3_leaf_modules,
)
from drivetrain_zero.scripts.leaves import (
    set_z3_leaf_modules_by_name as set_z3_leaf_modules_by_name,
)
from drivetrain_zero.scripts.leaves import (
    set_z3_leaf_modules_by_suffix as set_z3_leaf_modules_by_suffix,
)
from drivetrain_zero.scripts.leaves import (
    unset_z3_leaf_modules as unset_z3_leaf_modules,
)
from drivetrain_zero.scripts.leaves import (
    z3_leaf_module as z3_leaf_module,
)
from drivetrain_zero.scripts.leaves import (
    z3_leaf_parameter as z3_leaf_parameter,
)
from drivetrain_zero.scripts.tensor_access import (
    safe_get_full_fp32_param as safe_get_full_fp32_param,
)
from drivetrain_zero.scripts.tensor_access import (
    safe_get_full_grad as safe_get_full_grad,
)
from drivetrain_zero.scripts.tensor_access import (
    safe_get_full_optimizer_state as safe_get_full_optimizer_state,
)
from drivetrain_zero.scripts.tensor_access import (
    safe_get_local_fp32_param as safe_get_local_fp32_param,
)
from drivetrain_zero.scripts.tensor_access import (
    safe_get_local_grad as safe_get_local_grad,
)
from drivetrain_zero.scripts.tensor_access import (
    safe_get_local_optimizer_state as safe_get_local_optimizer_state,
)
from drivetrain_zero.scripts.tensor_access import (
    safe_set_full_fp32_param as safe_set_full_fp32_param,
)
from drivetrain_zero.scripts.tensor_access import (
    safe_set_full_grad as safe_set_full_grad,
)
from drivetrain_zero.scripts.tensor_access import (
    safe_set_full_optimizer_state as safe_set_full_optimizer_state,
)
from drivetrain_zero.scripts.tensor_access import (
    safe_set_local_fp32_param as safe_set_local_fp32_param,
)
from drivetrain_zero.scripts.tensor_access import (
    safe_set_local_grad as safe_set_local_grad,
)
from drivetrain_zero.scripts.tensor_access import (
    safe_set_local_optimizer_state as safe_set_local_optimizer_state,
)
from drivetrain_zero.scripts.tensor_access import (
    safe_update_full_grad_vectorized as safe_update_full_grad_vectorized,
)
from drivetrain_zero.scripts.tiling import (
    TiledLinear as TiledLinear,
)
from drivetrain_zero.scripts.tiling import (
    TiledLinearReturnBias as TiledLinearReturnBias,
)
from drivetrain_zero.scripts.whole_use import (
    GatheredParameters as GatheredParameters,
)
from drivetrain_zero.scripts.whole_use import (
    register_external_parameter as register_external_parameter,
)
from drivetrain_zero.scripts.whole_use import (
    unregister_external_parameter as unregister_external_parameter,
)
from drivetrain_zero.scripts.whole_use import (
    unwrap_model_for_generation as unwrap_model_for_generation,
)

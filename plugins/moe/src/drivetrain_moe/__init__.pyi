from drivetrain_moe.experts import ExpertList as ExpertList
from drivetrain_moe.experts import GroupedMLP as GroupedMLP
from drivetrain_moe.found import FoundExperts as FoundExperts
from drivetrain_moe.found import find_experts as find_experts
from drivetrain_moe.grouped import grouped_linear as grouped_linear
from drivetrain_moe.layer import MoE as MoE
from drivetrain_moe.routing import Routed as Routed
from drivetrain_moe.routing import Routing as Routing
from drivetrain_moe.routing import route as route
from drivetrain_moe.section import ExpertParallelSection as ExpertParallelSection
from drivetrain_moe.section import MoESection as MoESection
from drivetrain_moe.upcycling import FoundMLP as FoundMLP
from drivetrain_moe.upcycling import UpcycledMLP as UpcycledMLP
from drivetrain_moe.upcycling import find_mlps as find_mlps
from drivetrain_moe.upcycling import upcycle as upcycle
from drivetrain_moe.utils import configure_moe_param_groups as configure_moe_param_groups
from drivetrain_moe.utils import get_expert_data_parallel_group as get_expert_data_parallel_group
from drivetrain_moe.utils import get_expert_parallel_group as get_expert_parallel_group
from drivetrain_moe.utils import get_expert_parallel_rank as get_expert_parallel_rank
from drivetrain_moe.utils import get_expert_parallel_world_size as get_expert_parallel_world_size
from drivetrain_moe.utils import has_moe_layers as has_moe_layers
from drivetrain_moe.utils import is_moe_param as is_moe_param
from drivetrain_moe.utils import (
    split_params_into_different_moe_groups_for_optimizer as split_params_into_different_moe_groups_for_optimizer,
)
from drivetrain_moe.utils import (
    split_params_into_shared_and_expert_params as split_params_into_shared_and_expert_params,
)

from drivetrain_activation_checkpointing.scripts import checkpoint as checkpoint
from drivetrain_activation_checkpointing.scripts import configure as configure
from drivetrain_activation_checkpointing.scripts import is_configured as is_configured
from drivetrain_activation_checkpointing.scripts import (
    non_reentrant_checkpoint as non_reentrant_checkpoint,
)
from drivetrain_activation_checkpointing.scripts import (
    partition_activations_in_checkpoint as partition_activations_in_checkpoint,
)
from drivetrain_activation_checkpointing.scripts import reset as reset
from drivetrain_activation_checkpointing.scripts import set_num_layers as set_num_layers
from drivetrain_activation_checkpointing.section import (
    ActivationCheckpointingSection as ActivationCheckpointingSection,
)
from drivetrain_activation_checkpointing.streams import ParallelStreams as ParallelStreams
from drivetrain_activation_checkpointing.streams import get_cuda_rng_tracker as get_cuda_rng_tracker
from drivetrain_activation_checkpointing.streams import (
    model_parallel_cuda_manual_seed as model_parallel_cuda_manual_seed,
)
from drivetrain_activation_checkpointing.streams import (
    model_parallel_reconfigure_tp_seed as model_parallel_reconfigure_tp_seed,
)

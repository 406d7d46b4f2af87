from drivetrain_tensor.cross_entropy import (
    vocab_parallel_cross_entropy as vocab_parallel_cross_entropy,
)
from drivetrain_tensor.lazy_tensor import whole_logits as whole_logits
from drivetrain_tensor.scripts import tp_model_init as tp_model_init
from drivetrain_tensor.section import TensorParallelSection as TensorParallelSection

from drivetrain.testing.accelerators import AcceleratorConformance as AcceleratorConformance
from drivetrain.testing.conformance import PluginConformance as PluginConformance
from drivetrain.testing.distributed import RankError as RankError
from drivetrain.testing.distributed import RanksFailedError as RanksFailedError
from drivetrain.testing.distributed import run_distributed as run_distributed
from drivetrain.testing.optimizers import OptimizerConformance as OptimizerConformance
from drivetrain.testing.reference import (
    assert_trains_like_reference as assert_trains_like_reference,
)
from drivetrain.testing.reference import reference_losses as reference_losses
from drivetrain.testing.state import StateConformance as StateConformance

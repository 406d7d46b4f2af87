"""What tests of Drivetrain and of its plugins are made with; public, and stable as core is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.lazy import lazy_names

if TYPE_CHECKING:
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

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "accelerators": "AcceleratorConformance",
        "conformance": "PluginConformance",
        "distributed": "RankError RanksFailedError run_distributed",
        "optimizers": "OptimizerConformance",
        "reference": "assert_trains_like_reference reference_losses",
        "state": "StateConformance",
    },
)

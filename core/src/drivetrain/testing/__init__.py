"""What tests of Drivetrain and of its plugins are made with; public, and stable as core is."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

_HOME = {
    "AcceleratorConformance": "accelerators",
    "OptimizerConformance": "optimizers",
    "PluginConformance": "conformance",
    "RankError": "distributed",
    "RanksFailedError": "distributed",
    "StateConformance": "state",
    "assert_trains_like_reference": "reference",
    "reference_losses": "reference",
    "run_distributed": "distributed",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'drivetrain.testing' has no attribute {name!r}")
    value = getattr(import_module(f"drivetrain.testing.{_HOME[name]}"), name)
    globals()[name] = value
    return value

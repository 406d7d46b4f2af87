"""What every plugin holds to."""

from __future__ import annotations

from drivetrain_zero.plugin import Zero

from drivetrain.testing import PluginConformance


class TestZero(PluginConformance):
    plugin = Zero
    config = {
        "zero_optimization": {
            "stage": 3,
            "gradient_reduction": "boundary",
            "stage3_param_persistence_threshold": 0,
        }
    }

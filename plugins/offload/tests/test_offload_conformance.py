"""What every plugin holds to."""

from __future__ import annotations

from drivetrain_offload.plugin import Offload

from drivetrain.testing import PluginConformance


class TestOffload(PluginConformance):
    plugin = Offload
    config = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}


class TestOffloadThatGuesses(PluginConformance):
    plugin = Offload
    config = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "super_offload": True}}}


class TestOffloadByImportance(PluginConformance):
    plugin = Offload
    config = {
        "bf16": {"enabled": True},
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}, "zenflow": {}},
    }

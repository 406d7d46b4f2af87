"""What tests of Drivetrain and of its plugins are made with; public, and stable as core is."""

from __future__ import annotations

from drivetrain.lazy import lazy_names

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

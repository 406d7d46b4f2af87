"""Drivetrain: training and serving of large PyTorch models, from a small core and plugins.

Names are imported when they are first used: ``import drivetrain`` itself imports neither torch nor
pydantic nor any plugin.
"""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "contracts.plugin.plugin": "Plugin hookimpl",
        "states.whole": "whole",
        "engine.engine": "Engine",
        "engine.initialize": "initialize",
        "job.job": "Job init_distributed",
        "modules.attention": "attention",
        "modules.materialize": "materialize",
        "plan.config.arguments": "add_config_arguments",
        "plan.plan": "Plan",
        "states.units": "units",
        "version": "__version__",
    },
    submodules=("errors",),
)

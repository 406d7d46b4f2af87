"""Drivetrain: training and serving of large PyTorch models, from a small core and plugins.

Names are imported when they are first used: ``import drivetrain`` itself imports neither torch nor
pydantic nor any plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.lazy import lazy_names

if TYPE_CHECKING:
    from drivetrain import errors as errors
    from drivetrain.contracts.plugin.plugin import Plugin as Plugin
    from drivetrain.contracts.plugin.plugin import hookimpl as hookimpl
    from drivetrain.engine.engine import Engine as Engine
    from drivetrain.engine.initialize import initialize as initialize
    from drivetrain.job.job import Job as Job
    from drivetrain.job.job import init_distributed as init_distributed
    from drivetrain.plan.config.arguments import add_config_arguments as add_config_arguments
    from drivetrain.plan.plan import Plan as Plan
    from drivetrain.states.units import units as units
    from drivetrain.states.whole import whole as whole
    from drivetrain.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "contracts.plugin.plugin": "Plugin hookimpl",
        "states.whole": "whole",
        "engine.engine": "Engine",
        "engine.initialize": "initialize",
        "job.job": "Job init_distributed",
        "plan.config.arguments": "add_config_arguments",
        "plan.plan": "Plan",
        "states.units": "units",
        "version": "__version__",
    },
    submodules=("errors",),
)

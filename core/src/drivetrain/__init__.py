"""Drivetrain: training and serving of large PyTorch models, from a small core and plugins.

Names are imported when they are first used: ``import drivetrain`` itself imports neither torch nor
pydantic nor any plugin.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drivetrain import errors as errors
    from drivetrain.config.arguments import add_config_arguments as add_config_arguments
    from drivetrain.engine import Engine as Engine
    from drivetrain.initialize import initialize as initialize
    from drivetrain.job import Job as Job
    from drivetrain.job import init_distributed as init_distributed
    from drivetrain.parameters import whole as whole
    from drivetrain.plan import Plan as Plan
    from drivetrain.plugin import Plugin as Plugin
    from drivetrain.plugin import hookimpl as hookimpl
    from drivetrain.units import units as units

__version__ = "0.1.0"

_HOME = {
    "Engine": "drivetrain.engine",
    "Job": "drivetrain.job",
    "Plan": "drivetrain.plan",
    "Plugin": "drivetrain.plugin",
    "add_config_arguments": "drivetrain.config.arguments",
    "hookimpl": "drivetrain.plugin",
    "init_distributed": "drivetrain.job",
    "initialize": "drivetrain.initialize",
    "units": "drivetrain.units",
    "whole": "drivetrain.parameters",
}

__all__ = ["__version__", "errors", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("drivetrain.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'drivetrain' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps ``drivetrain.units`` and ``drivetrain.initialize`` the functions.

    The import system binds a submodule to its name in the package; where a public function has
    that very name, whoever imported the submodule first would otherwise decide what users get.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _HOME:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

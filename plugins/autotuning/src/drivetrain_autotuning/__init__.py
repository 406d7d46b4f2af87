"""Finds the config with which a script runs fastest: ``drivetrain tune``."""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, {"autotuner": "Autotuner"})

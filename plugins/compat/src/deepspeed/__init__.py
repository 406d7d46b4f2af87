"""``import deepspeed`` on top of Drivetrain: names of DeepSpeed, each mapped to what does it here.

This package holds no behaviour of its own that a training run needs: names lead to Drivetrain's
objects, which are imported when they are first used. Which name leads where is in
``deepspeed._surface``; packages of Drivetrain add theirs by entry points of the group
``drivetrain.deepspeed``.
"""

from __future__ import annotations

from typing import Any

from deepspeed._surface import beside, modules

__version__ = "0.19.8+drivetrain.0.1.0"
__version_major__, __version_minor__, __version_patch__ = 0, 19, 8
__git_hash__ = __git_branch__ = "unknown"

beside.check(__path__)
modules.install()


def __getattr__(name: str) -> Any:
    return modules.attribute(__name__, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *modules.names_in(__name__)})

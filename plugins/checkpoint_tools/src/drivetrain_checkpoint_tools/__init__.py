"""What can be done with checkpoints beside saving and loading them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drivetrain_checkpoint_tools.background import wait_for_saves as wait_for_saves
    from drivetrain_checkpoint_tools.comparison import diff as diff
    from drivetrain_checkpoint_tools.deepspeed import import_deepspeed as import_deepspeed
    from drivetrain_checkpoint_tools.exporting import export as export
    from drivetrain_checkpoint_tools.hugging_face import import_weights as import_weights
    from drivetrain_checkpoint_tools.hugging_face import load_pretrained as load_pretrained
    from drivetrain_checkpoint_tools.inspection import inspect as inspect
    from drivetrain_checkpoint_tools.verification import verify as verify

_HOME = {
    "diff": "comparison",
    "export": "exporting",
    "import_deepspeed": "deepspeed",
    "import_weights": "hugging_face",
    "inspect": "inspection",
    "load_pretrained": "hugging_face",
    "verify": "verification",
    "wait_for_saves": "background",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value

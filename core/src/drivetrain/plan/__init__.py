"""What runs, decided without torch: a config, the plugins that it names, and the mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.lazy import lazy_names

if TYPE_CHECKING:
    from drivetrain.plan.plan import Plan as Plan
    from drivetrain.plan.registry import Entry as Entry
    from drivetrain.plan.registry import Registry as Registry

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "plan": "Plan",
        "registry": "Entry Registry",
    },
)

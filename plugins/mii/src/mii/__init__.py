"""``import mii`` on Drivetrain: ``pipeline``, ``serve`` and ``client`` of DeepSpeed-MII.

Names are imported when they are first used.
"""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__version__ = "0.3.4+drivetrain.0.1.0"

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "asking": "MIIClient client",
        "deployments": "serve",
        "here": "MIIPipeline pipeline",
        "options": "UnknownArgument",
        "responses": "Response",
    },
)

"""What a model computes and how long it takes, by module; what ranks send and how fast, by size.

Names are imported when they are first used, so that a config can be checked without torch.
"""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "formulas": "register_formula",
        "log": "configure get_comm_operation_count has_comm_data log_summary reset_log",
        "profiler": "FlopsProfiler get_model_profile",
        "sections": "CommsLoggerSection FlopsProfilerSection",
    },
)

"""Model states and activations in host memory and on NVMe.

Names are imported when they are first used, so that a config can be checked without torch.
"""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "file_io": "AsyncFile FileIOError Request aligned_empty",
        "memory": "MemoryRow memory_table memory_text",
        "on_demand.states": "StateKind offload_states reload_states state_devices",
    },
)

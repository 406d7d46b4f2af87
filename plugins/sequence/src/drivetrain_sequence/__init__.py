"""Sequences shared out over ranks, and computed in tiles.

Names are imported when they are first used, so that a config can be checked without torch.
"""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "heads": "HeadShare from_heads to_heads",
        "layout": "Cut",
        "losses": "mean_over_sequence token_losses",
        "section": "SequenceParallelSection",
        "tiles": "in_tiles",
    },
)

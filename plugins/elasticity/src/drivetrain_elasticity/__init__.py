"""Jobs whose number of ranks changes: batch sizes that fit, and leaving in time.

Names are imported when they are first used, so that a config can be checked without torch.
"""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "batches": "ElasticBatch compute_elastic_config solve valid_sizes",
        "resuming": "resume",
        "section": "ElasticitySection",
    },
)

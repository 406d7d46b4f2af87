"""The same quality from less data: curricula, analysis, token dropping, batches by tokens, shards.

Names are imported when they are first used, so that a config can be checked without torch.
"""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "analysis.analyzer": "Analyzer",
        "analysis.fingerprint": "fingerprint",
        "analysis.indexed": "IndexedDataset IndexedWriter",
        "analysis.metrics": "Metric gradient_norm length model_loss near_duplicates vocabulary "
        "vocabulary_rarity",
        "plugin": "DataEfficiency",
        "routing.random_ltd": "consumed_layer_tokens",
        "sampling.curriculum": "CurriculumOrder",
        "sampling.loading": "current_difficulties set_custom_curriculum_learning_schedule "
        "set_data_post_process_func",
        "section": "DataEfficiencySection",
        "streaming.index": "ShardIndex index_shards",
        "streaming.order": "ShardOrder",
        "streaming.parquet": "ParquetShards",
        "streaming.sharded": "ShardedDataset",
        "streaming.tar": "TarShards",
    },
)

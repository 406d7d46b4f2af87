"""Smaller models: quantisation, pruning, fewer layers and distillation, by recipes.

Names are imported when they are first used, so that a config can be checked without torch.
"""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "compressing": "compress compress_module",
        "files.loading": "load_compressed",
        "files.packed": "load_packed",
        "plugin": "Compression",
        "recipe.modifier": "CompressionUnit Modifier ModifierConfig Place Progress Target",
        "recipe.recipe": "Recipe",
        "section": "CompressionSection",
        "training.api": "init_compression redundancy_clean student_initialization",
        "stored.config": "LoRAConfig QuantizationConfig",
        "stored.converting": "lora_over_quantised",
        "stored.linear": "LoRALinear StoredLinear",
        "stored.serving": "store_for_serving",
        "stored.weight": "StoredWeight",
        "students.distilling": "Distillation",
    },
)

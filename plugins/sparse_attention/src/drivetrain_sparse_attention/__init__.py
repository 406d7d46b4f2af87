"""Attention to some blocks of keys only.

Names are imported when they are first used, so that a config can be checked without torch.
"""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "blockwise": "MatMul Softmax",
        "function": "attend_to_blocks",
        "layouts": "BSLongformerSparsityConfig BigBirdSparsityConfig DenseSparsityConfig "
        "FixedSparsityConfig LocalSlidingWindowSparsityConfig SparsityConfig "
        "VariableSparsityConfig",
        "scripts": "BertSparseSelfAttention SparseSelfAttention",
        "section": "SparseAttentionSection",
        "topk": "choose_blocks",
        "utils": "SparseAttentionUtils",
        "visibility": "Blocks visible_blocks",
    },
)

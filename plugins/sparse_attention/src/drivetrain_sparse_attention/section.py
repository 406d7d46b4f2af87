"""The config section ``sparse_attention``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from drivetrain.contracts import Bool, NonNegativeInt, PositiveInt, Section

PATH = "sparse_attention"

Mode = Literal["dense", "fixed", "variable", "bigbird", "bslongformer", "local", "topk"]


class SparseAttentionSection(Section):
    """Which blocks of keys a block of queries attends to. Keys of other modes mean nothing."""

    mode: Mode = Field(
        default="fixed",
        description="The kind of layout; topk measures which blocks matter, in every forward.",
    )
    block: PositiveInt = Field(default=16, description="Tokens of a block.")
    different_layout_per_head: Bool = Field(
        default=False,
        description="Give heads layouts of their own; else all have that of the first.",
    )
    attention: str = Field(
        default="bidirectional",
        description="bidirectional, or unidirectional for layouts without blocks ahead of the "
        "queries'. A causal model attends to no token ahead in any case.",
    )
    num_local_blocks: PositiveInt = Field(default=4, description="fixed: blocks of a window.")
    num_global_blocks: NonNegativeInt = Field(
        default=1,
        description="fixed: blocks of each window that all see; bigbird: first blocks, which see "
        "and are seen by all.",
    )
    horizontal_global_attention: Bool = Field(
        default=False, description="fixed, variable: global blocks see all blocks as well."
    )
    num_different_global_patterns: PositiveInt = Field(
        default=1, description="fixed: places of global blocks in windows, over the heads."
    )
    num_random_blocks: NonNegativeInt | None = Field(
        default=None, description="variable (0 if unset), bigbird (1): random blocks of a row."
    )
    local_window_blocks: list[PositiveInt] = Field(
        default=[4], description="variable: blocks of each window in order; the last repeats."
    )
    global_block_indices: list[NonNegativeInt] = Field(
        default=[0], description="variable, bslongformer: global blocks, or first ones of ranges."
    )
    global_block_end_indices: list[NonNegativeInt] | None = Field(
        default=None, description="variable, bslongformer: where these ranges end (exclusive)."
    )
    num_sliding_window_blocks: PositiveInt = Field(
        default=3, description="bigbird, bslongformer, local: blocks of the band around a block."
    )
    top_k: PositiveInt = Field(
        default=16, description="topk: blocks of a row, the queries' own and the first included."
    )
    seed: NonNegativeInt = Field(default=0, description="variable, bigbird: seed of random blocks.")

    def arguments(self) -> dict[str, Any]:
        """Arguments of the mode's sparsity config, but for the number of heads."""
        random = self.num_random_blocks
        ranges = {
            "global_block_indices": self.global_block_indices,
            "global_block_end_indices": self.global_block_end_indices,
        }
        common = {
            "block": self.block,
            "different_layout_per_head": self.different_layout_per_head,
            "attention": self.attention,
        }
        window = {"num_sliding_window_blocks": self.num_sliding_window_blocks}
        own: dict[str, dict[str, Any]] = {
            "fixed": {
                "num_local_blocks": self.num_local_blocks,
                "num_global_blocks": self.num_global_blocks,
                "horizontal_global_attention": self.horizontal_global_attention,
                "num_different_global_patterns": self.num_different_global_patterns,
            },
            "variable": {
                "num_random_blocks": random or 0,
                "local_window_blocks": self.local_window_blocks,
                **ranges,
                "horizontal_global_attention": self.horizontal_global_attention,
                "seed": self.seed,
            },
            "bigbird": {
                "num_random_blocks": 1 if random is None else random,
                **window,
                "num_global_blocks": self.num_global_blocks,
                "seed": self.seed,
            },
            "bslongformer": {**window, **ranges},
            "local": window,
        }
        return {**common, **own[self.mode]}

"""The config section ``sequence_parallel``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from drivetrain.contracts import Bool, PositiveInt, Scalar, Section

PATH, SIZE = "sequence_parallel", "sequence_parallel_size"


Tile = PositiveInt | Literal["measured"] | None
"""Tokens; ``"measured"`` finds out how many. Without, nothing is computed in tiles."""


class SequenceParallelSize(Scalar[PositiveInt | None]):
    """Ranks that share one sequence; 1 if unset."""

    root: PositiveInt | None = None


class SequenceParallelSection(Section):
    """How sequences are shared out over ranks, and what of the model is computed in tiles."""

    ring_size: PositiveInt = Field(
        default=1,
        description="Ranks that pass keys and values on to each other, a divisor of "
        "sequence_parallel_size; the others exchange heads, of which there have to be as many.",
    )
    inputs: Literal["auto", "cut", "whole"] = Field(
        default="auto",
        description="Who gives each rank its part of a batch: cut, the engine, in every forward; "
        "whole, the script hands in parts; auto cuts where it can know what to do.",
    )
    probe: Bool = Field(
        default=True,
        description="Compare a few tokens of the first batch, in parts, with the same model in one "
        "piece, and refuse a model whose results differ.",
    )
    towers: Literal["whole", "shared"] = Field(
        default="whole",
        description="Of models of images and text: whole, each rank computes towers of images "
        "whole; shared, ranks share out their patches and exchange heads. Not with ring_size.",
    )
    loss_tile: Tile = Field(
        default=None,
        description="Tokens whose logits are in memory at a time; what they give for gradients is "
        "computed with them, and the model returns none when it is given labels. measured: as many "
        "as take a 32nd of the memory that is free at the first forward.",
    )
    mlp_tile: Tile = Field(
        default=None,
        description="Tokens that go through an MLP at a time; computed again in backward. "
        "measured: as many, of all rows together, as take a 32nd of the memory that is free.",
    )
    norm_tile: Tile = Field(
        default=None,
        description="Tokens that go through a norm (of the last dimension) at a time; computed "
        "again in backward. measured: as with mlp_tile.",
    )
    tiled_modules: dict[str, PositiveInt] = Field(
        default={},
        description="Tokens that go through other modules of single tokens at a time, by patterns "
        "of their names (`*` stands for any part); computed again in backward.",
    )
    chunk: PositiveInt | None = Field(
        default=None,
        description="Tokens of the whole sequence that go through a repeated block at a time; "
        "a chunk's forward is repeated in backward. A multiple of sequence_parallel_size.",
    )
    chunk_offload: Bool = Field(
        default=True,
        description="Keep inputs, keys, values and results of attention of the chunks that are "
        "not computed in host memory.",
    )

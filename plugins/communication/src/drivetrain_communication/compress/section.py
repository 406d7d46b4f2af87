"""The config section ``communication.compress``."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from drivetrain.contracts import Bool, NonNegativeInt, PositiveFloat, PositiveInt, Section

PATH = "communication.compress"

BLOCKS = ("int8", "int4", "fp8_e4m3", "fp8_e5m2")
"""Methods that turn blocks of numbers into codes with a scale each."""


class Method(Section):
    """How the collectives of one purpose are compressed."""

    method: Literal["int8", "int4", "fp8_e4m3", "fp8_e5m2", "powersgd", "top_k"] = Field(
        description="Codes of 8 or 4 bits in blocks with a scale each, matrices of low rank "
        "(arXiv:1905.13727), or only the largest elements (arXiv:1704.05021)."
    )
    error_feedback: Bool | None = Field(
        default=None,
        description="Keep what compression leaves out, and add it to what is sent next. Default: "
        "with powersgd and top_k, which need it.",
    )
    block: PositiveInt = Field(
        default=256, multiple_of=2, description="Numbers that share a scale; an even number."
    )
    rank: PositiveInt = Field(default=4, description="Of the matrices of powersgd.")
    density: PositiveFloat = Field(
        default=0.01, le=1, description="Share of the elements that top_k sends."
    )
    minimum_bytes: NonNegativeInt = Field(
        default=4096, description="Smaller tensors travel as they are."
    )

    @property
    def feeds_back(self) -> bool:
        """Whether errors are kept."""
        if self.error_feedback is None:
            return self.method not in BLOCKS
        return self.error_feedback

    @model_validator(mode="after")
    def _converges(self) -> Self:
        if self.method not in BLOCKS and self.error_feedback is False:
            raise ValueError(
                f"{self.method} does not converge without error_feedback; leave that out"
            )
        return self


class OnTheFly(Method):
    """How numbers are compressed that are others each time, so that no error can be fed back."""

    method: Literal["int8", "int4", "fp8_e4m3", "fp8_e5m2"] = Field(
        description="Codes of 8 or 4 bits in blocks with a scale each."
    )

    @model_validator(mode="after")
    def _has_no_errors(self) -> Self:
        if self.error_feedback:
            raise ValueError(
                "error_feedback is for gradients: an error of these would be added to other numbers"
            )
        return self


class CompressSection(Section):
    """What travels compressed, by purpose."""

    gradients: Method | None = Field(
        default=None, description="Sums of gradients over data-parallel ranks."
    )
    weights: OnTheFly | None = Field(
        default=None,
        description="Gathers of parameters. Not those of ZeRO, which has zero_quantized_weights.",
    )
    activations: OnTheFly | None = Field(
        default=None,
        description="What layers exchange in forward and backward (tensor and sequence "
        "parallelism), without experts' tokens.",
    )
    experts: OnTheFly | None = Field(
        default=None, description="Tokens on their way to experts and back, and their gradients."
    )

"""The section ``weight_quantization``: weights of an engine that only serves, in few bits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from drivetrain.contracts import Bool, NonNegativeInt, Section

PATH = "weight_quantization"


class GroupSection(Section):
    """How weights lie in memory."""

    num_bits: Literal[4, 8] = Field(default=8, description="Bits of a number, 4 or 8.")
    group_size: NonNegativeInt = Field(
        default=64, description="Numbers that share a scale; even. 0: all along the dimension."
    )
    group_dim: Annotated[int, Field(ge=-2, le=1)] = Field(
        default=1, description="Dimension of the weight [out, in] along which groups lie."
    )
    symmetric: Bool = Field(default=False, description="Scales alone, without offsets.")
    format: str = Field(
        default="",
        description="Name of a weight format of any installed package, in place of all of these.",
    )

    @model_validator(mode="after")
    def _is_one(self) -> GroupSection:
        if self.format and len(self.model_fields_set) > 1:
            raise ValueError("format describes everything; leave the other keys out")
        return self


class ServedWeightsSection(Section):
    """Weights in few bits, for engines without optimizer."""

    quantized_initialization: GroupSection | None = Field(
        default=None,
        description="Pack the weights of all linear layers and embeddings that share them with no "
        "other, one by one as they get values.",
    )
    post_init_quant: dict[str, GroupSection] = Field(
        default={},
        description="Pack the weights of layers in whose dotted names a key, a regular expression, "
        "is found; each in its own way.",
    )

    @model_validator(mode="after")
    def _is_one(self) -> ServedWeightsSection:
        if self.quantized_initialization is not None and self.post_init_quant:
            raise ValueError("give either quantized_initialization or post_init_quant")
        return self

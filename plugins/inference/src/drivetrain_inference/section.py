"""The config section ``inference``."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from drivetrain.contracts import Bool, NonNegativeInt, PositiveInt, Section

PATH = "inference"


class InferenceSection(Section):
    """How an engine that generates shares memory and time out."""

    block_size: PositiveInt = Field(default=32, description="Tokens of a block of the cache.")
    cache_bytes: PositiveInt = Field(
        default=2**30,
        description="Memory for keys and values; less where the context needs less.",
    )
    cache_blocks: NonNegativeInt = Field(
        default=0, description="Number of blocks instead; 0 for what `cache_bytes` has room for."
    )
    cache_format: Literal["", "int8", "fp8"] = Field(
        default="",
        description="Codes of 8 bits for keys and values, with a scale for each head of a token: "
        "integers, or numbers of E4M3; empty: the model's dtype.",
    )
    host_cache_bytes: NonNegativeInt = Field(
        default=0,
        description="Host memory for sequences that give way when the cache is full; what it has "
        "no room for is computed again.",
    )
    max_context: NonNegativeInt = Field(
        default=0, description="Most tokens of a sequence; 0 for what the model's config says."
    )
    max_batch_tokens: PositiveInt = Field(
        default=512, description="Most tokens of a forward: decodes, and pieces of prompts."
    )
    max_sequences: PositiveInt = Field(default=64, description="Most sequences of a forward.")
    max_tracked_sequences: PositiveInt = Field(
        default=2048, description="Most sequences of `put` that have blocks."
    )
    max_waiting: PositiveInt = Field(
        default=4096, description="Most sequences that wait; requests beyond are refused."
    )
    prefix_caching: Bool = Field(
        default=True, description="Share blocks of sequences that begin alike."
    )
    fast_path: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Whether decoders of a known structure run without their modules' code.",
    )
    weight_format: str = Field(
        default="",
        description="Format of the blocks' matrices, such as w8a8; `gguf` for those of the file; "
        "empty: as they are.",
    )
    adapters: dict[str, str] = Field(
        default_factory=dict,
        description="Folders of PEFT adapters (LoRA) to load at the start, by the names that "
        "requests choose them by.",
    )
    capture_decodes: Bool = Field(
        default=True,
        description="Whether forwards of few sequences with one new token each are repeated by "
        "the accelerator: on the fast path, where attention over the cache has a kernel of the "
        "device's own, as on CPUs.",
    )
    batch_invariant: Bool = Field(
        default=False,
        description="Refuse models whose results may depend on other requests in the last bits.",
    )
    speculative_tokens: NonNegativeInt = Field(
        default=0, description="Most tokens that are guessed and checked in one forward."
    )
    speculative_model: str = Field(
        default="",
        description="Folder or GGUF file of a small model that guesses; empty: look the last "
        "tokens up among those before.",
    )
    quantize_head: Bool = Field(
        default=False, description="Whether the matrix that makes logits has that format, too."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_sequences > self.max_batch_tokens:
            raise ValueError(
                f"max_sequences {self.max_sequences} is more than max_batch_tokens "
                f"{self.max_batch_tokens}, so not all could have a token in a forward"
            )
        if self.weight_format and self.fast_path == "never":
            raise ValueError("weight_format needs the fast path, and fast_path is never")
        if self.speculative_model and not self.speculative_tokens:
            raise ValueError("speculative_model needs speculative_tokens, which is 0")
        if self.quantize_head and not self.weight_format:
            raise ValueError("quantize_head needs a weight_format, and there is none")
        return self

"""Whether a request can be served at all, told before it waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from drivetrain.errors import ConfigError
from drivetrain_inference.requests import SamplingParams
from drivetrain_inference.section import InferenceSection

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Limits:
    """What an engine has room for.

    Args:
        section: its config.
        context: most tokens of a sequence.
        blocks: of the cache.
        vocabulary: tokens of the model; ``None`` if unknown.
        crossed: whether an encoder reads the prompt, so that results have a context of their own.
    """

    section: InferenceSection
    context: int
    blocks: int
    vocabulary: int | None
    crossed: bool = False


def checked(
    prompt: Prompt, params: SamplingParams, tokenizer: Any | None, limits: Limits
) -> tuple[int, ...]:
    """The tokens of a prompt that can be served.

    Raises:
        ConfigError: it cannot; says why.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ConfigError("the prompt is text, and the engine has no tokenizer")
        prompt = tokenizer(prompt)["input_ids"]
    tokens = tuple(int(token) for token in prompt)
    if not tokens:
        raise ConfigError("the prompt is empty")
    if params.stop and tokenizer is None:
        raise ConfigError("stop is text, and the engine has no tokenizer; use stop_tokens")
    _check_results(params, limits.section)
    vocabulary = limits.vocabulary
    if vocabulary and not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise ConfigError(f"the prompt has tokens that are not in [0, {vocabulary})")
    size = limits.section.block_size
    begin = -(-len(tokens) // size) * size + 1 if limits.crossed else len(tokens)
    whole = begin + params.max_new_tokens
    longest = max(len(tokens), 1 + params.max_new_tokens) if limits.crossed else whole
    if longest > limits.context:
        raise ConfigError(
            f"{len(tokens)} tokens of prompt and {params.max_new_tokens} new ones are more "
            f"than the context of {limits.context}"
        )
    if -(-(whole - 1) // size) * params.num_beams > limits.blocks:
        raise ConfigError(
            f"{whole * params.num_beams} tokens do not fit into the cache of "
            f"{limits.blocks * size}; raise inference.cache_bytes"
        )
    return tokens


def each_of(
    params: SamplingParams | Sequence[SamplingParams] | None, number: int
) -> list[SamplingParams]:
    """The parameters of each of so many prompts.

    Raises:
        ConfigError: there are others than one for all, or one for each.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * number
    if len(params) != number:
        raise ConfigError(f"{len(params)} sampling parameters for {number} prompts")
    return list(params)


def _check_results(params: SamplingParams, section: InferenceSection) -> None:
    if params.num_beams > section.max_sequences:
        raise ConfigError(
            f"num_beams is {params.num_beams}, and inference.max_sequences lets "
            f"{section.max_sequences} sequences run"
        )
    if params.results > section.max_waiting:
        raise ConfigError(
            f"n is {params.results}, and inference.max_waiting lets {section.max_waiting} wait"
        )

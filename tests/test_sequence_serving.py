"""Ranks that share prompts generate what one process generates, each with a part of the cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from drivetrain_inference import SamplingParams, serve

from drivetrain.errors import ConfigError
from drivetrain.testing import run_distributed

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins" / "inference" / "tests"))

from tiny_decoders import decoder

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6] * 30, [2], list(range(1, 70))]
SECTION = {"block_size": 8, "max_batch_tokens": 48, "max_sequences": 8}
"""Prompts are longer than a forward, so that they come in pieces, beside tokens that decode."""

Found = tuple[list[tuple[list[int], list[float]]], int, int]


def generated(kind: str, ranks: int, speculative: int = 0) -> Found:
    """Tokens and log-probabilities; key heads of the cache; tokens of this rank's last forward."""
    inference: dict[str, Any] = {**SECTION, "speculative_tokens": speculative}
    if ranks == 1:
        inference["fast_path"] = "never"  # so that the module's code runs in both cases
    config: dict[str, Any] = {"inference": inference, "sequence_parallel_size": ranks}
    greedy = SamplingParams(max_new_tokens=12, logprobs=1)
    drawn = SamplingParams(max_new_tokens=12, temperature=1.2, seed=3, logprobs=1)
    most = 0
    with serve(decoder(kind), config) as engine:
        embedding: Any = engine.module.get_input_embeddings()

        def count(module: Any, args: Any) -> None:
            nonlocal most
            most = max(most, args[0].numel())

        hook = embedding.register_forward_pre_hook(count)
        results = engine.generate(PROMPTS, [greedy, greedy, drawn, greedy])
        hook.remove()
        heads = engine.cache.keys[0].shape[1]
        engine.scheduler.blocks.check([])
    found = [(list(r.tokens), [place.chosen for place in r.logprobs]) for (r,) in results]
    return found, heads, most


def check(kind: str, ranks: int, speculative: int = 0) -> None:
    wanted, _, whole = generated(kind, 1, speculative)
    assert whole == SECTION["max_batch_tokens"]
    for found, _, part in run_distributed(generated, ranks, kind, ranks, speculative):
        assert part == -(-whole // ranks)
        for (tokens, logprobs), (expected, theirs) in zip(found, wanted, strict=True):
            assert tokens == expected
            assert logprobs == pytest.approx(theirs, abs=1e-4)


def test_two_ranks_share_a_prompt_and_generate_the_tokens_of_one() -> None:
    check("llama", 2)
    heads = [found[1] for found in run_distributed(generated, 2, "llama", 2)]
    assert heads == [1, 1]  # of two


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        ("llama", 3),
        ("llama", 4),
        ("llama, one head of keys", 2),
        ("mistral, sliding window", 2),
        ("gemma2, soft caps", 2),
        ("gpt-oss, sinks and experts", 2),
        ("gpt2", 2),
    ],
)
def test_every_kind_of_decoder_generates_alike_over_ranks(kind: str, ranks: int) -> None:
    check(kind, ranks)


@pytest.mark.long
def test_guesses_are_checked_over_ranks() -> None:
    check("llama", 2, speculative=3)


def refusals() -> list[str]:
    found = []
    for ranks, section in ((2, {"ring_size": 2}), (2, {"chunk": 8})):
        config = {
            "inference": SECTION,
            "sequence_parallel_size": ranks,
            "sequence_parallel": section,
        }
        with pytest.raises(ConfigError) as raised:
            serve(decoder(), config)
        found.append(str(raised.value))
    config = {"inference": {**SECTION, "fast_path": "always"}, "sequence_parallel_size": 2}
    with pytest.raises(ConfigError) as raised:
        serve(decoder(), config)
    return [*found, str(raised.value)]


@pytest.mark.long
def test_what_ranks_cannot_share_is_refused_by_name_on_every_rank() -> None:
    expected = ["ring_size", "chunk", "ranks share its tokens"]
    for found in run_distributed(refusals, 2):
        for said, wanted in zip(found, expected, strict=True):
            assert wanted in said

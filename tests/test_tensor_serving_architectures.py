"""Architectures that two ranks share continue texts as Transformers does alone."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from drivetrain_inference import SamplingParams, serve

from drivetrain.errors import ConfigError
from drivetrain.testing import run_distributed
from tools import workspace

sys.path.append(str(workspace.ROOT / "plugins" / "inference" / "tests"))

from tiny_decoders import KINDS, VOCABULARY, decoder, expected

NEW, LENGTHS = 24, (1, 5, 17, 40)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


def continued(kinds: list[str]) -> dict[str, Any]:
    """Tokens and log-probabilities of each prompt by kind, or why it is refused."""
    config = {
        "inference": {"block_size": 8, "max_batch_tokens": 32, "max_sequences": 8},
        "tensor_parallel": {"autotp_size": 2},
    }
    found: dict[str, Any] = {}
    for kind in kinds:
        try:
            with serve(decoder(kind), config) as engine:
                results = engine.generate(prompts(), SamplingParams(max_new_tokens=NEW, logprobs=0))
        except ConfigError as error:
            found[kind] = str(error)
            continue
        found[kind] = [
            (list(one.tokens), [place.chosen for place in one.logprobs]) for (one,) in results
        ]
    return found


@pytest.mark.long
def test_two_ranks_continue_as_transformers_does_alone() -> None:
    ranks = run_distributed(continued, 2, list(KINDS), timeout=600.0)
    for kind in KINDS:
        first, second = (found[kind] for found in ranks)
        assert not isinstance(first, str), f"{kind}: {first}"
        assert first == second, kind
        unclear = 0
        for prompt, (tokens, logprobs) in zip(prompts(), first, strict=True):
            wanted, logits, clear = expected(decoder(kind), prompt, NEW)
            same = clear.index(False) if False in clear else NEW
            unclear += same < NEW
            assert tokens[:same] == wanted[:same], kind
            places = torch.log_softmax(logits, 1)
            for place in range(same):
                assert abs(logprobs[place] - float(places[place, wanted[place]])) < 1e-4, kind
        assert unclear <= 1, kind

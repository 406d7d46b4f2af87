"""Tokens are drawn as Transformers draws them, by each request's own numbers."""

from __future__ import annotations

import math

import pytest
import torch
from drivetrain_inference import Sampler, SamplingParams, serve
from drivetrain_inference.requests import Sequence
from drivetrain_inference.sampling.sampler import warped
from tiny_decoders import decoder
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from drivetrain.errors import ConfigError

VOCABULARY = 50


def logits(rows, seed=0):
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [
    (0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.2), (12, 0.8, 0.05), (100, 0.01, 1.0),
])  # fmt: skip
def test_what_is_left_out_is_what_transformers_leaves_out(temperature, top_k, top_p, min_p):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    chain = [TemperatureLogitsWarper(temperature)]
    chain += [TopKLogitsWarper(top_k)] if top_k else []
    chain += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [MinPLogitsWarper(min_p)] if min_p else []
    for row in logits(20):
        wanted = row[None]
        for each in chain:
            wanted = each(None, wanted)
        torch.testing.assert_close(warped(row, params), wanted[0])


def test_repetition_is_penalised_as_transformers_does():
    params = SamplingParams(repetition_penalty=1.7)
    sequence = Sequence(0, 0, (1, 2, 3, 3), params, output=[4])
    row = logits(1)[0]
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[1, 2, 3, 3, 4]]), row[None])[0]
    torch.testing.assert_close(Sampler()._edited(row, sequence), wanted)


def test_draws_follow_the_distribution():
    params, row = SamplingParams(temperature=1.3, top_k=8), logits(1, seed=4)
    counts, number = torch.zeros(VOCABULARY, dtype=torch.float64), 4000
    sampler = Sampler()
    for seed in range(number):
        ((token, _),) = sampler(row, [Sequence(seed, 0, (1,), params)])
        counts[token] += 1
    shares = torch.softmax(warped(row[0], params).double(), 0)
    assert counts[shares == 0].sum() == 0
    likely = shares > 0
    chi_squared = ((counts - number * shares)[likely] ** 2 / (number * shares[likely])).sum()
    assert chi_squared < 24.3  # 7 degrees of freedom, one in a thousand; seeds are fixed


def test_a_seed_draws_the_same_alone_and_among_others():
    hot = [SamplingParams(max_new_tokens=12, temperature=1.2, seed=seed) for seed in (1, 2, 3)]
    prompts = [[1, 2, 3], [4] * 9, [5, 6]]
    with serve(decoder()) as engine:
        together = engine.generate(prompts, hot)
        alone = [
            engine.generate([prompt], each)[0] for prompt, each in zip(prompts, hot, strict=True)
        ]
        again = engine.generate(prompts[::-1], hot[::-1])[::-1]
        for one, two, three in zip(together, alone, again, strict=True):
            assert one[0].tokens == two[0].tokens == three[0].tokens
        other = engine.generate(
            prompts[:1], SamplingParams(max_new_tokens=12, temperature=1.2, seed=9)
        )
        assert other[0][0].tokens != together[0][0].tokens


def test_logprobs_are_the_models_own():
    params = SamplingParams(temperature=0.5, logprobs=3)
    row = logits(1)
    ((token, found),) = Sampler()(row, [Sequence(0, 0, (1,), params)])
    wanted = torch.log_softmax(row[0], 0)
    assert found.chosen == pytest.approx(float(wanted[token]))
    assert [each for each, _ in found.top] == wanted.topk(3).indices.tolist()


def test_stop_tokens_do_not_come_too_early():
    row = logits(1)
    best = int(row.argmax())
    params = SamplingParams(min_new_tokens=2)
    sampler = Sampler(frozenset({best}))
    early, late = (Sequence(0, 0, (1,), params, output=[0] * n) for n in (1, 2))
    assert sampler(row, [early])[0][0] == int(row[0].topk(2).indices[1])
    assert sampler(row, [late])[0][0] == best


@pytest.mark.parametrize(("name", "value"), [
    ("max_new_tokens", 0), ("temperature", -1.0), ("temperature", math.nan), ("top_p", 0.0),
    ("top_p", 1.5), ("min_p", -0.1), ("repetition_penalty", 0.0), ("n", 0), ("seed", -1),
    ("logprobs", -1), ("stop", ("",)), ("top_k", -1),
])  # fmt: skip
def test_absurd_parameters_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"{name} is .*it must be"):
        SamplingParams(**{name: value})


def test_a_requests_own_function_sees_its_tokens_and_has_the_last_word():
    seen = []

    def only_even():
        def edit(output, scores):
            seen.append(list(output))
            hidden = torch.full_like(scores, float("-inf"))
            hidden[::2] = scores[::2]
            return hidden

        return edit

    with serve(decoder(), {"inference": {"block_size": 4, "cache_blocks": 40}}) as engine:
        params = engine.sampling(max_new_tokens=6, temperature=1.0, n=2, edit=only_even)
        plain = engine.sampling(max_new_tokens=6, temperature=1.0, seed=3)
        alone = engine.generate([[9, 8]], plain)[0][0].tokens
        edited, beside = engine.generate([[9, 8]] * 2, [params, plain])
        assert beside[0].tokens == alone
        for result in edited:
            assert all(token % 2 == 0 for token in result.tokens)
            assert all(list(result.tokens[:length]) in seen for length in range(6))
        with pytest.raises(ConfigError, match="no way to sample by heat"):
            engine.sampling(heat=1)

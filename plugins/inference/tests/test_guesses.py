"""Guesses change how many tokens come out of a forward, never which."""

from __future__ import annotations

import pytest
import torch
from drivetrain_inference import SamplingParams, serve
from drivetrain_inference.sampling.speculation import PromptLookup
from tiny_decoders import decoder, expected

from drivetrain.errors import ConfigError

PATTERN = [5, 17, 40, 2, 9]
PROMPTS = [PATTERN * 5, [3, 1, 4], [8, 9] * 7, list(range(20))]
SMALL = {"block_size": 4, "max_batch_tokens": 64, "max_sequences": 8}
KINDS = {
    "greedy": {},
    "drawn": {"temperature": 1.1},
    "narrow": {"temperature": 0.7, "top_k": 5, "top_p": 0.9},
    "penalised": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 4},
}


def results(config, params, model=None):
    with serve(model or decoder(), {"inference": {**SMALL, **config}}) as engine:
        found = engine.generate(PROMPTS, params)
        engine.scheduler.blocks.check([])
        return [each[0] for each in found], engine.status()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fast_path", ["always", "never"])
def test_looking_up_gives_the_tokens_that_come_without(kind, fast_path):
    params = [
        SamplingParams(max_new_tokens=40, seed=seed, **KINDS[kind]) for seed in range(len(PROMPTS))
    ]
    plain, _ = results({"fast_path": fast_path}, params)
    guessed, status = results({"fast_path": fast_path, "speculative_tokens": 4}, params)
    assert [each.tokens for each in guessed] == [each.tokens for each in plain]
    assert status["drafted"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_model_gives_the_tokens_that_come_without(kind, tmp_path):
    params = [SamplingParams(max_new_tokens=30, seed=seed, **KINDS[kind]) for seed in range(4)]
    plain, _ = results({}, params)
    shares = {}
    for name, seed in (("itself", 0), ("another", 1)):
        decoder(seed=seed).save_pretrained(tmp_path / name)
        config = {"speculative_tokens": 3, "speculative_model": str(tmp_path / name)}
        found, status = results(config, params)
        assert [each.tokens for each in found] == [each.tokens for each in plain]
        shares[name] = status["accepted"] / status["drafted"]
    # A model that agrees with itself is always right, drawing with the same random numbers.
    assert shares["itself"] > 0.9 > shares["another"]


def test_fewer_forwards_are_needed_where_guesses_are_right():
    class Oracle:
        def __init__(self, whole):
            self.whole = whole

        def draft(self, sequences, count):
            return [self.whole[len(s.output) : len(s.output) + count] for s in sequences]

        def forget(self, sequence):
            pass

    model, prompt = decoder(), [3, 1, 4]
    tokens = expected(model, prompt, 24)[0]
    config = {"inference": {**SMALL, "speculative_tokens": 4}}
    with serve(model, config) as engine:
        engine.speculate(Oracle(tokens))
        number, steps, found = engine.add(prompt, SamplingParams(max_new_tokens=24)), 0, []
        while engine.busy:
            found += [each.token for each in engine.step() if each.request == number]
            steps += 1
        assert found == tokens
        assert steps == 1 + -(-23 // 5)
        assert engine.status()["accepted"] == engine.status()["drafted"]


def test_stop_tokens_inside_of_guesses_end_a_text():
    model = decoder()
    tokens = expected(model, PATTERN, 24)[0]
    params = SamplingParams(max_new_tokens=24, stop_tokens=(tokens[7],))
    with serve(model, {"inference": {**SMALL, "speculative_tokens": 4}}) as engine:
        guess = PromptLookup()
        guess.draft = lambda sequences, count: [
            tokens[len(s.output) : len(s.output) + count] for s in sequences
        ]
        engine.speculate(guess)
        (result,) = engine.generate([PATTERN], params)[0]
        engine.scheduler.blocks.check([])
    assert list(result.tokens) == tokens[: tokens.index(tokens[7]) + 1]
    assert result.finish_reason == "stop"


def test_draws_with_guesses_follow_the_models_distribution():
    """The second token, over many seeds, against the product of both conditional distributions."""
    model, number = decoder(), 1000
    params = [
        SamplingParams(max_new_tokens=2, temperature=1.0, top_k=4, seed=s) for s in range(number)
    ]
    prompt = [7, 3, 7, 3, 7]
    logits = model(torch.tensor([prompt])).logits[0, -1]
    first = torch.softmax(logits.topk(4).values.double(), 0)
    config = {**SMALL, "max_batch_tokens": 256, "max_sequences": 64, "speculative_tokens": 2}
    with serve(model, {"inference": config}) as engine:
        found = [each[0].tokens for each in engine.generate([prompt] * number, params)]
    chi = 0.0
    for token, share in zip(logits.topk(4).indices.tolist(), first.tolist(), strict=True):
        after = model(torch.tensor([[*prompt, token]])).logits[0, -1].topk(4)
        shares = share * torch.softmax(after.values.double(), 0)
        for second, wanted in zip(after.indices.tolist(), (number * shares).tolist(), strict=True):
            chi += (found.count((token, second)) - wanted) ** 2 / wanted
    assert chi < 37.7  # 15 degrees of freedom, one in a thousand; seeds are fixed


def test_guessing_that_cannot_be_is_refused(tmp_path):
    decoder(vocab_size=50).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="speculative_model needs speculative_tokens"):
        serve(decoder(), {"inference": {"speculative_model": str(tmp_path)}})
    config = {"speculative_tokens": 2, "speculative_model": str(tmp_path)}
    with pytest.raises(ConfigError, match="has 50 tokens, and the model that it guesses for 96"):
        serve(decoder(), {"inference": config})


def test_the_invariant_mode_refuses_what_it_cannot_promise():
    with pytest.raises(ConfigError, match="batch_invariant needs the fast path"):
        serve(decoder("gemma2, soft caps"), {"inference": {"batch_invariant": True}})

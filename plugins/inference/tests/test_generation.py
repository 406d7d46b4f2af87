"""Results are those of Transformers' generate, whatever the architecture and the neighbours."""

from __future__ import annotations

import pytest
import torch
from drivetrain_inference import SamplingParams, serve
from tiny_decoders import KINDS, SUITE, VOCABULARY, decoder, expected

from drivetrain.errors import ConfigError

LENGTHS = (1, 5, 17, 40)
NEW = 24
SMALL = {"inference": {"block_size": 8, "max_batch_tokens": 32, "max_sequences": 8}}


def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


def with_options(**options):
    return {"inference": {**SMALL["inference"], **options}}


def compare(model, results):
    """Tokens up to the first unclear choice, and log-probabilities."""
    unclear = 0
    for prompt, (result,) in zip(prompts(), results, strict=True):
        tokens, logits, clear = expected(model, prompt, NEW)
        same = clear.index(False) if False in clear else NEW
        unclear += same < NEW
        assert list(result.tokens[:same]) == tokens[:same]
        logprobs = torch.log_softmax(logits, 1)
        for place in range(same):
            wanted = float(logprobs[place, tokens[place]])
            assert abs(result.logprobs[place].chosen - wanted) < 1e-4
    assert unclear <= 1


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in SUITE else pytest.mark.long) for k in KINDS]
)
def test_greedy_tokens_and_logprobs_are_those_of_transformers(kind):
    model, params = decoder(kind), SamplingParams(max_new_tokens=NEW, logprobs=2)
    with serve(model, with_options(fast_path="never")) as engine:
        compare(model, engine.generate(prompts(), params))


@pytest.mark.parametrize("kind", ["llama", "mistral, sliding window", "qwen2, biases, tied"])
def test_the_fast_path_gives_the_same(kind):
    model, params = decoder(kind), SamplingParams(max_new_tokens=NEW, logprobs=2)
    with serve(model, with_options(fast_path="always")) as engine:
        assert engine.fast
        compare(model, engine.generate(prompts(), params))


def test_a_structure_that_is_unknown_is_refused_by_name():
    with serve(decoder("gemma2, soft caps"), SMALL) as engine:
        assert not engine.fast
    with pytest.raises(ConfigError, match=r"fast_path: always needs the fast path.*feedforward"):
        serve(decoder("gemma2, soft caps"), with_options(fast_path="always"))


def test_a_model_that_looks_alike_but_computes_otherwise_keeps_its_own_code():
    model = decoder()
    layer = model.model.layers[0]
    layer.forward = lambda hidden, *a, __forward=layer.forward, **k: (
        1.5 * __forward(hidden, *a, **k)
    )
    with serve(model, SMALL) as engine:
        assert not engine.fast
    with pytest.raises(ConfigError, match="its logits differ by"):
        serve(model, with_options(fast_path="always"))


def test_a_model_that_keeps_more_than_keys_and_values_is_refused():
    model, seen = decoder(), []
    layer = model.model.layers[0].self_attn

    def forward(hidden_states, *args, __forward=layer.forward, **options):
        seen.append(hidden_states.mean(1, keepdim=True))
        return __forward(hidden_states + seen[-1], *args, **options)

    layer.forward = forward
    with pytest.raises(ConfigError, match="gives other logits over a paged cache than by itself"):
        serve(model, SMALL)


class Rounds(torch.nn.Module):
    """A layer that rounds its inputs coarsely, and adds some of what it makes of all tokens."""

    def __init__(self, layer, of_all=0.0):
        super().__init__()
        self.layer, self.of_all, self.rounds_inputs, self.rounded = layer, of_all, True, 0

    def forward(self, x):
        product = self.layer(x.mul(2).round().div(2) if self.rounds_inputs else x)
        self.rounded += self.rounds_inputs
        return product + self.of_all * product.mean(1, keepdim=True)


def test_ways_are_compared_without_the_rounding_of_inputs():
    model = decoder()
    mlp = model.model.layers[0].mlp
    mlp.up_proj = layer = Rounds(mlp.up_proj)
    with serve(model, SMALL) as engine:
        assert layer.rounded == 0
        engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=2))
        assert layer.rounded
        assert layer.rounds_inputs
    mlp.up_proj = Rounds(layer.layer, of_all=1e-2)
    with pytest.raises(ConfigError, match=r"off by 0\.00\d+ of their spread"):
        serve(model, SMALL)
    assert mlp.up_proj.rounds_inputs


def test_modules_without_transformers_attention_are_refused():
    with pytest.raises(ConfigError, match="cannot be led into a paged cache"):
        serve(torch.nn.Sequential(torch.nn.Embedding(8, 8), torch.nn.Linear(8, 8)))


@pytest.mark.parametrize("fast_path", ["always", "never"])
def test_a_result_does_not_depend_on_its_neighbours(fast_path):
    model, params = decoder(), SamplingParams(max_new_tokens=NEW, logprobs=0)
    alone = []
    for prompt in prompts():
        with serve(model, with_options(fast_path=fast_path)) as engine:
            alone += engine.generate([prompt], params)
    with serve(model, with_options(fast_path=fast_path)) as engine:
        together = engine.generate(prompts(), params)
    for (one,), (other,) in zip(alone, together, strict=True):
        assert one.tokens == other.tokens
        for first, second in zip(one.logprobs, other.logprobs, strict=True):
            assert abs(first.chosen - second.chosen) < 1e-5


def test_a_prefix_that_is_in_the_cache_is_not_computed_again():
    model, (long,) = decoder(), prompts()[-1:]
    with serve(model, SMALL) as engine:
        first = engine.generate([long], SamplingParams(max_new_tokens=NEW))[0][0]
        again = engine.generate([[*long, 1], long], SamplingParams(max_new_tokens=NEW))
    assert (first.cached_tokens, again[0][0].cached_tokens, again[1][0].cached_tokens) == (
        0,
        40,
        32,
    )
    assert again[1][0].tokens == first.tokens
    assert list(again[0][0].tokens) == expected(model, [*long, 1], NEW)[0]


def test_a_cache_that_is_too_small_for_all_gives_the_same_results():
    model, params = decoder(), SamplingParams(max_new_tokens=NEW)
    # The longest sequence takes all blocks, so the others give way and are computed again.
    with serve(model, with_options(cache_blocks=8, prefix_caching=False)) as engine:
        results = engine.generate(prompts() * 2, params)
        assert engine.scheduler.preemptions > 0
        engine.scheduler.blocks.check([])
    for prompt, (result,) in zip(prompts() * 2, results, strict=True):
        assert list(result.tokens) == expected(model, prompt, NEW)[0]


@pytest.mark.parametrize("fast_path", ["always", "never"])
def test_what_gives_way_comes_back_from_host_memory(fast_path):
    model, params = decoder(), SamplingParams(max_new_tokens=NEW)
    computed = {}
    for host in (0, 2**20):
        options = {"cache_blocks": 8, "prefix_caching": False, "host_cache_bytes": host}
        with serve(model, with_options(fast_path=fast_path, **options)) as engine:
            run, computed[host] = engine.ragged.run, 0

            def counted(pieces, wanted=None, run=run, host=host):
                computed[host] += sum(len(tokens) for _, tokens in pieces)
                return run(pieces, wanted)

            engine.ragged.run = counted
            results = engine.generate(prompts() * 2, params)
            assert engine.scheduler.preemptions > 0
            assert (engine.status()["swaps"] > 0) == (host > 0)
            engine.scheduler.blocks.check([])
        for prompt, (result,) in zip(prompts() * 2, results, strict=True):
            assert list(result.tokens) == expected(model, prompt, NEW)[0]
    # Each token once: none of those that came back was computed again.
    assert computed[2**20] == 2 * sum(n + NEW - 1 for n in LENGTHS) < computed[0]


def test_weights_that_training_has_changed_are_taken_over():
    model, params = decoder(), SamplingParams(max_new_tokens=NEW)
    with serve(model, SMALL) as engine:
        before = engine.generate(prompts(), params)
        model.load_state_dict(decoder(seed=1).state_dict())
        engine.update_weights()
        after = engine.generate(prompts(), params)
    assert before != after
    for prompt, (result,) in zip(prompts(), after, strict=True):
        assert list(result.tokens) == expected(model, prompt, NEW)[0]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, VOCABULARY], {}, "tokens that are not in"),
        ([1] * 250, {}, "more than the context of 256"),
        ("text", {}, "the engine has no tokenizer"),
        ([1], {"stop": "."}, "stop is text"),
        ([1], {"n": 100}, "n is 100, and inference.max_waiting lets 50 wait"),
        ([1] * 60, {"max_new_tokens": 100}, "do not fit into the cache"),
    ],
)
def test_prompts_that_cannot_be_served_are_refused(prompt, options, message):
    with serve(decoder(), with_options(cache_blocks=16, max_waiting=50)) as engine:
        params = SamplingParams(**{"max_new_tokens": 8, **options})
        with pytest.raises(ConfigError, match=message):
            engine.add(prompt, params)
        with pytest.raises(ConfigError, match=message):
            engine.generate([[1, 2], prompt], params)
        assert not engine.busy

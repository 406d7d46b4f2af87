"""Encoder-decoders give what Transformers' generate gives, over the same paged cache."""

from __future__ import annotations

import pytest
import torch
import transformers
from drivetrain_inference import SamplingParams, engine_for, serve
from drivetrain_inference.scripts import init_inference

from drivetrain.errors import ConfigError

VOCABULARY, NEW, START = 96, 16, 2
T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
}  # fmt: skip
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "max_position_embeddings": 128, "init_std": 0.2,
}  # fmt: skip
KINDS = {
    "t5": (transformers.T5Config, {**T5, "tie_word_embeddings": False}),
    "mt5, gated": (transformers.MT5Config, {**T5, "feed_forward_proj": "gated-gelu"}),
    "umt5, a bias for each layer": (transformers.UMT5Config, T5),
    "bart": (transformers.BartConfig, {**BART, "forced_eos_token_id": None}),
    "bart, forced ends": (
        transformers.BartConfig,
        {**BART, "forced_eos_token_id": 7, "forced_bos_token_id": 5},
    ),
    "mbart": (transformers.MBartConfig, {**BART, "forced_eos_token_id": None}),
    "pegasus": (transformers.PegasusConfig, {**BART, "forced_eos_token_id": None}),
    "marian": (
        transformers.MarianConfig,
        {**BART, "decoder_vocab_size": VOCABULARY, "forced_eos_token_id": None},
    ),
}
SUITE = ("t5", "bart, forced ends")
SMALL = {"block_size": 8, "max_batch_tokens": 24, "max_sequences": 8}


def model_of(kind):
    config_type, own = KINDS[kind]
    config = config_type(
        vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        decoder_start_token_id=START, **own,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
        for name, each in model.named_parameters():
            each.data.add_(torch.randn_like(each) * (0.1 if each.dim() == 1 else 0.05))
            if "relative_attention_bias" in name:
                each.data.add_(torch.randn_like(each))
    return model


def sources():
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (1, 7, 8, 19, 40)
    ]


def expected(model, source, **options):
    found = model.generate(
        torch.tensor([source]), max_new_tokens=NEW, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    logits = torch.cat(found.logits).float()
    best = logits.topk(2, dim=1).values
    return found.sequences[0, 1:].tolist(), logits, (best[:, 0] - best[:, 1] > 1e-4).tolist()


def compare(model, results, asked=None):
    for source, (result,) in zip(asked or sources(), results, strict=True):
        tokens, logits, clear = expected(model, source)
        same = clear.index(False) if False in clear else NEW
        assert same > NEW // 2
        assert list(result.tokens[:same]) == tokens[:same]
        logprobs = torch.log_softmax(logits, 1)
        for place in range(same):
            wanted = float(logprobs[place, tokens[place]])
            assert abs(result.logprobs[place].chosen - wanted) < 1e-4


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in SUITE else pytest.mark.long) for k in KINDS]
)
def test_greedy_tokens_and_logprobs_are_those_of_transformers(kind):
    model, params = model_of(kind), SamplingParams(max_new_tokens=NEW, logprobs=0)
    with serve(model, {"inference": SMALL}) as engine:
        compare(model, engine.generate(sources(), params))


@pytest.mark.parametrize("host", [0, 2**20])
def test_a_cache_that_is_too_small_for_all_gives_the_same_results(host):
    model, params = model_of("t5"), SamplingParams(max_new_tokens=NEW, logprobs=0)
    section = {**SMALL, "cache_blocks": 8, "host_cache_bytes": host, "prefix_caching": False}
    with serve(model, {"inference": section}) as engine:
        asked = sources()[:3] * 2
        compare(model, engine.generate(asked, params), asked)
        assert engine.scheduler.preemptions > 0
        engine.scheduler.blocks.check([])


def test_a_source_that_was_encoded_is_shared_only_by_the_same_source():
    model, params = model_of("bart"), SamplingParams(max_new_tokens=NEW)
    long = sources()[-1]
    other = [*long[:-1], long[-1] % 90 + 3]
    with serve(model, {"inference": SMALL}) as engine:
        for source, cached in ((long, 0), (other, 0), (long, 40), (other, 40)):
            ((result,),) = engine.generate([source], params)
            assert result.cached_tokens == cached
            assert list(result.tokens) == expected(model, source)[0]


def test_a_source_that_was_given_up_halfway_is_encoded_again():
    model, params = model_of("bart"), SamplingParams(max_new_tokens=NEW)
    with serve(model, {"inference": {**SMALL, "max_sequences": 2}}) as engine:
        number = engine.add(sources()[-1], params)
        engine.step()
        engine.cancel(number)
        ((result,),) = engine.generate([sources()[-1]], params)
    assert list(result.tokens) == expected(model, sources()[-1])[0]


def test_beams_and_penalties_see_what_the_decoder_has_written():
    model, source = model_of("bart, forced ends"), sources()[3]
    beams = SamplingParams(max_new_tokens=NEW, num_beams=3, no_repeat_ngram_size=2)
    penalty = SamplingParams(max_new_tokens=NEW, repetition_penalty=1.5)
    with serve(model, {"inference": SMALL}) as engine:
        ((beam,),), ((one,),) = engine.generate([source], beams), engine.generate([source], penalty)
    wanted = model.generate(
        torch.tensor([source]), max_new_tokens=NEW, do_sample=False, num_beams=3,
        no_repeat_ngram_size=2,
    )  # fmt: skip
    assert list(beam.tokens) == wanted[0, 1:].tolist()
    assert list(one.tokens) == expected(model, source, repetition_penalty=1.5)[0]


def test_guesses_change_nothing():
    model, params = model_of("t5"), SamplingParams(max_new_tokens=NEW, logprobs=0)
    with serve(model, {"inference": {**SMALL, "speculative_tokens": 3}}) as engine:
        compare(model, engine.generate(sources(), params))


def test_a_folder_of_an_encoder_decoder_is_served_with_its_encoder(tmp_path):
    model, params = model_of("bart"), SamplingParams(max_new_tokens=NEW)
    model.save_pretrained(tmp_path)
    with engine_for(tmp_path, {"inference": SMALL}) as engine:
        results = engine.generate(sources(), params)
    for source, (result,) in zip(sources(), results, strict=True):
        assert list(result.tokens) == expected(model, source)[0]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([3] * 129, {}, "more than the context of 128"),
        ([3], {"max_new_tokens": 128}, "more than the context of 128"),
        ([3] * 100, {"max_new_tokens": 100}, "do not fit into the cache"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(source, options, message):
    with serve(model_of("bart"), {"inference": {**SMALL, "cache_blocks": 16}}) as engine:
        with pytest.raises(ConfigError, match=message):
            engine.add(source, SamplingParams(**{"max_new_tokens": 8, **options}))
        with pytest.raises(ConfigError, match="needs a source"):
            engine.put([1], [[1, 2]])


@pytest.mark.parametrize(
    "option", [{"fast_path": "always"}, {"weight_format": "w8a8"}, {"batch_invariant": True}]
)
def test_what_needs_the_fast_path_is_refused_by_name(option):
    with pytest.raises(ConfigError, match=f"{next(iter(option))}.* is not served with an encoder"):
        serve(model_of("bart"), {"inference": {**SMALL, **option}})


def test_an_encoder_of_sound_is_refused_by_name():
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    with pytest.raises(ConfigError, match="WhisperForConditionalGeneration reads something else"):
        serve(model)


def test_positions_that_a_model_counts_itself_are_refused():
    config = transformers.M2M100Config(
        vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        decoder_start_token_id=START, **BART,
    )  # fmt: skip
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    with pytest.raises(ConfigError, match="gives other logits over a paged cache"):
        serve(model, {"inference": SMALL})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_a_request_allows_goes_before_a_forced_token(temperature):
    """Its first and last tokens are forced to 5 and 7, which are not allowed."""
    allowed = {10, 11}

    def edit(_tokens, scores):
        barred = [token for token in range(len(scores)) if token not in allowed]
        scores[barred] = float("-inf")
        return scores

    params = SamplingParams(max_new_tokens=4, temperature=temperature, edit=lambda: edit)
    with serve(model_of("bart, forced ends"), {"inference": SMALL}) as engine:
        ((found,),) = engine.generate([sources()[3]], params)
    assert set(found.tokens) <= allowed


def test_what_cannot_be_served_beside_an_encoder_is_said_at_once(tmp_path):
    model = model_of("t5")
    with pytest.raises(ConfigError, match="cache_format: int8 is not served with an encoder-dec"):
        serve(model, {"inference": {**SMALL, "cache_format": "int8"}})
    model.save_pretrained(tmp_path)
    guesser = {"speculative_tokens": 2, "speculative_model": str(tmp_path)}
    with pytest.raises(ConfigError, match="speculative_model: models do not guess"):
        serve(model, {"inference": {**SMALL, **guesser}})


def test_models_whose_encoder_says_more_are_refused_by_name():
    config = transformers.SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2,
        num_heads=4, num_experts=2, decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    known = set(transformers.AttentionInterface._global_mapping)
    with pytest.raises(ConfigError, match="SwitchTransformersForConditionalGeneration cannot be"):
        serve(model, {"inference": SMALL})
    assert set(transformers.AttentionInterface._global_mapping) == known


def test_a_put_that_is_refused_keeps_no_block():
    with serve(model_of("t5"), {"inference": SMALL}) as engine:
        free = engine.ragged.free_blocks
        with pytest.raises(ConfigError, match="put gives none"):
            engine.put([1], [[5, 6, 7]])
        assert (engine.ragged.free_blocks, engine.ragged.tables) == (free, {})


def test_tokens_that_a_config_forbids_are_never_chosen():
    """As Marian's padding, which its own bias would choose."""
    model, source = model_of("marian"), sources()[3]
    model.final_logits_bias[0, 9] = 50.0
    with serve(model, {"inference": SMALL}) as engine:
        ((free,),) = engine.generate([source], SamplingParams(max_new_tokens=NEW))
    assert set(free.tokens) == {9}
    model.generation_config.bad_words_ids = [[9]]
    with serve(model, {"inference": SMALL}) as engine:
        ((found,),) = engine.generate([source], SamplingParams(max_new_tokens=NEW))
    assert list(found.tokens) == expected(model, source)[0]
    model.generation_config.bad_words_ids = [[9, 3]]
    with pytest.raises(ConfigError, match="in a row"):
        serve(model, {"inference": SMALL})


def test_a_decoder_may_have_other_words_than_its_encoder():
    config = transformers.MarianConfig(
        **{**BART, "decoder_vocab_size": 50, "vocab_size": 96, "forced_eos_token_id": None},
        share_encoder_decoder_embeddings=False, pad_token_id=0, eos_token_id=None,
        decoder_start_token_id=START,
    )  # fmt: skip
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    with serve(model, {"inference": SMALL}) as engine:
        ((found,),) = engine.generate([sources()[3]], SamplingParams(max_new_tokens=NEW))
    assert list(found.tokens) == expected(model, sources()[3])[0]


def test_a_source_and_its_answer_have_a_context_each():
    model = model_of("bart")
    context = model.config.max_position_embeddings
    source = [3 + token % 40 for token in range(context - 8)]
    section = {**SMALL, "max_sequences": 1, "cache_bytes": 2**30}
    with serve(model, {"inference": section}) as engine:
        params = SamplingParams(max_new_tokens=context - 10)
        ((found,),) = engine.generate([source], params)
        ((again,),) = engine.generate([source], params)
    assert len(found.tokens) == context - 10
    assert again.tokens == found.tokens
    assert 0 < again.cached_tokens <= len(source)


def test_a_script_gets_what_the_module_would_give():
    model, source = model_of("t5"), torch.tensor([sources()[3]])
    wanted = model.generate(source, max_new_tokens=NEW, do_sample=False)
    target = torch.tensor([[START, 5, 6]])
    logits = model(input_ids=source, decoder_input_ids=target).logits
    engine = init_inference(model, {"dtype": "fp32", "max_out_tokens": 128})
    with torch.no_grad():
        found = engine(input_ids=source, decoder_input_ids=target, use_cache=False).logits
    torch.testing.assert_close(found, logits)
    assert torch.equal(engine.generate(source, max_new_tokens=NEW), wanted)
    engine.destroy()

"""Keys and values of 8 bits: half the memory, nearly the same results, on both ways."""

from __future__ import annotations

import pytest
import torch
from drivetrain_inference import SamplingParams, serve
from drivetrain_inference.cache.paged import PagedCache
from drivetrain_kernels import rotary_to_cache
from drivetrain_kernels.ops.cache_codes import from_cache_codes
from tiny_decoders import VOCABULARY, decoder, expected

from drivetrain.errors import DrivetrainError

BASE = {"block_size": 8, "max_batch_tokens": 32, "max_sequences": 8}
PROMPT = torch.randint(VOCABULARY, (40,), generator=torch.Generator().manual_seed(3)).tolist()


def served(kind="llama", **options):
    return serve(decoder(kind), {"inference": {**BASE, **options}})


@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("kind", "fast_path"),
    [("llama", "always"), ("llama", "never"), ("gpt-oss, sinks and experts", "never")],
)
def test_logits_are_near_those_of_a_cache_that_rounds_nothing(form, kind, fast_path):
    found = []
    for options in ({}, {"cache_format": form}):
        with served(kind, fast_path=fast_path, **options) as engine:
            engine.put([0], [PROMPT[:32]])
            found.append(engine.put([0], [PROMPT[32:]])[0])
    plain, coded = found
    spread = float(plain.max() - plain.min())
    assert not torch.equal(plain, coded)
    # 127 steps of a head's largest element, or 3 bits of mantissa.
    assert (plain - coded).abs().max() < (0.02 if form == "int8" else 0.08) * spread


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_both_ways_keep_the_same_codes(form):
    found = []
    for fast_path in ("always", "never"):
        with served(fast_path=fast_path, cache_format=form) as engine:
            engine.put([0], [PROMPT[:20]])
            found.append([tensor.clone() for tensor in engine.cache.tensors])
    codes = [(one, two) for one, two in zip(*found, strict=True) if one.dtype != torch.float32]
    assert len(codes) == 4
    for one, two in codes:
        assert (one.int() - two.int()).abs().max() <= 1  # ties after another rounding
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one.float(), two.float(), rtol=1e-3, atol=1.0)


@pytest.mark.parametrize(("dtype", "far"), [(torch.int8, 0.5 / 127), (torch.uint8, 2.0**-4)])
def test_codes_are_the_nearest_with_the_scale_of_a_head(dtype, far):
    joined = torch.randn(5, 4 * 16, generator=torch.Generator().manual_seed(0))
    joined[2, 2 * 16 : 3 * 16] = 0
    keys, values = (torch.zeros(2, 1, 4, 16, dtype=dtype) for _ in range(2))
    scales = [torch.zeros(2, 1, 4) for _ in range(2)]
    slots, none = torch.arange(5, dtype=torch.int32), torch.zeros(5, 0)
    rotary_to_cache(joined, none, none, keys, values, slots, *scales)
    for cache, own, start in ((keys, scales[0], 32), (values, scales[1], 48)):
        found = from_cache_codes(cache, own).view(8, 16)[:5]
        wanted = joined[:, start : start + 16]
        most = wanted.abs().amax(1, keepdim=True)
        torch.testing.assert_close(found.abs().amax(1, keepdim=True), most)
        bound = far * (
            most if dtype == torch.int8 else wanted.abs().clamp_min(2.0**-6 * most / 448)
        )
        assert ((found - wanted).abs() <= bound * 1.001).all()


def test_a_block_takes_half_the_memory_and_a_scale_a_head():
    with served() as engine:
        layers = engine.ragged.model.layers
    plain = PagedCache.bytes_per_block(layers, 32, torch.bfloat16)
    coded = PagedCache.bytes_per_block(layers, 32, torch.bfloat16, "int8")
    heads, dim = 2, 8
    assert (plain, coded) == (2 * 32 * heads * 2 * dim * 2, 2 * 32 * heads * (2 * dim + 8))
    with served(cache_format="int8", cache_bytes=2**16) as engine:
        memory = sum(each.numel() * each.element_size() for each in engine.cache.tensors)
        assert 0.9 * 2**16 < memory <= 2**16


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_what_gives_way_comes_back_with_its_scales(form):
    params = SamplingParams(max_new_tokens=24)
    prompts, results = [PROMPT[:n] for n in (1, 5, 17, 40)] * 2, []
    for options in ({}, {"cache_blocks": 8, "host_cache_bytes": 2**20}):
        with served(cache_format=form, prefix_caching=False, **options) as engine:
            results.append([each[0].tokens for each in engine.generate(prompts, params)])
            assert (engine.status()["swaps"] > 0) == bool(options)
    assert results[0] == results[1]


def test_greedy_tokens_stay_those_of_transformers_where_they_are_clear():
    model = decoder()
    with serve(model, {"inference": {**BASE, "cache_format": "int8"}}) as engine:
        (result,) = engine.generate([PROMPT], SamplingParams(max_new_tokens=12))[0]
    tokens, logits, _ = expected(model, PROMPT, 12)
    best = logits.topk(2, dim=1).values
    clear = ((best[:, 0] - best[:, 1]) > 0.02 * (logits.amax(1) - logits.amin(1))).tolist()
    same = clear.index(False) if False in clear else 12
    assert same >= 1
    assert list(result.tokens[:same]) == tokens[:same]


def test_formats_that_are_none_are_refused():
    with pytest.raises(DrivetrainError, match="cache_format"):
        served(cache_format="int4")

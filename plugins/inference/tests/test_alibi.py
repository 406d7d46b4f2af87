"""ALiBi in a cache: the places that keys carry, and what cannot keep them."""

from __future__ import annotations

import pytest
import torch
from drivetrain_inference import serve
from drivetrain_inference.models.inline import with_places, with_slopes
from tiny_decoders import decoder

from drivetrain.errors import ConfigError


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-4)])
def test_keys_and_queries_carry_slope_times_place(dtype, bound):
    places = torch.tensor([0, 1, 255, 256, 257, 5000, 65_000])
    slopes = torch.tensor([0.5, 0.7071, 0.0039])
    query, key = torch.zeros(1, 3, 2, 8, dtype=dtype), torch.zeros(1, 3, 7, 8, dtype=dtype)
    query, key = with_slopes(query, slopes, 0.3), with_places(key, places)
    added = 0.3 * query.double() @ key.double().transpose(2, 3)
    wanted = slopes.double()[:, None, None] * places.double()
    assert ((added[0] - wanted).abs() <= bound * wanted).all()


def test_a_cache_of_codes_is_refused():
    with pytest.raises(
        ConfigError, match=r"cache_format: int8 is not served with keys that carry their places"
    ):
        serve(decoder("bloom, alibi"), {"inference": {"cache_format": "int8"}})


def test_heads_whose_slopes_the_model_rounds_are_refused():
    model = decoder("falcon, alibi", hidden_size=48, num_attention_heads=6)
    with pytest.raises(ConfigError, match="rounds ALiBi of 6 heads"):
        serve(model)


def test_a_model_has_its_own_code_again_after_each_forward():
    model = decoder("bloom, alibi")
    with serve(model) as engine:
        engine.generate([[1, 2, 3]])
        assert all("forward" not in vars(part) for part in model.modules())

"""Layers are cut into stages as an exhaustive search cuts them."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from drivetrain_pipeline.balance import BalanceError, Layer, balance
from hypothesis import given, settings
from hypothesis import strategies as st

Cut = tuple[int, ...]


def cuts(count: int, parts: int) -> list[Cut]:
    return [(0, *inner, count) for inner in combinations(range(1, count), parts - 1)]


def slowest(layers: list[Layer], cut: Cut) -> float:
    parts = pairwise(cut)
    return max(sum(layer.time for layer in layers[a:b]) for a, b in parts)


def fits(layers: list[Layer], cut: Cut, limit: float, held: tuple[int, ...]) -> bool:
    return all(
        sum(layer.fixed + h * layer.activations for layer in layers[a:b]) <= limit
        for h, a, b in zip(held, cut, cut[1:], strict=False)
    )


COSTS = st.integers(0, 9)
LAYERS = st.lists(st.builds(Layer, COSTS, COSTS, COSTS), min_size=1, max_size=9)


@given(LAYERS, st.integers(1, 5), st.integers(5, 60), st.booleans())
@settings(max_examples=400, deadline=None)
def test_the_cut_is_the_best_of_all(
    layers: list[Layer], parts: int, limit: int, later_keep_more: bool
) -> None:
    parts = min(parts, len(layers))
    held = tuple(range(1, parts + 1)) if later_keep_more else tuple(range(parts, 0, -1))
    for bound in (None, limit):
        able = [
            c for c in cuts(len(layers), parts) if bound is None or fits(layers, c, bound, held)
        ]
        if not able:
            with pytest.raises(BalanceError, match="within"):
                balance(layers, parts, limit=bound, held=held)
            continue
        found = balance(layers, parts, limit=bound, held=held)
        assert found in able
        assert slowest(layers, found) == min(slowest(layers, cut) for cut in able)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=9), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_measured_times_are_cut_exactly_too(times: list[float], parts: int) -> None:
    layers = [Layer(time) for time in times]
    parts = min(parts, len(layers))
    found = slowest(layers, balance(layers, parts))
    best = min(slowest(layers, cut) for cut in cuts(len(layers), parts))
    assert found <= best * (1 + 1e-12)


def test_equal_layers_make_equal_parts() -> None:
    bounds = balance([Layer(1)] * 10, 4)
    assert sorted(b - a for a, b in pairwise(bounds)) == [2, 2, 3, 3]
    assert balance([Layer(0)] * 6, 3) == (0, 2, 4, 6)  # nothing to balance but their number
    # Two of the four that count for each part; the others lie where numbers are most equal.
    assert balance([Layer(t) for t in (0, 1, 1, 1, 1, 0)], 2) == (0, 3, 6)


def test_long_models_are_cut_in_no_time() -> None:
    layers = [Layer(1 + (i * 7919) % 13) for i in range(1000)]
    bounds = balance(layers, 64)
    total = sum(layer.time for layer in layers)
    assert slowest(layers, bounds) <= total / 64 + 13


@pytest.mark.parametrize(
    ("layers", "parts", "limit", "reason"),
    [
        ([Layer(1)] * 3, 4, None, "3 layers cannot be cut into 4 parts"),
        ([Layer(1)], 0, None, "0 parts"),
        ([Layer(float("nan"))], 1, None, "negative or not finite"),
        ([Layer(1, fixed=2), Layer(1, fixed=7)], 2, 5, "layer 1 alone needs 7; use more stages"),
    ],
)
def test_what_cannot_be_cut_is_named(layers, parts: int, limit: float | None, reason: str) -> None:
    with pytest.raises(BalanceError, match=reason):
        balance(layers, parts, limit=limit)

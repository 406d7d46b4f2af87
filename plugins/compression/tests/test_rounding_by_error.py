"""GPTQ, SparseGPT, Wanda, HQQ and LoRC against explicit computations in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from drivetrain_compression.calibrated.data_free import hqq, low_rank
from drivetrain_compression.calibrated.gptq import Order, SingularError, damped, gptq, invert
from drivetrain_compression.calibrated.grids import (
    Floats,
    Integers,
    fit,
    fit_by_error,
    in_groups,
    round_to,
    weight_of,
)
from drivetrain_compression.calibrated.pruning import Pattern, sparsegpt, wanda
from drivetrain_compression.calibrated.refining import descend, refine, refit, settle
from drivetrain_compression.calibrated.statistics import Inputs
from drivetrain_compression.quantisers.floating import FORMATS

from drivetrain.errors import ConfigError


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(columns, samples=200, seed=1):
    mix = drawn(columns, columns, seed=seed)
    x = drawn(samples, columns, seed=seed + 1) @ mix
    return x.T @ x


def step_by_step(weight, hessian, grid, scales, columns, damping):
    """Optimal Brain Quantisation in a given order: the inverse is made again for each column."""
    left = list(columns)
    w, numbers = weight.clone(), torch.zeros_like(weight)
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
    while left:
        inverse = torch.linalg.inv(damped[left][:, left])
        q = left[0]
        scale, zero = scales.column(q)
        numbers[:, q] = grid.nearest(w[:, q] / scale, zero)
        off = (w[:, q] - numbers[:, q] * scale) / inverse[0, 0]
        w[:, left] -= off[:, None] * inverse[0]
        left = left[1:]
    return numbers


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("by_activity", [True, False])
@pytest.mark.parametrize(("group", "block"), [(0, 4), (8, 128), (5, 7)])
def test_gptq_is_optimal_brain_quantisation_column_by_column(symmetric, by_activity, group, block):
    weight, hessian = drawn(6, 24), correlated(24)
    grid = Integers(4, symmetric)
    scales = fit(weight, grid, group)
    order = Order.by_activity(hessian) if by_activity else Order()
    found = gptq(
        weight, invert(order.of(hessian, 0, 1), 0.01), grid, scales, order=order, block=block
    )
    columns = order.of(torch.arange(24), 0).tolist()
    assert by_activity == (columns != sorted(columns))
    assert torch.equal(found, step_by_step(weight, hessian, grid, scales, columns, 0.01))


def test_gptq_changes_the_output_less_than_rounding_does():
    weight, hessian, grid = drawn(16, 64), correlated(64), Integers(3)
    scales = fit(weight, grid, 16)

    def loss(numbers):
        off = weight - weight_of(numbers, scales)
        return (off @ hessian * off).sum()

    found = loss(gptq(weight, invert(hessian), grid, scales))
    assert found < 0.5 * loss(round_to(weight, grid, scales))


def lost(weight, near, hessian):
    off = near - weight
    return ((off @ hessian) * off).sum(1)


@pytest.mark.parametrize("group", [0, 16, 10])
@pytest.mark.parametrize("grid", [Integers(3), Integers(4, False), Floats("e2m1")], ids=str)
def test_after_sweeps_no_number_of_a_row_is_better_alone(grid, group):
    weight, hessian = drawn(6, 48), damped(correlated(48), 0.01)
    scales = fit_by_error(weight, grid, group, hessian)
    first = gptq(weight, invert(hessian, 1e-9), grid, scales)
    size = {"sweeps": 30, "block": 7}
    numbers, found = refine(weight, first, hessian, grid, scales, torch.float64, **size)
    before, after = (
        lost(weight, weight_of(n, s), hessian) for n, s in ((first, scales), (numbers, found))
    )
    assert (after <= before).all()
    assert after.sum() < 0.9 * before.sum()
    best, off = weight_of(numbers, found), weight_of(numbers, found) - weight
    free = best - (off @ hessian) / hessian.diagonal()  # each column's best, all others as they are
    assert torch.equal(round_to(free, grid, found), numbers)
    # Nor is another scale, for these numbers: the slope of each is 0.
    slope = ((off @ hessian) * numbers).abs()
    parts = in_groups((off @ hessian) * numbers, found.group).sum(2).abs()
    assert (parts < 1e-3 * in_groups(slope, found.group).sum(2)).all()


def test_one_sweep_goes_column_by_column():
    weight, hessian, grid = drawn(5, 20), damped(correlated(20), 0.01), Integers(3)
    scales = fit(weight, grid, 0)
    numbers = round_to(weight, grid, scales)
    near, scale = weight_of(numbers, scales), scales.scale
    for j in range(20):
        slope = ((near - weight) @ hessian)[:, j] / hessian[j, j]
        near[:, j] = grid.nearest((near[:, j] - slope) / scale[:, 0]) * scale[:, 0]

    def choose(at, values):
        return grid.nearest(values / scale[:, 0]) * scale[:, 0]

    for block in (1, 6, 128):
        found = descend(weight, weight_of(numbers, scales), hessian, choose, block=block)
        torch.testing.assert_close(found, near, rtol=1e-12, atol=1e-12)


def test_scales_of_rows_in_parts_are_the_same(monkeypatch):
    weight, hessian, grid = drawn(9, 24), damped(correlated(24), 0.01), Integers(4)
    scales = fit(weight, grid, 8)
    numbers = round_to(weight, grid, scales)
    whole = refit(weight, numbers, hessian, scales, torch.bfloat16)
    monkeypatch.setattr("drivetrain_compression.calibrated.refining._ENTRIES", 20)
    assert torch.equal(refit(weight, numbers, hessian, scales, torch.bfloat16).scale, whole.scale)
    assert torch.equal(whole.scale.bfloat16().double(), whole.scale)
    assert not torch.equal(whole.scale, scales.scale)


def test_sweeps_leave_powers_of_two_and_what_was_pruned():
    weight = wanda(drawn(8, 16), torch.ones(16).double(), Pattern.parse("2:4"))
    hessian, grid = damped(correlated(16), 0.01), Floats("e2m1", "m1")
    scales = fit(weight, grid, 8)
    numbers = gptq(weight, invert(hessian), grid, scales)
    found, kept = refine(weight, numbers, hessian, grid, scales, torch.float64, sweeps=3)
    assert torch.equal(kept.scale, scales.scale)
    assert (found[weight == 0] == 0).all()


def test_what_stays_of_a_pruned_weight_settles_where_the_output_is_off_least():
    weight, hessian = drawn(5, 12), damped(correlated(12), 0.01)
    pruned = sparsegpt(weight, invert(hessian, 1e-9), Pattern.parse("2:4"))
    found = settle(weight, pruned, hessian, sweeps=3000)
    for row in range(5):
        kept = pruned[row] != 0
        assert torch.equal(found[row] != 0, kept)
        best = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight[row])
        torch.testing.assert_close(found[row][kept], best, rtol=1e-5, atol=1e-6)
    one = settle(weight, pruned, hessian, sweeps=1)
    assert (lost(weight, one, hessian) <= lost(weight, pruned, hessian)).all()


def test_gptq_keeps_what_was_pruned_and_what_no_sample_touched():
    weight = wanda(drawn(8, 16), torch.ones(16).double(), Pattern.parse("2:4"))
    hessian = correlated(16)
    hessian[3], hessian[:, 3] = 0, 0
    numbers = gptq(weight, invert(hessian), Integers(4), fit(weight, Integers(4)))
    assert (numbers[weight == 0] == 0).all()
    assert (numbers[:, 3] == 0).all()


def test_a_token_counts_at_most_as_much_as_64_of_median_size():
    x = drawn(33, 8).float()
    x = x / x.norm(dim=1, keepdim=True)
    x[5] *= 1000
    seen = Inputs(8, x.device, gram=True, keep=True)
    seen.add(x)
    most = x.clone()
    most[5] *= 8 / 1000
    torch.testing.assert_close(seen.gram, 2 / 33 * most.T @ most)
    assert seen.top.max() == x.abs().max()  # sizes are as they came
    assert torch.equal(seen.kept, x)
    written = x.clone()
    seen.add(written)
    written.zero_()  # as a layer may that computes in place
    assert torch.equal(seen.kept[33:], x)
    seen = Inputs(8, x.device, gram=True, keep=True)
    seen.add(x)
    for _ in range(40):
        seen.add(x.repeat(4, 1))
    assert len(seen.kept) < 512 + 64
    assert torch.equal(seen.kept[33:77], x.repeat(4, 1)[::3])


def test_a_singular_hessian_is_damped_or_refused():
    x = drawn(3, 12)
    found = invert(x.T @ x, 1e-6)
    assert found.damping == 1e-6
    assert invert((x.T @ x).float(), 1e-12).damping > 1e-12  # too little for float32
    exact = x.T @ x + found.damping * (x.T @ x).diagonal().mean() * torch.eye(12).double()
    inverse = torch.linalg.inv(exact)
    torch.testing.assert_close(found.upper.T @ found.upper, inverse, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.upper, found.upper.triu())
    with pytest.raises(SingularError, match="no token"):
        invert(torch.zeros(4, 4))
    with pytest.raises(SingularError, match="NaN"):
        invert(torch.full((4, 4), float("nan")))


def test_sparsegpt_removes_what_obs_would_and_makes_up_for_it():
    weight, hessian = drawn(5, 12), correlated(12)
    pattern = Pattern.parse("2:4")
    found = sparsegpt(weight, invert(hessian), pattern, block=4)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12).double()
    w = weight.clone()
    for start in range(0, 12, 4):
        diagonal = torch.stack(
            [torch.linalg.inv(damped[i:, i:])[0, 0] for i in range(start, start + 4)]
        )
        scores = w[:, start : start + 4].square() / diagonal
        gone = scores.argsort(1)[:, :2]
        for i in range(start, start + 4):
            inverse = torch.linalg.inv(damped[i:, i:])
            off = torch.where((gone == i - start).any(1), w[:, i], 0.0)
            w[:, i:] -= (off / inverse[0, 0])[:, None] * inverse[0]
    # The last removed weight of a row is exactly 0 in the one, and almost in the other.
    torch.testing.assert_close(found, w, rtol=1e-9, atol=1e-9)
    assert ((found.view(5, 3, 4) != 0).sum(2) == 2).all()


@pytest.mark.parametrize(
    ("text", "share"), [("2:4", 0.5), ("1:4", 0.75), ("0.5", 0.5), (".25", 0.25)]
)
def test_patterns_leave_what_they_say(text, share):
    weight, squares = drawn(8, 32), drawn(32, seed=3).square()
    pattern = Pattern.parse(text)
    for pruned in (
        wanda(weight, squares, pattern),
        sparsegpt(weight, invert(correlated(32)), pattern),
    ):
        assert (pruned == 0).double().mean() == share
    scores = weight.abs() * squares.sqrt()
    kept = wanda(weight, squares, pattern) != 0
    for row in range(8):
        for start in range(0, 32, pattern.of or 32):
            near = slice(start, start + (pattern.of or 32))
            stays = kept[row, near]
            assert scores[row, near][stays].min() >= scores[row, near][~stays].max()


@pytest.mark.parametrize("text", ["4:2", "0:4", "1.5", "0", "0.0", "half", "2:", ""])
def test_other_patterns_are_refused(text):
    with pytest.raises(ConfigError, match="pattern"):
        Pattern.parse(text)
    with pytest.raises(ConfigError, match="divide"):
        Pattern.parse("2:4").check(30)


@pytest.mark.parametrize("symmetric", [True, False])
def test_hqq_loses_less_than_rounding_by_its_own_measure(symmetric):
    weight = drawn(16, 128)
    weight[:, ::37] *= 6  # outliers, which the measure forgives
    grid = Integers(4, symmetric)
    first, found = fit(weight, grid, 32), hqq(weight, grid, 32)

    def loss(scales):
        return (weight - weight_of(round_to(weight, grid, scales), scales)).abs().pow(0.7).sum()

    assert loss(found) < 0.97 * loss(first)


def test_cut_ranges_are_the_best_of_those_tried():
    weight, hessian, grid = drawn(3, 16), correlated(16), Integers(3)
    found = fit_by_error(weight, grid, 8, hessian, steps=10)
    whole = fit(weight, grid, 8)
    for row, group in itertools.product(range(3), range(2)):
        near = slice(8 * group, 8 * group + 8)
        losses = []
        for step in range(10):
            scale = whole.scale[row, group] * (1 - 0.5 * step / 10)
            off = weight[row, near] - torch.round(weight[row, near] / scale).clamp(-4, 3) * scale
            losses.append((float(off @ hessian[near, near] @ off), float(scale)))
        assert float(found.scale[row, group]) == min(losses)[1]


def test_low_rank_terms_are_the_best_of_their_rank():
    error = drawn(7, 10)
    left, right = low_rank(error, 3)
    values = torch.linalg.svdvals(error)
    torch.testing.assert_close((error - left @ right).square().sum(), values[3:].square().sum())
    torch.testing.assert_close(left.T @ left, right @ right.T)


def table(name):
    """All numbers of a small float, from its definition."""
    exponents, mantissa = FORMATS[name].exponent, FORMATS[name].mantissa
    bias = 2 ** (exponents - 1) - 1
    found = set()
    for field, rest in itertools.product(range(2**exponents), range(2**mantissa)):
        part = rest / 2**mantissa
        value = part * 2.0 ** (1 - bias) if field == 0 else (1 + part) * 2.0 ** (field - bias)
        found |= {value, -value}
    return sorted(each for each in found if abs(each) <= FORMATS[name].largest)


@pytest.mark.parametrize("name", FORMATS)
def test_small_floats_are_the_nearest_of_their_table(name):
    numbers = torch.tensor(table(name), dtype=torch.float64)
    grid = Floats(name)
    assert FORMATS[name].largest == numbers[-1]
    end = 1.2 * FORMATS[name].largest
    values = torch.linspace(-end, end, 4999, dtype=torch.float64)
    values = torch.cat([values, numbers, numbers / 7])
    far = (values[:, None] - numbers).abs().amin(1)
    found = grid.nearest(values)
    torch.testing.assert_close((values - found).abs(), far, rtol=0, atol=0)
    assert all(float(each) in table(name) for each in found.unique())
    if name == "e4m3":
        same = values.clamp(-448, 448).float().to(torch.float8_e4m3fn).double()
        exact = grid.nearest(values.float()).double()
        assert torch.equal(same, exact)


def test_powers_of_two_of_scales():
    weight = drawn(6, 64) * torch.exp2(drawn(6, 1, seed=4) * 2)
    m1 = fit(weight, Floats("e2m1", "m1"), 16).scale
    assert torch.equal(torch.exp2(torch.log2(m1).round()), m1)
    plain = fit(weight, Floats("e2m1"), 16).scale
    assert ((m1 >= plain) & (m1 < 2 * plain)).all()
    m2 = fit(weight, Floats("e2m1", "m2"), 16).scale
    ratio = torch.log2(m2.amax(1, keepdim=True) / m2)
    torch.testing.assert_close(ratio, ratio.round())
    assert torch.equal(m2.amax(1), plain.amax(1))
    assert ((m2 <= plain) & (m2 > plain / 2)).all()


def test_groups_may_leave_a_rest_and_be_zero():
    weight = drawn(4, 22)
    weight[1] = 0
    for grid in (Integers(4), Integers(8, False), Floats("e3m2")):
        scales = fit(weight, grid, 8)
        assert scales.scale.shape == (4, 3)
        near = weight_of(round_to(weight, grid, scales), scales)
        assert torch.isfinite(near).all()
        assert (near[1] == 0).all()
        alone = fit(weight[:, 16:], grid, 0)
        assert torch.equal(alone.scale[:, 0], scales.scale[:, 2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Integers(1), "bits"),
        (lambda: Integers(9), "bits"),
        (lambda: Floats("fp5"), "fp5"),
        (lambda: Floats("e2m1", "m3"), "m3"),
    ],
)
def test_other_grids_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()

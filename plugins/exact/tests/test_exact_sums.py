"""Sums, norms and updates that do not depend on order, against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from drivetrain_exact import Quantum, state_hash
from drivetrain_exact.norm import ExactNorm
from exact_training import Model, make
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.testing import RanksFailedError, run_distributed


def quantum(exponent: int = 3) -> Quantum:
    made = Quantum(8, torch.device("cpu"))
    made.exponent = exponent
    return made


def test_every_order_of_terms_has_one_sum() -> None:
    torch.manual_seed(0)
    terms = torch.randn(64, 50) * 10.0 ** torch.randint(-20, 0, (64, 50))
    unit, weight = quantum(), nn.Parameter(torch.zeros(50))
    exact = [unit.receive(weight, term) for term in terms]
    sums = set()
    for seed in range(10):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed)).tolist()
        total = torch.zeros(50, dtype=torch.float64)
        for index in order:
            total += exact[index]
        sums.add(tuple(total.tolist()))
    assert len(sums) == 1
    expected = [sum(map(Fraction, column)) for column in terms.T.tolist()]
    for found, true in zip(sums.pop(), expected, strict=True):
        assert abs(Fraction(found) - true) <= 64 * Fraction(unit.unit) / 2


def test_what_is_received_is_the_nearest_multiple_of_the_unit() -> None:
    unit = quantum(-40)
    terms = torch.randn(1000) * 1e-14
    found = unit.receive(nn.Parameter(terms.clone()), terms)
    for value, term in zip(found.tolist(), terms.tolist(), strict=True):
        assert (Fraction(value) / Fraction(unit.unit)).denominator == 1
        assert abs(Fraction(value) - Fraction(term)) <= Fraction(unit.unit) / 2


def test_a_window_fits_up_to_the_largest_sum_and_no_further() -> None:
    unit, weight = quantum(3), nn.Parameter(torch.zeros(1))
    for _ in range(4):
        unit.receive(weight, torch.tensor([3.99]))
    largest, times = unit.seen().tolist()
    assert times == 4
    assert unit.fits(largest, times)
    assert not unit.fits(4.0, times)
    assert unit.fits(math.inf, times), "others look after what is not finite"


def norms(sizes: list[int]) -> float:
    """The norm that the states of each rank compute, of gradients in any cut."""
    engine = make({"optimizer": {"type": "SGD", "params": {"lr": 0.0}}, **stage(sizes)})
    engine.get_global_grad_norm()
    engine.train_batch()
    norm = engine.get_global_grad_norm()
    engine.destroy()
    return float(norm)


def stage(sizes: list[int]) -> dict[str, Any]:
    return {"data_parallel": {"bucket_bytes": sizes[0], "first_bucket_bytes": sizes[0]}}


def test_the_norm_is_one_number_wherever_tensors_are_cut() -> None:
    found = {run_distributed(norms, world, [size])[0] for world in (1, 2) for size in (64, 4096)}
    assert len(found) == 1


class OneRank:
    """As much of a job as a norm asks for."""

    device = torch.device("cpu")
    mesh = type("Mesh", (), {"size": staticmethod(lambda axis: 1)})


@pytest.mark.parametrize("draw", range(8))
def test_the_norm_is_exact_in_every_order_and_cut(draw: int) -> None:
    torch.manual_seed(draw)
    unit, elements = quantum(4), 5000
    sizes = 10.0 ** torch.randint(-9, 1, (elements,)).double()
    values = unit.receive(nn.Parameter(torch.zeros(1)), torch.randn(elements) * sizes)
    found = set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(elements, generator=generator)
        cuts = torch.randint(1, elements, (seed,), generator=generator).sort().values
        pieces = torch.tensor_split(values[order], cuts)
        norm = ExactNorm(OneRank(), unit, elements)  # type: ignore[arg-type]
        found.add(float(norm({1: pieces}, None)))
    assert len(found) == 1
    true = sum(Fraction(value) ** 2 for value in values.tolist())
    assert abs(Fraction(found.pop()) ** 2 - true) < true / 2**45


# -- steps that are skipped ------------------------------------------------------------------------


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).sum()


def exploding(factor: float) -> tuple[list[float], int]:
    engine = drivetrain.initialize(
        model=Line(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
            "exact": {"headroom": 4},
            "gradient_clipping": 0.0,
        },
    )[0]
    for scale in (1.0, factor, factor):
        engine.backward(engine(torch.full((4,), scale)))
        engine.step()
    found = engine.module.weight.detach().tolist(), engine.progress.skipped_steps
    engine.destroy()
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_a_gradient_beyond_the_headroom_costs_one_step_on_every_rank(world: int) -> None:
    for weights, skipped in run_distributed(exploding, world, 1e6):
        assert skipped == 1
        assert weights == [-1e6] * 4  # the first step, and the third


def test_a_gradient_within_the_headroom_costs_nothing() -> None:
    assert exploding(16.0) == ([1.0 - 33.0] * 4, 0)


def test_what_is_not_finite_is_refused_as_without_the_section() -> None:
    with pytest.raises(TrainingError, match="is nan"):
        exploding(math.inf)


# -- hashes ----------------------------------------------------------------------------------------


def test_a_hash_sees_one_bit_and_two_elements_that_change_places() -> None:
    engine = make({})
    before = state_hash(engine)
    assert engine.state_hash() == before
    weights = engine.module.norm.bias
    with torch.no_grad():
        weights[0], weights[1] = 1.0, 2.0
    first = engine.state_hash()
    with torch.no_grad():
        weights[0], weights[1] = 2.0, 1.0
    second = engine.state_hash()
    with torch.no_grad():
        weights[0] = math.nextafter(2.0, 3.0)
        weights.view(torch.int32)[0] += 1
    third = engine.state_hash()
    assert len({before, first, second, third}) == 4
    engine.destroy()


# -- what is refused -------------------------------------------------------------------------------


class Normalised(Model):
    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(3)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"prescale_gradients": True}, "prescale_gradients"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor"),
        ({"communication_data_type": "bf16"}, "communication_data_type"),
        ({"sparse_gradients": True}, "sparse_gradients"),
        ({"exact": {"headroom": 40}}, "headroom"),
    ],
)
def test_configs_that_round_sums_are_refused_by_name(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(keys)


def test_running_statistics_are_refused_by_name() -> None:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "exact": {},
    }
    with pytest.raises(ConfigError, match=r"statistics \(BatchNorm1d\)"):
        drivetrain.initialize(model=Normalised(), config=config)


def test_a_model_in_float64_is_refused_by_name() -> None:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "exact": {},
    }
    with pytest.raises(ConfigError, match="float64"):
        drivetrain.initialize(model=Line().double(), config=config)


def unlike_threads() -> None:
    import os

    threads = 1 + int(os.environ["RANK"])
    make({"exact": {"threads": threads}})


def test_ranks_with_other_kernels_are_refused() -> None:
    with pytest.raises(RanksFailedError, match=r"different plans|different kernels|exact.threads"):
        run_distributed(unlike_threads, 2)

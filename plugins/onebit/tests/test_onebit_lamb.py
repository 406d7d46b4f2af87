"""1-bit LAMB: each update is the paper's, written out in float64, also over a resume."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from onebit_reference import NUMEL, SHAPES, OnePerRank, cuts, gradient, initial, make, train

from drivetrain.errors import ConfigError
from drivetrain.testing import run_distributed

FREEZE, STEPS = 6, 14
PARAMS = {
    "lr": 1e-2,
    "betas": [0.9, 0.95],
    "eps": 1e-3,
    "weight_decay": 0.1,
    "freeze_step": FREEZE,
    "max_coeff": 0.5,
    "coeff_beta": 0.8,
    "factor_max": 2.0,
    "factor_min": 0.6,
    "factor_threshold": 0.01,
}


def by_the_paper(world: int) -> list[np.ndarray]:
    """Li et al. 2021, algorithm 1, with the details that README.md states."""
    p, (beta1, beta2), eps = PARAMS, PARAMS["betas"], PARAMS["eps"]
    weight, m, v = initial(), np.zeros(NUMEL), np.zeros(NUMEL)
    fresh, scaling = v, dict.fromkeys(SHAPES, 1.0)
    trust, factor = dict.fromkeys(SHAPES, 0.0), dict.fromkeys(SHAPES, 1.0)
    compression, seen = OnePerRank(world), []
    for step in range(STEPS):
        own = np.stack([gradient(step, rank, FREEZE) for rank in range(world)])
        if step < FREEZE:
            g = own.mean(axis=0)
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
            fresh = v.copy()
        else:
            if step == FREEZE:
                rms = {name: np.sqrt(np.mean(part**2)) for name, part in cuts(m).items()}
                scaling = {name: np.mean([*rms.values()]) / rms[name] for name in SHAPES}
            scales = np.concatenate(
                [np.full(part.shape, scaling[name]) for name, part in cuts(m).items()]
            )
            before = m
            m = compression.mean((beta1 * m + (1 - beta1) * own) * scales) / scales
            m = np.where(v == 0, 0.0, m)
            g = (m - beta1 * before) / (1 - beta1)
            fresh = beta2 * fresh + (1 - beta2) * g**2
        for name in SHAPES:
            w, mm, vv, ff = (cuts(x)[name] for x in (weight, m, v, fresh))
            direction = mm / (np.sqrt(vv) + eps)
            u = direction + p["weight_decay"] * w
            if step < FREEZE:
                ratio = np.linalg.norm(w) / np.linalg.norm(u)
                ratio = np.clip(ratio, 0.01, p["max_coeff"])
                trust[name] = p["coeff_beta"] * trust[name] + (1 - p["coeff_beta"]) * ratio
            else:
                now = np.max((np.sqrt(vv) + eps) / (np.sqrt(ff) + eps))
                share = min(1.0, np.linalg.norm(direction) / np.linalg.norm(u))
                now = np.clip(now * share + 1 - share, p["factor_min"], p["factor_max"])
                change = p["factor_threshold"]
                last = factor[name]
                factor[name] = np.clip(now, last * (1 - change), last * (1 + change))
                ratio = trust[name] * factor[name]
            w -= p["lr"] * ratio * u
        seen.append(weight.copy())
    return seen


def trained() -> list[np.ndarray]:
    engine = make("OneBitLamb", PARAMS)
    seen = train(engine, range(STEPS), FREEZE)
    engine.destroy()
    return seen


def resumed(folder: str, stop: int) -> list[np.ndarray]:
    engine = make("OneBitLamb", PARAMS)
    seen = train(engine, range(stop), FREEZE)
    engine.save_checkpoint(folder)
    engine.destroy()
    engine = make("OneBitLamb", PARAMS)
    engine.load_checkpoint(folder)
    seen += train(engine, range(stop, STEPS), FREEZE)
    engine.destroy()
    return seen


def on_other_ranks(folder: str) -> list[np.ndarray]:
    engine = make("OneBitLamb", PARAMS)
    engine.load_checkpoint(folder)
    seen = [engine.module.flat(), *train(engine, range(STEPS, STEPS + 3))]
    engine.destroy()
    return seen


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_update_is_that_of_the_algorithm(world: int) -> None:
    expected = by_the_paper(world) if world > 1 else None
    for seen in run_distributed(trained, world):
        for step, weights in enumerate(seen if expected else seen[:FREEZE]):
            reference = (expected or by_the_paper(1))[step]
            assert np.abs(weights - reference).max() < 1e-5, step


@pytest.mark.parametrize("stop", [3, FREEZE, 9])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path: Path, stop: int) -> None:
    unbroken = run_distributed(trained, 2)
    for one, other in zip(run_distributed(resumed, 2, str(tmp_path), stop), unbroken, strict=True):
        assert np.array_equal(one[-1], other[-1])


def test_another_number_of_ranks_goes_on_with_steps_of_like_size(tmp_path: Path) -> None:
    """The trust ratio was one rank's own, so it is found again; 0 would stop training."""
    seen = run_distributed(resumed, 2, str(tmp_path), 9)[0]
    run_distributed(_saved_at_the_end, 2, str(tmp_path))
    later = run_distributed(on_other_ranks, 3, str(tmp_path))[0]
    usual = np.abs(seen[-1] - seen[-2]).max()
    for one, other in pairwise(later):
        assert 0.1 * usual < np.abs(other - one).max() < 10 * usual


def _saved_at_the_end(folder: str) -> None:
    engine = make("OneBitLamb", PARAMS)
    train(engine, range(STEPS), FREEZE)
    engine.save_checkpoint(folder)
    engine.destroy()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"freeze_step": 0}, "freeze_step"),
        ({"max_grad_norm": 1.0}, "max_grad_norm.*use gradient_clipping"),
        ({"eps_inside_sqrt": True}, "eps_inside_sqrt"),
        ({"factor_max": 0.1}, "factor_max must not be below"),
        ({"coeff_beta": 1.5}, "coeff_beta"),
        ({"bias_correction": True}, "bias_correction"),
    ],
)
def test_wrong_parameters_are_refused(params: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make("OneBitLamb", params)

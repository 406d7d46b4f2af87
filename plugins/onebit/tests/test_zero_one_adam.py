"""0/1 Adam: each update is the paper's, written out in float64; ranks are equal when saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from drivetrain_onebit.compression import message_bytes
from drivetrain_onebit.policies import Policies
from onebit_reference import NUMEL, OnePerRank, gradient, initial, make, train

from drivetrain.contracts import Purpose
from drivetrain.errors import ConfigError
from drivetrain.testing import run_distributed

FREEZE, STEPS = 7, 20
PARAMS = {
    "lr": 1e-2,
    "betas": [0.9, 0.95],
    "eps": 1e-3,
    "weight_decay": 0.1,
    "var_freeze_step": FREEZE,
    "var_update_scaler": 2,
    "local_step_scaler": 3,
    "local_step_clipper": 4,
}
REFRESHES = {1, 2, 4, 6}
SYNCHRONISES = {8, 9, 10, 12, 16, 20}
"""Distances 1, 1, 1, 2, 2, 2, 4 ... from update 8 on."""


def by_the_paper(world: int, *, settles: tuple[int, ...] = ()) -> list[np.ndarray]:
    """Lu et al. 2022, algorithm 1; [ranks, NUMEL] after each update.

    Args:
        world: number of ranks.
        settles: updates after which they synchronise out of turn.
    """
    p, (beta1, beta2), eps = PARAMS, PARAMS["betas"], PARAMS["eps"]
    lr, decay = p["lr"], p["weight_decay"]
    weight = np.tile(initial(), (world, 1))
    m, v = np.zeros((world, NUMEL)), np.zeros(NUMEL)
    compression, anchor, elapsed, seen = OnePerRank(world), weight[0], 0.0, []
    for step in range(1, STEPS + 1):
        g = np.stack([gradient(step - 1, rank, STEPS) for rank in range(world)])
        if step in REFRESHES:
            g = np.tile(g.mean(axis=0), (world, 1))
            v = beta2 * v + (1 - beta2) * g[0] ** 2
        elif step <= FREEZE:
            g = np.tile(compression.mean(g), (world, 1))
        if step == FREEZE + 1:
            compression, anchor = OnePerRank(world), weight[0].copy()
        m = np.where(v == 0, 0.0, beta1 * m + (1 - beta1) * g)
        weight = weight * (1 - lr * decay) - lr * m / (np.sqrt(v) + eps)
        elapsed += lr
        if step > FREEZE and (step in SYNCHRONISES or step in settles):
            way = compression.mean((weight - anchor) * (np.sqrt(v) + eps))
            m = np.tile(np.where(v == 0, 0.0, -way / elapsed), (world, 1))
            met = np.where(v == 0, weight[0], anchor + way / (np.sqrt(v) + eps))
            weight, anchor, elapsed = np.tile(met, (world, 1)), met, 0.0
        if step <= FREEZE:
            elapsed = 0.0
        seen.append(weight.copy())
    return seen


def trained() -> tuple[list[np.ndarray], list[float]]:
    engine = make("ZeroOneAdam", PARAMS)
    seen, sent = [], []
    for step in range(STEPS):
        engine.job.byte_log.reset()
        seen += train(engine, range(step, step + 1), STEPS)
        log = engine.job.byte_log
        sent.append((log.total(Purpose.GRADIENT).sent_bytes, log.total(Purpose.STATE).sent_bytes))
    engine.destroy()
    return seen, sent


def resumed(folder: str, stop: int, **config: object) -> list[np.ndarray]:
    engine = make("ZeroOneAdam", PARAMS, **config)
    seen = train(engine, range(stop), STEPS)
    engine.save_checkpoint(folder)
    engine.destroy()
    engine = make("ZeroOneAdam", PARAMS, **config)
    engine.load_checkpoint(folder)
    seen += train(engine, range(stop, STEPS), STEPS)
    engine.destroy()
    return seen


def saved_while_apart() -> list[np.ndarray]:
    """bfloat16 parameters with masters: what the module shows after a save is equal as well."""
    engine = make("ZeroOneAdam", PARAMS, bf16={"enabled": True})
    train(engine, range(14), STEPS)
    apart = engine.module.flat()
    engine.states.flush()
    met = engine.module.flat()
    engine.destroy()
    return [apart, met]


def changed_while_apart() -> np.ndarray:
    """A script may change a parameter in place; that copies differ is no fault then."""
    engine = make("ZeroOneAdam", PARAMS)
    train(engine, range(13), STEPS)
    with torch.no_grad():
        engine.module.first.mul_(0.5)
    train(engine, range(13, STEPS), STEPS)
    weights = engine.module.flat()
    engine.destroy()
    return weights


@pytest.mark.parametrize("world", [2, 3])
def test_each_update_is_that_of_the_algorithm(world: int) -> None:
    expected = by_the_paper(world)
    for rank, (seen, _) in enumerate(run_distributed(trained, world)):
        for step, weights in enumerate(seen):
            assert np.abs(weights - expected[step][rank]).max() < 2e-5, (rank, step + 1)


def test_ranks_have_the_same_bits_after_each_synchronisation_and_differ_between() -> None:
    (one, _), (other, _) = run_distributed(trained, 2)
    for step, (mine, theirs) in enumerate(zip(one, other, strict=True), 1):
        assert np.array_equal(mine, theirs) == (step <= FREEZE or step in SYNCHRONISES), step


def test_bytes_are_those_of_the_formula() -> None:
    dense, bits = 4 * NUMEL, message_bytes(NUMEL, 2)
    for _, sent in run_distributed(trained, 2):
        for step, (gradients, states) in enumerate(sent, 1):
            assert gradients == (dense if step in REFRESHES else 0), step
            one_bit = (step <= FREEZE and step not in REFRESHES) or step in SYNCHRONISES
            initial_values = dense / 2 if step == 0 else 0
            assert states == (bits if one_bit else initial_values), step


@pytest.mark.parametrize("stop", [5, 10, 14])
def test_a_save_brings_ranks_together_and_a_resumed_run_goes_on_from_there(
    tmp_path: Path, stop: int
) -> None:
    expected = by_the_paper(2, settles=(stop,))
    for rank, seen in enumerate(run_distributed(resumed, 2, str(tmp_path), stop)):
        for step, weights in enumerate(seen, 1):
            if step != stop:  # weights were read before the save
                reference = expected[step - 1][rank]
                assert np.abs(weights - reference).max() < 2e-5, (rank, step)


def test_what_the_module_shows_is_equal_after_a_save_with_masters() -> None:
    (apart, met), (other_apart, other_met) = run_distributed(saved_while_apart, 2)
    assert not np.array_equal(apart, other_apart)
    assert np.array_equal(met, other_met)


def test_copies_may_differ_where_a_script_has_changed_parameters() -> None:
    one, other = run_distributed(changed_while_apart, 2)
    assert np.array_equal(one, other)  # the last update is a synchronisation


def test_policies_are_those_that_are_counted_step_by_step() -> None:
    for freeze, scaler, local, furthest in ((100, 3, 5, 8), (40, 1, 2, 6), (64, 16, 1, 16)):
        policies = Policies(freeze, scaler, local, furthest)
        distance, refreshes, sync, steps = 1, 0, 1, 0
        for step in range(1, freeze + 200):
            if step <= freeze:
                is_one = step % distance == 0
                assert policies.refreshes(step) == is_one, step
                refreshes += is_one
                if refreshes == scaler:
                    distance, refreshes = distance * 2, 0
                continue
            assert not policies.refreshes(step)
            assert policies.synchronises(step) == (step % sync == 0), step
            steps += 1
            if steps % local == 0:
                sync = min(2 * sync, furthest)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"var_update_scaler": 0}, "var_update_scaler"),
        ({"local_step_clipper": -1}, "local_step_clipper"),
        ({"freeze_step": 3}, "freeze_step.*var_freeze_step"),
    ],
)
def test_wrong_parameters_are_refused(params: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make("ZeroOneAdam", params)

"""States that leave a device which is not the host, between the phases of a job, and come back.

The device is the one in C++ that torch lacks; it counts its memory itself.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain.testing import run_distributed
from drivetrain.testing.distributed import start_anew

sys.path.insert(0, str(Path(__file__).parent / "private_use"))

import on_demand
from warp_accelerator import library

STEPS = 3
BASE = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}, "steps_per_print": 0}


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """Ranks find the device in the cache; they are new ones, see the tests of the device."""
    library().ensure_built()
    start_anew()


def config(stage: int, **more: Any) -> dict[str, Any]:
    offload = {key: more.pop(key) for key in list(more) if key.startswith("offload")}
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100, **offload}
    return {**BASE, **({"zero_optimization": zero} if stage else {}), **more}


BF16 = {"bf16": {"enabled": True}}
CASES = {
    "plain": config(0),
    "bf16": config(0, **BF16),
    "zero1": config(1, **BF16),
    "zero2": config(2, **BF16),
    "zero3": config(3, **BF16),
    "zero3-fp32": config(3),
    "accumulating": config(2, gradient_accumulation_steps=2, **BF16),
    "host-homes": config(2, offload_optimizer={"device": "cpu"}, **BF16),
    "half-host": config(1, offload_optimizer={"device": "cpu", "ratio": 0.5}, **BF16),
    "kept-parameters": config(
        3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}, **BF16
    ),
}
each_case = pytest.mark.parametrize("given", CASES.values(), ids=CASES)
each_stage = pytest.mark.parametrize("stage", [0, 1, 2, 3])


@each_case
def test_losses_are_bitwise_those_without(given: dict[str, Any]) -> None:
    plain = run_distributed(on_demand.undisturbed, 2, given, STEPS)
    ranks = run_distributed(on_demand.interrupted, 2, given, STEPS, None, {})
    assert [losses for losses, _, _ in ranks] == plain


@each_case
def test_the_device_has_as_many_bytes_more_as_were_moved(given: dict[str, Any]) -> None:
    for _, memory, moved in run_distributed(on_demand.interrupted, 2, given, 1, None, {}):
        for (before, between, after), counts in zip(memory, moved, strict=True):
            # What guards parameters, and what ranks have just agreed on, are single numbers.
            assert after == pytest.approx(before, abs=64)
            assert before - between == pytest.approx(sum(counts.values()), abs=200)


def test_bytes_are_those_of_the_model_by_kind() -> None:
    """One rank, bf16: 2 bytes a parameter and gradient, 4 a master, 8 for Adam's moments."""
    _, _, moved = run_distributed(on_demand.interrupted, 1, CASES["bf16"], 1, None, {})[0]
    count = sum(p.numel() for p in on_demand.tiny_gpt().parameters())
    assert moved[0] == {
        "optim_states": 8 * count,
        "hp_params": 4 * count,
        "lp_params": 2 * count,
        "lp_grads": 2 * count,
        "contiguous_grad_buffer": 0,
    }


def test_zero_divides_what_there_is_to_move() -> None:
    count = sum(p.numel() for p in on_demand.tiny_gpt().parameters())
    for _, _, moved in run_distributed(on_demand.interrupted, 2, CASES["zero2"], 1, None, {}):
        assert moved[0]["optim_states"] == pytest.approx(8 * count / 2, rel=0.01)
        assert moved[0]["lp_params"] == pytest.approx(2 * count, rel=0.01)


@pytest.mark.parametrize(
    "include", [["optim_states"], ["hp_params", "lp_grads"], ["contiguous_grad_buffer"]]
)
def test_only_the_kinds_asked_for_are_moved(include: list[str]) -> None:
    given = CASES["zero2"]
    plain = run_distributed(on_demand.undisturbed, 2, given, STEPS)
    for rank, (losses, _, moved) in enumerate(
        run_distributed(on_demand.interrupted, 2, given, STEPS, include, {})
    ):
        assert losses == plain[rank]
        assert set(moved[0]) <= {*include}
        assert all(count > 0 for count in moved[0].values())


@pytest.mark.parametrize("options", [{"pin_memory": False}, {"non_blocking": True}], ids=str)
def test_ordinary_memory_and_queued_copies_keep_the_values_too(options: dict[str, Any]) -> None:
    given = CASES["zero3"]
    plain = run_distributed(on_demand.undisturbed, 2, given, STEPS)
    ranks = run_distributed(on_demand.interrupted, 2, given, STEPS, None, options)
    assert [losses for losses, _, _ in ranks] == plain


@each_stage
def test_a_model_generates_without_optimizer_states_and_gradients(stage: int) -> None:
    given = config(stage, **BF16)
    include = ["optim_states", "hp_params", "lp_grads"]
    plain = run_distributed(on_demand.undisturbed, 2, given, STEPS)
    assert run_distributed(on_demand.generates_without, 2, given, include) == plain


@each_stage
def test_backward_needs_no_optimizer_states(stage: int) -> None:
    given = config(stage, **BF16)
    plain = run_distributed(on_demand.undisturbed, 2, given, STEPS)
    assert run_distributed(on_demand.steps_after_a_backward_without, 2, given) == plain


@each_stage
def test_use_of_what_is_away_is_one_clear_error(stage: int) -> None:
    for found in run_distributed(on_demand.refusals, 2, config(stage, **BF16)):
        for use, error in found.items():
            assert "offload_states() has moved" in error, use
            assert "call reload_states(engine) first" in error, use


def test_each_use_is_refused_exactly_when_what_it_needs_is_away() -> None:
    update = {"step", "rebuild", "refresh"}
    assert run_distributed(on_demand.refusals_by_kind, 1, CASES["zero2"])[0] == {
        "optim_states": update,
        "hp_params": update,
        "lp_params": {*update, "evaluate", "forward", "backward"},
        "lp_grads": {*update, "backward", "zero_grad"},
    }


@each_stage
def test_a_checkpoint_can_be_saved_but_not_loaded_meanwhile(stage: int, tmp_path: Path) -> None:
    given = config(stage, **BF16)
    for first, second in run_distributed(on_demand.saved_while_away, 2, given, str(tmp_path)):
        assert first == second


@each_stage
def test_single_states_can_be_read_meanwhile(stage: int) -> None:
    given = config(stage, **BF16)
    for before, between in run_distributed(on_demand.read_while_away, 2, given):
        assert all(map(torch.equal, before, between))
        assert before[0].shape == (128, 32)


def test_places_are_told(tmp_path: Path) -> None:
    kinds = ("optim_states", "hp_params", "lp_params", "lp_grads")
    there = {kind: {"device"} for kind in kinds}
    host = {kind: {"host"} for kind in kinds}
    some = {**there, "optim_states": {"host"}, "hp_params": {"host"}}
    for found in run_distributed(on_demand.places, 2, CASES["zero3"]):
        assert found == [there, some, host, there]


@each_stage
def test_a_destroyed_engine_leaves_the_parameters_their_values(stage: int) -> None:
    for before, after in run_distributed(on_demand.destroyed_while_away, 2, config(stage)):
        assert before == after


def test_too_little_memory_on_either_side_leaves_everything_where_it_was() -> None:
    given = CASES["zero3"]
    plain = run_distributed(on_demand.undisturbed, 2, given, STEPS)
    ranks = run_distributed(on_demand.without_host_memory, 2, given)
    for rank, (away, back, losses) in enumerate(ranks):
        assert "no pinned host memory for " in away
        assert "cannot lock pages" in away
        assert "pin_memory=False" in away
        assert "warp:0 has no memory for " in back
        assert losses == plain[rank]


def test_memory_that_cannot_be_freed_stays_and_is_counted() -> None:
    moved, said = run_distributed(on_demand.shared_with_a_client, 1, CASES["bf16"])[0]
    count = sum(p.numel() for p in on_demand.tiny_gpt().parameters())
    assert moved["optim_states"] == 4 * count
    assert len(said) == 1
    assert f"{4 * count} bytes of optim_states stay on warp:0: the memory is shared" in said[0]

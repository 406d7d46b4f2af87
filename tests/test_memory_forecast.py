"""What ``drivetrain report --memory`` foretells is what a job then holds.

A forecast is made without memory; the job runs on ranks of its own. The forecast counts the memory
that states lie in, with padding, and the job's table the elements: that is 2 % at most, or a few
cache lines.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_cli.memory import Forecast, Model, Ranks, forecast
from drivetrain_cli.stand_in import without_memory

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.testing import run_distributed
from drivetrain.testing.distributed import start_anew
from drivetrain.testing.models import TinyGPT

sys.path.insert(0, str(Path(__file__).parent / "private_use"))

from warp_accelerator import library

RANKS = 2
TOLERANCE = 0.02
PASSING = {
    "gradients on their way",
    "gathered parameters, at most",
    "activations",
}
"""Kinds that a job's table does not have, since they live during a pass."""

BUFFERS = {
    ("buffers of tiles", "host"),
    ("shards on their way, at most", "host"),
    ("shards on their way, at most", "device"),
}

Table = dict[tuple[str, str], int]


def gpt() -> TinyGPT:
    return TinyGPT(vocabulary=256, width=128, layers=4)


SIZE = sum(p.numel() for p in without_memory(gpt, "").parameters())


@pytest.fixture(scope="module")
def other_device() -> None:
    """Ranks find the device in the cache; they are new ones, see the tests of the device."""
    library().ensure_built()
    start_anew()


def held(given: dict[str, Any]) -> tuple[Table, Table]:
    """This rank's bytes by kind and place after a step, and how many of them are page-locked."""
    engine, *_ = drivetrain.initialize(model=gpt(), config=given)
    return after_a_step(engine)


def held_beside_the_host(given: dict[str, Any]) -> tuple[Table, Table]:
    """The same on the device in C++."""
    from on_demand import start

    return after_a_step(start(given, gpt()))


def lent_out(pin_memory: bool) -> tuple[Table, Table]:
    """The same with states away on demand; afterwards they are where they were."""
    from on_demand import start

    engine = start(config(2), gpt())
    before = table_and_locked(engine)[0]
    engine.offload_states(include=["optim_states", "lp_params"], pin_memory=pin_memory)
    found = table_and_locked(engine)
    engine.reload_states()
    assert table_and_locked(engine)[0] == before
    engine.destroy()
    return found


def activations_away(given: dict[str, Any]) -> Table:
    """Bytes of activations between forward and backward, on the device in C++."""
    from on_demand import start

    engine = start(given, gpt())
    tokens = torch.ones(8, 33, dtype=torch.int64, device=engine.device)
    loss = engine(tokens[:, :-1], tokens[:, 1:])
    found = {key: n for key, n in table_and_locked(engine)[0].items() if key[0] == "activations"}
    engine.backward(loss)
    engine.destroy()
    return found


def after_a_step(engine: Engine) -> tuple[Table, Table]:
    tokens = torch.ones(1, 9, dtype=torch.int64, device=engine.device)
    engine.backward(engine(tokens[:, :-1], tokens[:, 1:]))
    engine.step()
    found = table_and_locked(engine)
    engine.destroy()
    return found


def table_and_locked(engine: Engine) -> tuple[Table, Table]:
    from drivetrain_offload import memory_table

    sizes, locked = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for row in memory_table(engine):
        if row.kind != "step":
            sizes[row.kind, row.place] += row.nbytes
            locked[row.kind, row.place] += row.locked
    return dict(sizes), dict(locked)


def config(stage: int, precision: str = "bf16", **zero: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": 100_000,
            **zero,
        },
    }


def foretold(given: dict[str, Any], *, exact: bool = True, on_cpu: bool = True) -> Forecast:
    model = (
        Model(without_memory(gpt, "gpt"), "gpt", 128) if exact else Model.of_size(SIZE, None, None)
    )
    return forecast(given, model, Ranks(RANKS, 1, on_cpu), sequence=8)


def table_of(expected: Forecast) -> Table:
    sizes = Counter[tuple[str, str]]()
    for kind, place, nbytes, _ in [*expected.held, *expected.buffers]:
        sizes[kind, place] += nbytes
    return {key: n for key, n in sizes.items() if n and key[0] not in PASSING}


def settings(folder: Path) -> dict[str, dict[str, Any]]:
    files = {"device": "nvme", "nvme_path": str(folder)}
    tiles = {**files, "buffer_size": 16_384, "buffer_count": 3}
    parameters = {**files, "max_in_cpu": 0}
    return {
        "nothing": {},
        "states on the host": {"offload_optimizer": {"device": "cpu"}},
        "a part of the states on the host": {"offload_optimizer": {"device": "cpu", "ratio": 0.4}},
        "late updates": {"offload_optimizer": {"device": "cpu", "delayed_update": True}},
        "guesses": {"offload_optimizer": {"device": "cpu", "super_offload": True}},
        "states in files": {"offload_optimizer": tiles},
        "parameters in files": {"offload_param": parameters},
        "some parameters in files": {"offload_param": {**files, "max_in_cpu": SIZE // 4}},
        "both in files": {"offload_optimizer": tiles, "offload_param": parameters},
        "parameters on the host": {"offload_param": {"device": "cpu"}},
    }


@pytest.mark.parametrize(
    ("stage", "setting", "precision"),
    [
        (0, "nothing", "bf16"),
        (2, "nothing", "bf16"),
        (3, "nothing", "bf16"),
        (3, "nothing", "fp32"),
        (0, "states on the host", "bf16"),
        (2, "states on the host", "bf16"),
        (2, "guesses", "bf16"),
        (3, "states on the host", "bf16"),
        (0, "states in files", "bf16"),
        (2, "states in files", "bf16"),
        (2, "states in files", "fp32"),
        (3, "parameters in files", "bf16"),
        (3, "parameters in files", "fp32"),
        (3, "some parameters in files", "bf16"),
        (3, "both in files", "bf16"),
    ],
)
def test_a_rank_holds_what_was_foretold(
    stage: int, setting: str, precision: str, tmp_path: Path
) -> None:
    given = config(stage, precision, **settings(tmp_path)[setting])
    expected = table_of(foretold(given))
    assert not list(tmp_path.iterdir()), "a forecast leaves no trace"
    for found, locked in run_distributed(held, RANKS, given):
        assert found.keys() == expected.keys()
        assert not any(locked.values())
        for key, nbytes in expected.items():
            assert found[key] == pytest.approx(nbytes, rel=TOLERANCE, abs=4096), key


@pytest.mark.parametrize(
    ("stage", "setting"),
    [
        (0, "nothing"),
        (2, "states on the host"),
        (3, "states in files"),
        (3, "parameters in files"),
    ],
)
def test_the_size_of_a_model_is_enough_to_foretell_states(
    stage: int, setting: str, tmp_path: Path
) -> None:
    given = config(stage, **settings(tmp_path)[setting])
    expected = foretold(given, exact=False).held
    found, _ = run_distributed(held, RANKS, given)[0]
    assert {(kind, place) for kind, place, *_ in expected} == found.keys() - BUFFERS
    for kind, place, nbytes, _ in expected:
        assert found[kind, place] == pytest.approx(nbytes, rel=TOLERANCE, abs=4096), kind


def test_stage_1_keeps_whole_gradients() -> None:
    held = {(kind, place): n for kind, place, n, _ in foretold(config(1)).held}
    parts = {"parameter": 2, "gradient": 2, "master": 2, "exp_avg": 2, "exp_avg_sq": 2}
    assert held == pytest.approx(
        {(kind, "device"): size * SIZE for kind, size in parts.items()}, rel=TOLERANCE
    )


def test_of_a_tensor_that_is_cut_the_table_shows_all_in_one_place(tmp_path: Path) -> None:
    given = config(2, **settings(tmp_path)["a part of the states on the host"])
    expected = table_of(foretold(given))
    largest = 4 * max(p.numel() for p in gpt().parameters())
    (found, _), _ = run_distributed(held, RANKS, given)
    assert found.keys() == expected.keys()
    assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=TOLERANCE)
    for key, nbytes in expected.items():
        assert found[key] == pytest.approx(nbytes, rel=TOLERANCE, abs=largest), key
    assert expected["master", "host"] == pytest.approx(0.4 * 4 * SIZE / RANKS, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("stage", "setting"),
    [
        (2, "states on the host"),
        (2, "late updates"),
        (2, "guesses"),
        (2, "states in files"),
        (3, "states on the host"),
        (3, "parameters on the host"),
        (3, "some parameters in files"),
        (3, "both in files"),
    ],
)
@pytest.mark.usefixtures("other_device")
def test_beside_a_device_with_memory_of_its_own_pinned_bytes_are_foretold_too(
    stage: int, setting: str, tmp_path: Path
) -> None:
    given = config(stage, **settings(tmp_path)[setting])
    expected = foretold(given, on_cpu=False)
    pinned = {kind: each["pinned"] for kind, each in expected.by_kind().items() if each["pinned"]}
    table = table_of(expected)
    for found, locked in run_distributed(held_beside_the_host, RANKS, given):
        assert found.keys() == table.keys()
        for key, nbytes in table.items():
            assert found[key] == pytest.approx(nbytes, rel=TOLERANCE, abs=4096), key
        assert {kind: n for (kind, _), n in locked.items() if n} == pytest.approx(
            pinned, rel=TOLERANCE, abs=4096
        )


@pytest.mark.usefixtures("other_device")
@pytest.mark.parametrize("pin_memory", [True, False])
def test_states_that_are_lent_out_are_pinned_if_that_was_asked_for(pin_memory: bool) -> None:
    for found, locked in run_distributed(lent_out, RANKS, pin_memory):
        away = {"exp_avg", "exp_avg_sq", "parameter"}
        assert {kind for kind, place in found if place == "host"} == away
        for kind in away:
            assert locked[kind, "host"] == (found[kind, "host"] if pin_memory else 0)


@pytest.mark.usefixtures("other_device")
@pytest.mark.parametrize("place", ["host", "nvme"])
def test_activations_that_leave_are_about_as_many_as_was_estimated(
    place: str, tmp_path: Path
) -> None:
    """Within a third: buffers are up to a quarter too large, and a block may save a little more."""
    section = {"enabled": True, "device": "cpu" if place == "host" else "nvme", "min_bytes": 1000}
    given = {
        **config(2),
        "train_micro_batch_size_per_gpu": 8,
        "activation_offload": {**section, "nvme_path": str(tmp_path)},
    }
    model = Model(without_memory(gpt, "gpt"), "gpt", 128)
    kinds = forecast(given, model, Ranks(RANKS, 1, False), sequence=32).by_kind()
    expected = kinds["activations"]
    block = 16 * 2 * 128 * 8 * 32  # bytes
    assert expected["device"] == 3 * block  # the last one, and two on their way
    assert expected[place] == 3 * block
    assert not list(tmp_path.iterdir()), "a forecast leaves no trace"
    for found in run_distributed(activations_away, RANKS, given):
        assert found["activations", place] == pytest.approx(expected[place], rel=0.33)
        if place == "nvme":
            most = kinds["activations on their way, at most"]["host"]
            assert 0 < found["activations", "host"] <= most == 2 * block

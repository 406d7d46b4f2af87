"""What ``offload_states`` refuses, and what it does where device and host memory are the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from drivetrain_offload import StateKind, offload_states, reload_states, state_devices
from drivetrain_offload.on_demand.states import get_state_devices

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.errors import TrainingError
from drivetrain.testing.models import mlp


@pytest.fixture
def engine() -> Iterator[Engine]:
    module = mlp()
    config = {"train_batch_size": 1, "optimizer": {"type": "AdamW"}, "accelerator": "cpu"}
    engine, *_ = drivetrain.initialize(
        model=module, model_parameters=module.parameters(), config=config
    )
    yield engine
    engine.destroy()


def test_on_the_cpu_nothing_is_moved(engine: Engine) -> None:
    states = engine.states
    assert offload_states(engine) == dict.fromkeys(
        ["optim_states", "hp_params", "lp_params", "lp_grads", "contiguous_grad_buffer"], 0
    )
    assert engine.states is states
    reload_states(engine)


def test_only_kinds_asked_for_are_answered(engine: Engine) -> None:
    assert offload_states(engine, ["lp_grads", StateKind.HP_PARAMS]) == {
        "hp_params": 0,
        "lp_grads": 0,
    }


def test_kinds_may_come_from_an_enum_of_deepspeeds_names(engine: Engine) -> None:
    from enum import Enum

    class Theirs(Enum):
        optim_states = "optim_states"

    assert offload_states(engine, {Theirs.optim_states}) == {"optim_states": 0}  # type: ignore[arg-type]


def test_an_unknown_kind_is_refused_with_the_known_ones(engine: Engine) -> None:
    with pytest.raises(TrainingError, match=r"no states 'weights', expected some of optim_states"):
        offload_states(engine, ["weights"])


def test_another_device_is_refused(engine: Engine) -> None:
    with pytest.raises(TrainingError, match=r"device 'nvme', expected 'cpu'.*offload_optimizer"):
        offload_states(engine, device="nvme")


def test_places_of_states_are_told_by_kind(engine: Engine) -> None:
    assert state_devices(engine) == {
        "lp_params": {"device"},
        "lp_grads": {"device"},
        "optim_states": {"device"},
    }
    for kind in ("optim_states", StateKind.LP_PARAMS):
        assert get_state_devices(engine, kind) == {engine.device}
    assert get_state_devices(engine, "hp_params") == set()
    with pytest.raises(ValueError, match="weights"):
        get_state_devices(engine, "weights")

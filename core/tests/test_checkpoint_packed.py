"""Schedules and loaders of others come back from a checkpoint, whatever their state is made of."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_engine import CONFIG, Model
from torch.optim import Optimizer, lr_scheduler

import drivetrain
from drivetrain.checkpoint.format.packed import packed, unpacked
from drivetrain.engine.engine import Engine
from drivetrain.engine.loader import endless_batches
from drivetrain.errors import CheckpointError

SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4]),
    "in a sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.MultiStepLR(o, [2])], [2]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.2, 2, cycle_momentum=False),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
}


def engine_with(schedule: Callable[[Optimizer], Any]) -> Engine:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(60, 4, generator=generator)
    return drivetrain.initialize(
        model=Model(),
        lr_scheduler=schedule,
        training_data=torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)),
        config={**CONFIG, "scheduler": {}},
    )[0]


def rates(engine: Engine, steps: range) -> list[float]:
    found = []
    batches = endless_batches(engine.training_dataloader, engine)
    for step in steps:
        plateau = isinstance(engine.lr_scheduler, lr_scheduler.ReduceLROnPlateau)
        inputs, targets = next(batches)
        engine.backward(engine(inputs, targets))
        engine.step({"metrics": float(step % 3)} if plateau else None)
        found.append(engine.get_lr()[0])
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_of_torch_goes_on_where_it_was(name: str, tmp_path: Path) -> None:
    engine = engine_with(SCHEDULES[name])
    expected = rates(engine, range(8))
    engine.destroy()
    engine = engine_with(SCHEDULES[name])
    rates(engine, range(3))
    engine.save_checkpoint(str(tmp_path))
    state = engine.lr_scheduler.state_dict()
    engine.destroy()
    engine = engine_with(SCHEDULES[name])
    engine.load_checkpoint(str(tmp_path))
    assert engine.lr_scheduler.state_dict() == state
    assert rates(engine, range(3, 8)) == expected[3:]
    engine.destroy()


VALUES = [
    {1: "a", (2, 3): None, "b": [1.5, float("inf")]},
    {"__type__": "set", "items": [1]},
    Counter({4: 2, 2: 1}),
    OrderedDict([("z", 1), ("a", (1, (2,)))]),
    {"set": {1, 2}, "frozen": frozenset("ab"), "queue": deque([1, {2: 3}]), "raw": b"\x00\xff"},
    [True, None, -7, "text", {"nested": [{}]}],
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_what_json_has_no_form_for_comes_back_in_its_type(value: Any) -> None:
    found = unpacked(json.loads(json.dumps(packed(value, "state"))))
    assert found == value
    assert type(found) is type(value)


def test_tensors_and_numbers_of_numpy_come_back_as_tensors_and_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    value = {"rate": torch.tensor([0.1, 3e-8]), "count": numpy.int64(3), "x": numpy.float32(0.5)}
    found = unpacked(json.loads(json.dumps(packed(value, "state"))))
    assert torch.equal(found["rate"], value["rate"])
    assert (found["count"], found["x"]) == (3, 0.5)


def test_what_cannot_be_held_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"state\.a\[1\] is a object, which a checkpoint"):
        packed({"a": [1, object()]}, "state")

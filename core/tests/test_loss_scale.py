"""The loss scale, event by event against tables that were worked out by hand."""

from __future__ import annotations

import json

import pytest
import torch

from drivetrain.errors import CheckpointError, TrainingError
from drivetrain.precision.loss_scale import DynamicLossScaler, LossScaler


def never():
    raise AssertionError("nobody asked for the parameter's name")


def scales(scaler, events):
    """The scale after each event: ``"."`` is a good update, ``"x"`` an overflow."""
    seen = []
    for event in events:
        scaler.update(event == "x", never)
        seen.append(scaler.scale_value)
    return seen


def test_an_overflow_halves_the_scale_once_hysteresis_is_used_up():
    scaler = DynamicLossScaler(64, window=100, hysteresis=2)
    assert scales(scaler, "xxx.xx") == [64, 32, 16, 16, 8, 4]


@pytest.mark.parametrize(
    ("hysteresis", "expected"), [(1, [32, 16, 8]), (2, [64, 32, 16]), (3, [64, 64, 32])]
)
def test_hysteresis_is_the_overflow_that_first_shrinks(hysteresis, expected):
    assert scales(DynamicLossScaler(64, hysteresis=hysteresis), "xxx") == expected


def test_the_scale_doubles_every_window_of_good_updates():
    # Updates are counted from 0 and the last overflow is at -1, so the window of 3 has passed at
    # the updates 3, 6 and 9.
    scaler = DynamicLossScaler(8, window=3)
    assert scales(scaler, "..........") == [8, 8, 8, 16, 16, 16, 32, 32, 32, 64]


def test_the_window_starts_again_after_an_overflow():
    # update:                 0   1   2  3  4  5  6  7   8   9
    # since last overflow:    0   1      0  1  2     0   1   2
    scaler = DynamicLossScaler(8, window=2, hysteresis=1)
    assert scales(scaler, "..x...x...") == [8, 8, 4, 4, 4, 8, 4, 4, 4, 8]


def test_hysteresis_is_refilled_when_the_scale_doubles():
    # The overflow at 0 is tolerated and uses up the hysteresis. Since then, update 2 is the first
    # with a full window behind it (2 - 0 - 1 = 1): the scale doubles and tolerates again.
    scaler = DynamicLossScaler(8, window=1, hysteresis=2)
    assert scales(scaler, "x..xx") == [8, 8, 16, 16, 8]


def test_without_refill_a_second_overflow_shrinks_however_late():
    assert scales(DynamicLossScaler(8, window=100, hysteresis=2), "x....x") == [8] * 5 + [4]


def test_consecutive_hysteresis_is_refilled_by_every_good_update():
    scaler = DynamicLossScaler(8, window=100, hysteresis=2, consecutive_hysteresis=True)
    assert scales(scaler, "x.x.x.xx") == [8, 8, 8, 8, 8, 8, 8, 4]


def test_the_scale_stops_at_its_minimum_and_the_next_overflow_is_an_error():
    scaler = DynamicLossScaler(8, min_scale=3, hysteresis=1)
    assert scales(scaler, "xx") == [4, 3]
    with pytest.raises(TrainingError, match=r"gradient of layers\.1\.bias .* loss scale 3 "):
        scaler.update(True, lambda: "layers.1.bias")


def test_the_minimum_is_tolerated_as_long_as_hysteresis_lasts():
    scaler = DynamicLossScaler(1, min_scale=1, hysteresis=2)
    assert scales(scaler, "x") == [1]
    with pytest.raises(TrainingError):
        scaler.update(True, lambda: "w")


def test_a_state_continues_the_same_way_at_every_point():
    events = "..x...xx....x.xx......"
    settings = {"window": 3, "hysteresis": 2}
    whole = scales(DynamicLossScaler(256, **settings), events)
    for cut in range(len(events)):
        first = DynamicLossScaler(256, **settings)
        scales(first, events[:cut])
        second = DynamicLossScaler(2, **settings)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert scales(second, events[cut:]) == whole[cut:]


def test_a_fixed_scale_never_changes_not_even_by_loading():
    scaler = LossScaler(128)
    assert scales(scaler, "xxx....") == [128] * 7
    scaler.load_state_dict(DynamicLossScaler(4).state_dict())
    assert scaler.scale_value == 128
    assert scaler.active
    assert not scaler.dynamic


def test_no_scaling_leaves_the_loss_alone():
    loss = torch.tensor(2.0, dtype=torch.float16)
    assert LossScaler().scale(loss) is loss
    assert not LossScaler().active


def test_a_scaled_fp16_loss_does_not_overflow():
    loss = torch.tensor(3.0, dtype=torch.float16)
    assert DynamicLossScaler(2.0**16).scale(loss).item() == 3 * 2.0**16


@pytest.mark.parametrize("scale", [None, 0, "big", float("nan")])
def test_a_damaged_state_is_refused(scale):
    with pytest.raises(CheckpointError, match="saved loss scale"):
        DynamicLossScaler().load_state_dict({"scale": scale})

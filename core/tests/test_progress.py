from __future__ import annotations

import json

from drivetrain.job.progress import Progress


def test_counters_add_up_over_steps():
    progress = Progress()
    for applied in (True, False, True):
        for _ in range(4):
            progress.end_micro_batches(1)
        progress.end_step(samples=8, tokens=80, applied=applied)
    assert progress.steps == 3
    assert progress.micro_steps == 12
    assert progress.samples == 24
    assert progress.tokens == 240
    assert progress.skipped_steps == 1


def test_state_is_plain_data_and_restores():
    progress = Progress(steps=3, micro_steps=12, samples=24, tokens=240, skipped_steps=1)
    state = json.loads(json.dumps(progress.state_dict()))
    restored = Progress(mode="eval")
    restored.load_state_dict(state)
    assert restored == progress
    assert restored.mode == "eval"


def test_micro_batches_of_a_window_that_has_not_ended_are_not_saved():
    progress = Progress(steps=3, micro_steps=12)
    progress.end_micro_batches(1)
    restored = Progress()
    restored.load_state_dict(progress.state_dict())
    assert (restored.micro_steps, restored.in_window) == (12, 0)

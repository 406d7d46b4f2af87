"""The simulator's clocks, the choice of a schedule by them, and timelines to look at."""

from __future__ import annotations

import json
from xml.etree import ElementTree as ET

import pytest
from drivetrain_pipeline.schedules import (
    Costs,
    Instruction,
    LayerCosts,
    Recorder,
    ScheduleError,
    Timeline,
    as_chrome_trace,
    as_svg,
    as_text,
    candidates,
    choose,
    schedule,
    simulate,
)

EVEN = [LayerCosts(1, 1, 1, activations=1)] * 16


# -- clocks ------------------------------------------------------------------------------------


def test_clocks_follow_times_of_chunks_and_messages() -> None:
    costs = Costs((1, 2), (3, 4), (5, 6), send=0.5)
    timeline = simulate(schedule("1f1b", 2, 1), costs)
    spans = [[(str(s.instruction), s.begin, s.end) for s in stage] for stage in timeline.spans]
    assert spans == [
        [("F0.0", 0, 1), ("B0.0", 14, 22)],
        [("F0.1", 1.5, 3.5), ("B0.1", 3.5, 13.5)],
    ]
    assert timeline.makespan == 22
    assert timeline.bubbles == (1 - 9 / 22, 1 - 12 / 22)


def test_a_full_backward_may_take_less_than_its_halves() -> None:
    costs = Costs((1,), (1,), (1,), backward=(1.5,))
    assert simulate(schedule("1f1b", 1, 4), costs).makespan == 10
    assert simulate(schedule("zb_h1", 1, 4), costs).makespan == 12


def test_peaks_count_what_stays_for_gradients_of_weights() -> None:
    whole = Costs((1,) * 4, (1,) * 4, (1,) * 4, activations=(3,) * 4, fixed=(10,) * 4)
    part = Costs((1,) * 4, (1,) * 4, (1,) * 4, activations=(3,) * 4, kept=(1,) * 4)
    timeline = simulate(schedule("zb_h1", 4, 8), whole)
    assert timeline.peaks(whole) == (22, 22, 22, 22)
    # The last stage puts off three gradients of weights, which keep a third each.
    assert timeline.peaks(part) == (12, 10, 8, 6)


@pytest.mark.parametrize(
    ("costs", "reason"),
    [
        (lambda: Costs((1, 1), (1,), (1, 1)), "inputs of 1 chunks, but forward of 2"),
        (lambda: Costs((-1,), (1,), (1,)), "negative"),
        (lambda: simulate(schedule("1f1b", 2, 1), Costs.even(3)), "3 chunks, but .* 2"),
    ],
)
def test_costs_that_do_not_fit_are_refused(costs, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        costs()


# -- choice ------------------------------------------------------------------------------------


def test_without_a_limit_the_shortest_step_is_chosen() -> None:
    found = choose(EVEN, 4, 8)
    tried = {(c.schedule.name, c.schedule.chunks): c for c in candidates(EVEN, 4, 8)}
    assert len(tried) == 7  # interleaved with 2, 3 and 4 chunks
    assert found.timeline.makespan == min(c.timeline.makespan for c in tried.values())
    assert found.schedule.name == "zb_v"


def test_a_limit_of_memory_leaves_out_what_keeps_more() -> None:
    # 4 layers of a stage keep 4 for each micro-batch; 1F1B keeps 4 micro-batches on stage 0.
    found = choose(EVEN, 4, 8, limit=16)
    assert max(found.peaks) <= 16
    assert found.schedule.name == "zb_v"
    assert (
        choose(EVEN, 4, 8, limit=16, names=("gpipe", "1f1b", "interleaved")).schedule.name == "1f1b"
    )
    with pytest.raises(ScheduleError, match=r"within 3 of memory; .* needs the least, "):
        choose(EVEN, 4, 8, limit=3)


def test_layers_move_to_later_stages_where_the_first_is_full() -> None:
    [even] = candidates(EVEN, 4, 8, names=("1f1b",))
    assert even.bounds == (0, 4, 8, 12, 16)
    [moved] = candidates(EVEN, 4, 8, names=("1f1b",), limit=12)
    assert max(moved.peaks) <= 12
    assert moved.bounds[1] == 3


def test_costly_messages_speak_against_many_chunks() -> None:
    names = ("1f1b", "interleaved")
    assert choose(EVEN, 4, 8, names=names).schedule.chunks == 16
    assert choose(EVEN, 4, 8, names=names, send=4).schedule.chunks < 16


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ScheduleError, match="2 layers cannot be cut for 3 stages"):
        choose(EVEN[:2], 3, 8)


# -- timelines ---------------------------------------------------------------------------------


def test_a_timeline_is_drawn_in_letters() -> None:
    timeline = simulate(schedule("1f1b", 2, 2), Costs.even(2))
    assert as_text(timeline, width=27) == [
        "stage 0   F0-F1-......B0----...B1----  bubble  33.3%",
        "stage 1   ...F0-B0----F1-B1----......  bubble  33.3%",
    ]


def test_a_picture_shows_every_instruction() -> None:
    timeline = simulate(schedule("zb_v", 2, 3), Costs.even(4))
    root = ET.fromstring(as_svg(timeline, "a < b"))
    titles = [t.text for t in root.iter("{http://www.w3.org/2000/svg}title")]
    assert titles[0] == "a < b"
    assert len(titles) == 1 + 2 * 18
    assert "I0.3: gradients of inputs, 4 to 5" in titles


def test_a_trace_has_predicted_and_measured_side_by_side() -> None:
    predicted = simulate(schedule("1f1b", 2, 1), Costs.even(2))
    measured = Timeline.measured([[("F0.0", 100.0, 100.5)], [("F0.1", 100.75, 101.0)]])
    events = json.loads(as_chrome_trace({"predicted": predicted, "measured": measured}))
    own = [e for e in events["traceEvents"] if e["ph"] == "X" and e["pid"] == 1]
    assert [(e["name"], e["tid"], e["ts"], e["dur"]) for e in own] == [
        ("F0.0", 0, 0.0, 0.5e6),
        ("F0.1", 1, 0.75e6, 0.25e6),
    ]
    names = [e["args"]["name"] for e in events["traceEvents"] if e["name"] == "process_name"]
    assert names == ["predicted", "measured"]


def test_a_recorder_gives_what_a_timeline_is_made_of() -> None:
    recorder = Recorder()
    one, other = Instruction("F", 0, 0), Instruction("B", 0, 0)
    recorder.begin(one)
    recorder.end(one)
    recorder.add(other, 5.0, 6.0)
    (text, begin, end), last = recorder.spans()
    assert text == "F0.0"
    assert begin <= end
    assert last == ("B0.0", 5.0, 6.0)
    assert Timeline.measured([recorder.spans()]).times()["B", 0] == 1.0
    recorder.begin(one)
    with pytest.raises(ValueError, match=r"B0.0 ends, but F0.0 began"):
        recorder.end(other)
    recorder.clear()
    assert recorder.spans() == []

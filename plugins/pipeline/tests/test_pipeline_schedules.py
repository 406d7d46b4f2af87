"""Schedules are legal for all sizes, with the bubbles and the memory that their papers state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from drivetrain_pipeline.schedules import (
    NAMES,
    Costs,
    Exchange,
    Instruction,
    Operation,
    Schedule,
    ScheduleError,
    check,
    forward_only,
    schedule,
    simulate,
    warnings_of,
)
from drivetrain_pipeline.schedules.validation import check_operations
from hypothesis import given, settings
from hypothesis import strategies as st

MORE_CHUNKS = st.sampled_from([2, 3, 5])


def published_peak(name: str, p: int, v: int) -> list[int]:
    """Chunks that each stage keeps, for as many micro-batches as fill the pipeline."""
    if name == "1f1b":  # Narayanan et al. 2021, 2.2.1: as many as stages from here to the last
        return [p - stage for stage in range(p)]
    if name == "interleaved":  # as Megatron-LM: warm-up forwards, and the one before its backward
        return [2 * (p - 1 - stage) + (v - 1) * p + 1 for stage in range(p)]
    # Qi et al. 2023, table 2: ZB-H1 at most p, as 1F1B. Qi et al. 2024: V-ZB p, in half stages.
    return [p if name == "zb_h1" else 2 * p] * p


@given(st.sampled_from(NAMES), st.integers(1, 7), st.integers(1, 17), MORE_CHUNKS)
@settings(max_examples=150, deadline=None)
def test_every_schedule_of_every_size_is_legal(name: str, p: int, m: int, more: int) -> None:
    made = schedule(name, p, m, more if name == "interleaved" else None)
    v = made.chunks // p
    bound = [m] * p if name == "gpipe" else published_peak(name, p, v)
    check(made, held=[min(most, m * v) for most in bound])
    check(forward_only(made, m))
    # Whoever waits for one message waits for no other, which may come later than was thought.
    exchanges = [o for s in range(p) for o in made.operations(s) if isinstance(o, Exchange)]
    assert all(len(one.sends) <= 1 and len(one.receives) <= 1 for one in exchanges)


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("p", [2, 4, 8])
def test_the_memory_of_held_activations_is_what_is_published(name: str, p: int) -> None:
    made = schedule(name, p, 3 * p)
    assert list(made.held()) == published_peak(name, p, made.chunks // p)


@pytest.mark.parametrize(("p", "m"), [(2, 2), (2, 8), (4, 4), (4, 16), (8, 8), (8, 64)])
def test_bubbles_are_those_of_theory(p: int, m: int) -> None:
    # With F = I = W = 1, a chunk of 1/v of a stage takes 1/v of the time.
    theory = {
        ("gpipe", 1): (p - 1) / (m + p - 1),
        ("1f1b", 1): (p - 1) / (m + p - 1),
        ("interleaved", 2): (p - 1) / (2 * m + p - 1),
        ("interleaved", 4): (p - 1) / (4 * m + p - 1),
        # (p - 1)(F + I - W), of m (F + I + W) in all: a third of 1F1B's.
        ("zb_h1", 1): (p - 1) / (3 * m + p - 1),
    }
    for (name, v), bubble in theory.items():
        found = simulate(schedule(name, p, m, v), Costs.even(p * v)).bubbles
        assert found == pytest.approx([bubble] * p, rel=0.01), name


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (4, 32), (8, 16), (8, 64)])
def test_the_v_shape_has_next_to_no_bubble(p: int, m: int) -> None:
    timeline = simulate(schedule("zb_v", p, m), Costs.even(2 * p))
    # By the definition of Qi et al., between the ends of a stage: one pass of 6 m.
    assert timeline.bubble_between <= 1 / (6 * m)
    # Between the ends of the step, the last stage waits for p - 1 forwards of half a stage.
    assert timeline.makespan == 6 * m + p - 1
    assert timeline.mean_bubble < (p - 1) / (m + p - 1) / 3


def test_instructions_are_text_and_read_from_it() -> None:
    made = schedule("zb_v", 2, 1)
    assert [" ".join(map(str, stream)) for stream in made.streams] == [
        "F0.0 F0.3 I0.3 W0.3 I0.0 W0.0",
        "F0.1 F0.2 I0.2 W0.2 I0.1 W0.1",
    ]
    for stream in made.streams:
        assert [Instruction.parse(str(i)) for i in stream] == list(stream)
    with pytest.raises(ValueError, match=r"written like F3.0"):
        Instruction.parse("X1.0")


def test_chunks_lie_round_the_stages_or_turn_at_the_last() -> None:
    assert schedule("interleaved", 2, 2, 3).placement == (0, 1, 0, 1, 0, 1)
    turned = schedule("zb_v", 3, 1)
    assert turned.placement == (0, 1, 2, 2, 1, 0)
    assert turned.chunks_of(1) == (1, 4)


def test_one_forward_one_backward_is_the_one_of_the_paper() -> None:
    # Narayanan et al. 2021, figure 4 (top), its first device and its last.
    first, *_, last = schedule("1f1b", 4, 8).streams
    assert " ".join(f"{i.kind}{i.micro_batch + 1}" for i in first) == (
        "F1 F2 F3 F4 B1 F5 B2 F6 B3 F7 B4 F8 B5 B6 B7 B8"
    )
    assert " ".join(f"{i.kind}{i.micro_batch + 1}" for i in last) == (
        "F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7 F8 B8"
    )


def test_messages_go_between_instructions_and_not_inside_a_stage() -> None:
    made = schedule("zb_v", 2, 1)
    assert " | ".join(map(str, made.operations(1))) == (
        "<F0.0:0>1 | F0.1 | F0.2 | >F0.2:1>0 | <B0.3:0>1 | I0.2 | W0.2 | I0.1 | >B0.1:1>0 | W0.1"
    )
    assert made.received_by(Instruction("F", 0, 2)) is None  # from chunk 1, of the same stage
    assert made.sent_by(Instruction("F", 0, 3)) is None  # the loss


# -- what is wrong is found --------------------------------------------------------------------


def changed(made: Schedule, stage: int, *order: str) -> Schedule:
    streams = list(made.streams)
    streams[stage] = tuple(map(Instruction.parse, order))
    return replace(made, streams=tuple(streams))


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("F0.0 B0.0 F1.0", "stage 0 has B1.0 0 times instead of 1"),
        ("F0.0 F0.0 B0.0 F1.0 B1.0", "stage 0 has F0.0 2 times instead of 1"),
        ("F0.0 F1.0 B0.0 B1.0 F2.0", "stage 0 has F2.0 1 times instead of 0"),
        ("B0.0 F0.0 F1.0 B1.0", "stage 0 waits at B0.0 for F0.0"),
        # The last stage runs backward 0 only after forward 1, which comes after that backward.
        ("F0.0 B0.0 F1.0 B1.0", "stage 0 waits at B0.0 for B0.1; stage 1 waits at F1.1 for F1.0"),
    ],
)
def test_streams_that_cannot_be_run_are_named(order: str, reason: str) -> None:
    with pytest.raises(ScheduleError, match=reason):
        check(changed(schedule("gpipe", 2, 2), 0, *order.split()))


def test_more_memory_than_allowed_is_named() -> None:
    with pytest.raises(ScheduleError, match=r"stage 0 keeps activations of 4 chunks"):
        check(schedule("1f1b", 4, 8), held=(3, 3, 2, 1))


def apart(operations: Sequence[Operation], receive_first: bool) -> list[Operation]:
    """Exchanges that send and receive, as two."""
    found: list[Operation] = []
    for one in operations:
        if isinstance(one, Exchange) and one.sends and one.receives:
            both = [Exchange((), one.receives), Exchange(one.sends, ())]
            found += both if receive_first else reversed(both)
        else:
            found.append(one)
    return found


def test_exchanges_that_never_meet_are_named() -> None:
    made = schedule("1f1b", 2, 4)
    first, last = (made.operations(stage) for stage in range(2))
    check_operations(made, [apart(first, receive_first=True), apart(last, receive_first=False)])
    with pytest.raises(ScheduleError, match=r"stage 0 waits in .*stage 1 waits in .*none can"):
        check_operations(made, [apart(first, receive_first=True), apart(last, receive_first=True)])


def test_a_message_that_is_lost_or_early_is_named() -> None:
    made = schedule("1f1b", 2, 1)
    first, last = (list(made.operations(stage)) for stage in range(2))
    with pytest.raises(ScheduleError, match=r"stage 0 never sends F0.0:0>1"):
        check_operations(made, [[o for o in first if not str(o).startswith(">")], last])
    with pytest.raises(ScheduleError, match=r"stage 0 sends F0.0:0>1, which it has not"):
        check_operations(made, [[first[1], first[0], *first[2:]], last])
    with pytest.raises(ScheduleError, match=r"runs F0.1 before it receives F0.0:0>1"):
        check_operations(made, [first, [last[1], last[0], *last[2:]]])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("2f2b", 2, 2), "no schedule is named '2f2b'; there are gpipe, 1f1b"),
        (("1f1b", 0, 2), "of 0 stages: it needs at least 1"),
        (("1f1b", 2, 0), "of 0 micro-batches: it needs at least 1"),
        (("1f1b", 2, 2, 2), "'1f1b' with 2 chunks on a stage: it needs 1"),
        (("interleaved", 2, 2, 1), "with 1 chunks on a stage: it needs at least 2"),
        (("zb_v", 2, 2, 3), "with 3 chunks on a stage: it needs 2"),
    ],
)
def test_schedules_that_cannot_be_are_refused(arguments, reason: str) -> None:
    with pytest.raises(ScheduleError, match=reason):
        schedule(*arguments)


def test_too_few_micro_batches_are_told_with_the_bubble() -> None:
    assert warnings_of(schedule("1f1b", 4, 4)) == []
    [few] = warnings_of(schedule("1f1b", 4, 2))
    assert "2 micro-batches for 4 stages leave stages idle for 60% of a step" in few
    assert "use at least 4 (gradient_accumulation_steps)" in few
    assert warnings_of(schedule("interleaved", 4, 8)) == []
    assert "use a multiple of 4" in warnings_of(schedule("interleaved", 4, 6))[0]

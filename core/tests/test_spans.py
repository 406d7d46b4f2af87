from __future__ import annotations

import threading

import pytest

from drivetrain.job import spans
from drivetrain.job.spans import Ledger


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when told to."""
    now = [0.0]
    monkeypatch.setattr(spans, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_exclusive_time_leaves_out_what_is_nested(clock):
    ledger = Ledger()
    with ledger.span("step"):
        clock(1)
        with ledger.span("wait"):
            clock(2)
        with ledger.span("update"):
            clock(4)
            with ledger.span("wait"):
                clock(8)
    times = ledger.times()
    assert {name: time.exclusive for name, time in times.items()} == {
        "step": 1,
        "update": 4,
        "wait": 10,
    }
    assert {name: time.inclusive for name, time in times.items()} == {
        "step": 15,
        "update": 12,
        "wait": 10,
    }
    assert times["wait"].count == 2


def test_a_name_nested_in_itself_is_included_once(clock):
    ledger = Ledger()
    with ledger.span("a"):
        clock(1)
        with ledger.span("a"):
            clock(2)
    assert ledger.times()["a"].inclusive == 3
    assert ledger.times()["a"].exclusive == 3


def test_take_starts_anew_and_open_spans_count_when_they_end(clock):
    ledger = Ledger()
    with ledger.span("open"):
        clock(1)
        with ledger.span("done"):
            clock(2)
        assert ledger.take() == {"done": 2}
        assert ledger.take() == {}
    assert ledger.take() == {"open": 1}


def test_an_exception_ends_a_span(clock):
    ledger = Ledger()
    with pytest.raises(ValueError), ledger.span("a"):  # noqa: PT012
        clock(1)
        raise ValueError
    with ledger.span("b"):
        clock(1)
    assert ledger.take() == {"a": 1, "b": 1}


def test_threads_nest_on_their_own():
    ledger = Ledger()
    inside, leave = threading.Event(), threading.Event()

    def other():
        with ledger.span("other"):
            inside.set()
            leave.wait(10)

    with ledger.span("main"):
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait(10)
    leave.set()
    thread.join()
    times = ledger.times()
    # Nested in "main", the other thread's span would be taken off its exclusive time.
    assert times["main"].exclusive == times["main"].inclusive
    assert times["other"].exclusive == times["other"].inclusive


def test_counts_from_many_threads_are_all_there():
    ledger = Ledger()

    def work():
        for _ in range(1000):
            with ledger.span("a"):
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.times()["a"].count == 4000

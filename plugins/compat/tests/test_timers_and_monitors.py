"""Timers and monitors that scripts use without an engine, and DeepSpeed's smaller commands."""

from __future__ import annotations

import logging
import math

import pytest
from click.testing import CliRunner
from deepspeed._commands import older
from deepspeed._parts import timers
from deepspeed.utils.timer import NoopTimer, SynchronizedWallClockTimer, ThroughputTimer

from drivetrain.errors import TrainingError

ONE = ["--queue-depth", "32", "--threads", "1"]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [100.0]
    monkeypatch.setattr(timers, "_now", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_a_mean_may_leave_out_the_smallest_and_the_largest():
    data = [9.0, 1.0, 2.0, 3.0, 100.0]
    assert timers.trim_mean(data, 0.2) == pytest.approx(14 / 3)
    assert data == [9.0, 1.0, 2.0, 3.0, 100.0]
    assert timers.trim_mean([], 0.1) == 0.0
    with pytest.raises(ValueError, match=r"trim_percent is 0\.5"):
        timers.trim_mean(data, 0.5)


def test_a_timer_adds_up_what_it_measures(clock, caplog):
    measured = SynchronizedWallClockTimer()
    for seconds in (1.0, 3.0):
        measured("step").start()
        clock(seconds)
        measured("step").stop()
        clock(10.0)
    assert measured.get_mean(["step", "other"], reset=False) == {"step": 2000.0}
    assert measured("step").elapsed(reset=False) == 4000.0
    with caplog.at_level(logging.INFO, "deepspeed"):
        measured.log(["step", "other"], normalizer=2.0, memory_breakdown=True)
    assert "time (ms) | step: 2000.00 | memory allocated" in caplog.text
    assert measured("step").elapsed() == 0.0
    measured("step").start()
    clock(1.0)
    assert measured("step").elapsed() == 1000.0
    clock(0.5)
    measured("step").stop()
    assert measured("step").mean() == 500.0
    assert (measured.has_timer("step"), measured.has_timer("other")) == (True, False)


def test_a_timer_says_what_it_was_not_told():
    timer = SynchronizedWallClockTimer()("step")
    with pytest.raises(TrainingError, match="timer 'step' does not run; start it first"):
        timer.stop()
    timer.start()
    with pytest.raises(TrainingError, match="timer 'step' runs already; stop it first"):
        timer.start()
    with pytest.raises(ValueError, match="normalizer must be positive"):
        SynchronizedWallClockTimer().log([], normalizer=0.0)


def test_timers_that_measure_nothing():
    timer = NoopTimer()
    timer("step").start()
    timer("step").stop(record=True)
    timer.log(["step"])
    assert timer("step").elapsed(reset=False) == timer("step").mean() == 0.0
    assert timer.get_mean(["step"]) == timer.get_timers() == {}


def test_samples_per_second_leave_out_the_first_steps(clock):
    lines = []
    measured = ThroughputTimer(None, 8, start_step=1, steps_per_output=2, logging_fn=lines.append)
    measured.stop()
    assert not measured.initialized
    for seconds in (100.0, 1.0, 3.0):
        for last in (False, True):
            measured.start()
            clock(seconds)
            measured.stop(global_step=last)
        if seconds == 100.0:
            assert measured.avg_samples_per_sec() == -math.inf
    assert measured.avg_samples_per_sec() == pytest.approx(2.0)
    assert (measured.global_step_count, measured.micro_step_count) == (3, 6)
    assert measured.initialized
    assert measured.end_time - measured.start_time == 3.0
    assert lines == [
        "epoch 0, step 2: 4.0000 samples per second on average, 4.0000 now",
    ]


@pytest.fixture
def called(monkeypatch):
    """What the smaller commands hand on."""
    calls = []
    monkeypatch.setattr(older.drivetrain, "main", lambda args, prog_name: calls.append(args))
    return calls


@pytest.mark.parametrize(
    ("command", "given", "handed"),
    [
        (older.elastic, ["-c", "c.json"], ["elastic", "c.json"]),
        (older.elastic, ["-c", "c.json", "-w", "4"], ["elastic", "c.json", "--world-size", "4"]),
        (
            older.comm,
            ["--scan", "--maxsize", "20", "--pt2pt", "--dtype", "half", "--num_gpus", "2"],
            [
                *("bench", "comm", "--dtype", "fp16", "--largest", "1048576"),
                *("--op", "send_receive", "--ranks", "2"),
            ],
        ),
        (older.nvme_tune, ["--nvme_dir", "d"], ["bench", "io", "d", "--size", "400"]),
        (
            older.io,
            ["--folder", "d", "--io_size", "1G", "--block_size", "512K", "--read"],
            [
                *[
                    "bench",
                    "io",
                    "d",
                    "--size",
                    "1024",
                    "--block-size",
                    "512",
                    "--queue-depth",
                    "32",
                    "--threads",
                    "1",
                ]
            ],
        ),
    ],
)
def test_smaller_commands_hand_on_their_options(command, given, handed, called):
    done = CliRunner().invoke(command, given)
    assert done.exit_code == 0, done.output
    assert called == [handed]


def test_hosts_run_a_command(called, tmp_path):
    hosts = tmp_path / "hosts"
    done = CliRunner().invoke(older.ssh, ["-f", str(hosts), "ls", "-l"])
    assert f"no hostfile {hosts}; -f names one" in done.output
    hosts.write_text("one slots=1\n")
    assert CliRunner().invoke(older.ssh, ["-f", str(hosts), "ls", "-l"]).exit_code == 0
    assert called == [["ssh", "--hostfile", str(hosts), "--", "ls", "-l"]]


def test_a_size_that_is_none_is_refused(called):
    done = CliRunner().invoke(older.nvme_tune, ["--nvme_dir", "d", "--io_size", "many"])
    assert "'many' is no number of bytes such as 400M" in done.output
    assert called == []

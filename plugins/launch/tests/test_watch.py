"""Commands that start hosts: what is shown of them, and how all end when one has failed."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from drivetrain_launch import watch
from drivetrain_launch.watch import FAILURE, Start, failure_in, run_all


def python(who: str, code: str, first_line: str | None = None) -> Start:
    return Start(who, [sys.executable, "-c", code], first_line)


def failure(host: str, time_ns: int, *, follows: bool, text: str = "boom") -> str:
    content = {"host": host, "time_ns": time_ns, "follows": follows, "text": text}
    return json.dumps({FAILURE: content})


def test_what_hosts_say_is_shown_with_their_names_and_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    starts = [python("a", "print('from a')"), python("b", "print('from b')")]
    outcome = run_all(starts, tmp_path, grace=1)
    assert sorted(capfd.readouterr().out.splitlines()) == ["[a] from a", "[b] from b"]
    assert (tmp_path / "a.log").read_text() == "from a\n"
    assert outcome.codes == {"a": 0, "b": 0}
    assert outcome.failures == []


def test_one_host_s_words_are_shown_as_they_are(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_all([python("a", "print('x')")], tmp_path, grace=1)
    assert capfd.readouterr().out == "x\n"


def test_the_first_cause_comes_first_and_its_line_is_not_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; sys.stderr.write({!r} + '\\n'); sys.exit(1)"
    starts = [
        python("a", code.format(failure("a", 1, follows=True))),
        python("b", code.format(failure("b", 3, follows=False))),
        python("c", code.format("c: " + failure("c", 2, follows=False))),  # as pdsh shows it
    ]
    outcome = run_all(starts, tmp_path, grace=1)
    assert [each.host for each in outcome.failures] == ["c", "b", "a"]
    assert FAILURE not in capfd.readouterr().err


def test_a_command_that_fails_without_a_word_leaves_its_last_lines(tmp_path: Path) -> None:
    code = "import sys\nfor n in range(20): print(n, file=sys.stderr)\nsys.exit(3)"
    outcome = run_all([python("a", code)], tmp_path, grace=1)
    assert outcome.codes == {"a": 3}
    assert outcome.silent == {"a": [str(n) for n in range(8, 20)]}


def test_the_others_are_asked_to_end_when_one_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_SETTLE_SECONDS", 0.2)
    reads = "import sys; sys.stdin.readline(); sys.stdin.read(); print('asked')"
    starts = [python("a", "raise SystemExit(1)"), python("b", reads, first_line="go")]
    began = time.monotonic()
    assert run_all(starts, tmp_path, grace=60).codes == {"a": 1, "b": 0}
    assert (tmp_path / "b.log").read_text() == "asked\n"
    assert time.monotonic() - began < 30


def test_who_does_not_end_is_killed_with_all_that_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_SETTLE_SECONDS", 0.0)
    stubborn = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    wait = "import time; time.sleep(1); raise SystemExit(1)"
    outcome = run_all([python("a", wait), python("b", stubborn)], tmp_path, grace=0.2)
    assert outcome.codes["b"] == -signal.SIGKILL
    child = int((tmp_path / "b.log").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("what the killed command had started goes on")


def test_a_signal_asks_all_to_end_and_is_told(tmp_path: Path) -> None:
    reads = "import sys; sys.stdin.readline(); print('up', flush=True); sys.stdin.read()"

    def interrupt() -> None:
        while not (tmp_path / "a.log").exists() or not (tmp_path / "a.log").read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    outcome = run_all([python("a", reads, first_line="go")], tmp_path, grace=30)
    thread.join()
    assert (outcome.signal, outcome.codes) == (signal.SIGTERM, {"a": 0})


@pytest.mark.parametrize("line", ["", "x", f'{{"{FAILURE}"', f'{{"{FAILURE}": {{"host": "a"}}}}'])
def test_lines_that_tell_of_no_failure_are_left_alone(line: str) -> None:
    assert failure_in(line) is None

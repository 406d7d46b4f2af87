"""``drivetrain run``: real ranks of tiny scripts, their logs, their failures and their end."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner
from drivetrain_cli.failures import explain_failure

from drivetrain.cli import main

COMMAND = [sys.executable, "-m", "drivetrain.cli", "run", "--log-dir", "logs"]

SLEEPER = """
import os, pathlib, sys, time
rank = os.environ["RANK"]
aside = pathlib.Path(f"pid{rank}.part")
aside.write_text(str(os.getpid()))
try:
    aside.rename(f"pid{rank}")  # a signal may come from here on
    time.sleep(600)
except KeyboardInterrupt:
    if "tidy" in sys.argv:
        time.sleep(0.5)
        pathlib.Path(f"saved{rank}").touch()
        sys.exit(0)
    raise
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        (tmp_path / "train.py").write_text(text)
        return "train.py"

    return write


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )

    return start


def refuse(*arguments: str) -> str:
    """What is said about a run that cannot start; the process that says it is this one."""
    result = CliRunner().invoke(main, ["run", *arguments])
    assert result.exit_code == 2
    assert result.stdout == ""
    return result.stderr


# -- what runs ---------------------------------------------------------------------------------


def test_every_rank_runs_the_script_as_main_with_its_arguments(script, run, tmp_path) -> None:
    source = (
        "import os, sys\n"
        "print(__name__, __file__, sys.argv[1:], os.environ['RANK'], os.environ['WORLD_SIZE'])\n"
    )
    done = run("--nproc", "3", script(source), "--lr", "1e-3", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "__main__ train.py ['--lr', '1e-3', '--help'] 0 3\n"
    for rank in range(3):
        text = (tmp_path / "logs" / f"rank{rank}.log").read_text()
        assert text == f"__main__ train.py ['--lr', '1e-3', '--help'] {rank} 3\n"


def test_more_ranks_than_cores_get_a_warning(script, run) -> None:
    cores = len(os.sched_getaffinity(0))
    done = run("--nproc", str(cores + 1), script("pass"))
    assert done.returncode == 0
    assert f"{cores + 1} ranks share {cores} cores" in done.stderr


def test_output_and_errors_of_the_first_rank_stay_apart(script, run, tmp_path) -> None:
    done = run("--nproc", "1", script("import sys\nprint('out')\nprint('err', file=sys.stderr)"))
    assert (done.stdout, done.stderr) == ("out\n", "err\n")
    assert sorted((tmp_path / "logs" / "rank0.log").read_text().split()) == ["err", "out"]


def test_a_line_of_the_log_is_never_broken_by_the_other_stream(script, tmp_path) -> None:
    source = """
import pathlib, sys, time
def wait_for(name):
    while not pathlib.Path(name).exists():
        time.sleep(0.01)
print("beg", end="", flush=True)
wait_for("begun")
print("error", file=sys.stderr, flush=True)
wait_for("told")
print("in")
print("no newline at the end", end="")
"""
    command, pipe = [*COMMAND, "--nproc", "1", script(source)], subprocess.PIPE
    launcher = subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe)
    assert launcher.stdout is not None
    assert launcher.stderr is not None
    try:
        assert launcher.stdout.read(3) == b"beg"  # what is shown has been kept before
        (tmp_path / "begun").touch()
        assert launcher.stderr.readline() == b"error\n"
        (tmp_path / "told").touch()
        launcher.communicate(timeout=300)
    finally:
        launcher.kill()
        launcher.communicate()
    assert (tmp_path / "logs" / "rank0.log").read_text().splitlines() == [
        "error",
        "begin",
        "no newline at the end",
    ]


def test_a_script_imports_what_lies_beside_it(script, run, tmp_path) -> None:
    (tmp_path / "beside.py").write_text("VALUE = 7")
    done = run("--nproc", "1", script("import beside\nprint(beside.VALUE)"))
    assert done.stdout == "7\n"


def test_a_module_is_run_by_name(run, tmp_path) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__main__.py").write_text("import sys\nprint(__name__, sys.argv[1:])")
    done = run("--nproc", "1", "--module", "trainer", "-x")
    assert done.stdout == "__main__ ['-x']\n"


def test_ranks_find_each_other_at_a_given_port(script, run) -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    source = (
        "import os\nimport torch.distributed as dist\ndist.init_process_group('gloo')\n"
        "import torch\nt = torch.tensor([dist.get_rank() + 1.0])\ndist.all_reduce(t)\n"
        "print(t.item(), os.environ['MASTER_PORT'])\ndist.destroy_process_group()\n"
    )
    done = run("--nproc", "2", "--master-port", str(port), script(source))
    assert done.stdout == f"3.0 {port}\n", done.stderr


def test_cores_are_shared_out_unless_the_user_did_so(script, tmp_path) -> None:
    source = script("import os\nprint(os.environ['OMP_NUM_THREADS'])")
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    shown = []
    for number, extra in enumerate(({}, {"OMP_NUM_THREADS": "5"})):
        command = [*COMMAND[:-1], f"logs{number}", "--nproc", "1", source]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment | extra, capture_output=True, text=True
        )
        shown.append(done.stdout.strip())
    assert shown == [str(len(os.sched_getaffinity(0))), "5"]


# -- what fails --------------------------------------------------------------------------------


def test_the_failure_that_came_first_is_shown_and_not_what_it_brought_about(
    script, run, tmp_path
) -> None:
    source = """
import os, pathlib, time
if os.environ["RANK"] == "1":
    print("about to fail")
    raise ValueError("no such token: 70000")
while not pathlib.Path("logs/rank1.error.json").exists():
    time.sleep(0.001)
raise RuntimeError("connection closed by peer")
"""
    done = run("--nproc", "2", script(source))
    assert done.returncode == 2
    message = done.stderr[done.stderr.index("error: ") :]
    assert message.startswith("error: rank 1 failed: ValueError: no such token: 70000\n")
    assert "raised at train.py:5\n" in message
    assert "| about to fail\n" in message
    assert "connection closed" not in message
    assert message.rstrip().endswith(f"logs of all 2 ranks: {tmp_path / 'logs'}")
    assert "runpy" not in done.stderr
    assert "elastic" not in done.stderr.lower()


def test_a_failure_of_all_ranks_is_shown_once(script, run) -> None:
    source = (
        "from drivetrain.errors import ConfigError\n"
        "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n"
        "    raise ConfigError('train_batch_size: expected a number') from error\n"
    )
    done = run("--nproc", "2", script(source))
    message = done.stderr[done.stderr.index("error: ") :]
    assert len(re.findall(r"rank \d failed", message)) == 1
    assert "ConfigError: train_batch_size: expected a number" in message
    assert done.stderr.count("expected a number") == 1
    assert "Traceback" not in done.stderr


def test_ranks_that_failed_in_the_same_way_are_named_once(tmp_path) -> None:
    for rank, when, message in ((0, 30, "odd"), (1, 10, "odd"), (2, 20, "even")):
        record = {"rank": rank, "local_rank": rank, "time_ns": when, "message": message}
        text = json.dumps({**record, "where": "a.py:1"})
        (tmp_path / f"rank{rank}.error.json").write_text(text)
    assert explain_failure(tmp_path, 3).text.splitlines() == [
        "rank 1 failed (and in the same way rank 0): odd",
        "  raised at a.py:1",
        f"logs of all 3 ranks: {tmp_path}",
    ]


def test_the_traceback_of_an_error_without_one_on_screen_is_on_disk(script, run, tmp_path) -> None:
    source = (
        "from drivetrain.errors import ConfigError\ndef f():\n    raise ConfigError('odd')\nf()"
    )
    run("--nproc", "1", script(source))
    record = json.loads((tmp_path / "logs" / "rank0.error.json").read_text())
    assert "in f\n" in record["traceback"]
    assert record["message"] == "ConfigError: odd"


def test_a_program_that_starts_machines_gets_the_failure_as_one_line(script, run) -> None:
    done = run("--nproc", "1", "--failure-format", "json", script("raise ValueError('no')"))
    assert done.returncode == 2
    told = json.loads(done.stderr.splitlines()[-1])["drivetrain_failure"]
    assert told["text"].startswith("rank 0 failed: ValueError: no")
    assert "error: " not in done.stderr


def test_an_exit_code_is_a_failure(script, run) -> None:
    done = run("--nproc", "1", script("import sys\nsys.exit('no data in ./text')"))
    assert done.returncode == 2
    assert "rank 0 failed: the script exited with 'no data in ./text'" in done.stderr


def test_a_killed_rank_is_named_with_its_signal(script, run, tmp_path) -> None:
    source = """
import os, signal, time
if os.environ["RANK"] == "1":
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""
    done = run("--nproc", "2", script(source))
    assert (
        "error: rank 1 was killed by SIGKILL; often this means that memory ran out" in done.stderr
    )
    assert "| last words" in done.stderr
    assert done.stderr.startswith("error: ")  # what torchrun says meanwhile is in a file
    assert "closing signal SIGTERM" in (tmp_path / "logs" / "agent.log").read_text()


def test_a_rank_killed_while_others_wait_is_named_and_not_how_they_broke(script, run) -> None:
    source = """
import os, signal
from drivetrain.contracts import Purpose, Tag
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan

with Job.open(Plan.build({}, world_size=2, batch_required=False)) as job:
    job.communicator.barrier("world", Tag(Purpose.CONTROL))
    if job.rank == 1:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    job.communicator.barrier("world", Tag(Purpose.CONTROL))
"""
    done = run("--nproc", "2", script(source))
    assert done.stderr.startswith("error: rank 1 was killed by SIGKILL; often this means that")
    assert "| last words" in done.stderr


def test_what_a_rank_raised_goes_before_how_others_broke_even_if_it_was_written_later(
    tmp_path,
) -> None:
    errors = [
        {"rank": 0, "time_ns": 1, "message": "CommunicationError: broken", "follows": True},
        {"rank": 1, "time_ns": 2, "message": "ValueError: no more data", "follows": False},
    ]
    for error in errors:
        content = {**error, "local_rank": error["rank"], "where": None, "says_all": True}
        (tmp_path / f"rank{error['rank']}.error.json").write_text(json.dumps(content))
    assert explain_failure(tmp_path, 2).text.startswith("rank 1 failed: ValueError: no more data")


def test_a_rank_that_said_nothing_goes_before_those_that_only_broke(tmp_path) -> None:
    broke = {"rank": 0, "local_rank": 0, "time_ns": 1, "message": "CommunicationError: broken"}
    content = {**broke, "follows": True, "where": None, "says_all": True}
    (tmp_path / "rank0.error.json").write_text(json.dumps(content))
    ended = {"0": {"exit_code": 1, "local_rank": 0}, "1": {"exit_code": -9, "local_rank": 1}}
    (tmp_path / "failures.json").write_text(json.dumps(ended))
    explained = explain_failure(tmp_path, 2)
    assert explained.text.startswith("rank 1 was killed by SIGKILL")
    assert not explained.follows


def test_a_failure_that_another_machine_has_brought_about_says_so(tmp_path, monkeypatch) -> None:
    broke = {"rank": 0, "local_rank": 0, "time_ns": 5, "message": "CommunicationError: broken"}
    content = {**broke, "follows": True, "where": None, "says_all": True}
    (tmp_path / "rank0.error.json").write_text(json.dumps(content))
    monkeypatch.setenv("DRIVETRAIN_HOST", "worker-1")
    told = json.loads(explain_failure(tmp_path, 1).json())["drivetrain_failure"]
    assert (told["host"], told["time_ns"], told["follows"]) == ("worker-1", 5, True)
    assert told["text"].startswith("rank 0 failed: CommunicationError: broken")


def test_a_missing_script_is_one_message(tmp_path) -> None:
    assert "script 'nothing.py' does not exist (looked in " in refuse("nothing.py")


def test_a_folder_is_no_script(tmp_path) -> None:
    assert f"script {str(tmp_path)!r} is a folder" in refuse(str(tmp_path))


def test_a_syntax_error_is_found_before_any_rank_starts(tmp_path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("x = 1\n    \ndef f(:\n    pass\n")
    message = refuse("--nproc", "2", str(file))
    assert message == (
        f"error: {file}, line 3: syntax error: invalid syntax\n    def f(:\n          ^\n"
    )


def test_a_file_that_is_no_python_is_one_message(tmp_path) -> None:
    file = tmp_path / "data.py"
    file.write_bytes(b"a\0b")
    assert "null bytes" in refuse(str(file))


def test_a_missing_module_is_one_message() -> None:
    assert "module 'no_such_module' does not exist" in refuse("-m", "no_such_module")


def test_a_port_in_use_is_one_message(tmp_path) -> None:
    file = tmp_path / "train.py"
    file.touch()
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = str(server.getsockname()[1])
        message = refuse("--nproc", "2", "--master-port", port, str(file))
    assert message.startswith(f"error: port {port} cannot be used (Address already in use); give")


@pytest.mark.parametrize("nproc", ["0", "-1", "two"])
def test_a_number_of_ranks_is_positive(nproc: str, tmp_path) -> None:
    file = tmp_path / "train.py"
    file.touch()
    message = refuse(f"--nproc={nproc}", str(file))
    assert f"--nproc takes a positive number or auto, got {nproc!r}" in message


def test_several_machines_need_a_place_to_meet(tmp_path) -> None:
    assert "2 machines need a place to meet" in refuse("--nnodes", "2", "train.py")


def test_a_run_folder_that_cannot_be_made_is_one_message(tmp_path) -> None:
    (tmp_path / "train.py").touch()
    (tmp_path / "file").touch()
    log_dir = str(tmp_path / "file" / "logs")
    message = refuse("--nproc", "1", "--log-dir", log_dir, str(tmp_path / "train.py"))
    assert message == (
        f"error: run folder {log_dir} cannot be written: Not a directory; choose another with "
        "--log-dir\n"
    )


def test_logs_of_another_run_are_not_overwritten(tmp_path) -> None:
    (tmp_path / "train.py").touch()
    (tmp_path / "rank0.log").write_text("precious")
    message = refuse("--nproc", "1", "--log-dir", str(tmp_path), str(tmp_path / "train.py"))
    assert "holds the logs of another run" in message
    assert (tmp_path / "rank0.log").read_text() == "precious"


# -- how it ends -------------------------------------------------------------------------------


@pytest.fixture
def sleeping(script, tmp_path):
    """Start two ranks that sleep; answers the launcher and the ranks' process ids."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> tuple[subprocess.Popen[str], list[int]]:
        command = [*COMMAND, "--nproc", "2", script(SLEEPER), *arguments]
        launcher = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        started.append(launcher)
        return launcher, process_ids(tmp_path)

    yield start
    for launcher in started:
        launcher.kill()
        launcher.communicate()


def process_ids(folder: Path) -> list[int]:
    files = [folder / f"pid{rank}" for rank in range(2)]
    assert wait_for(lambda: all(file.exists() for file in files), 300)
    return [int(file.read_text()) for file in files]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_ranks(sleeping, number) -> None:
    launcher, ranks = sleeping()
    launcher.send_signal(number)
    _, errors = launcher.communicate(timeout=300)
    assert launcher.returncode == 128 + number
    assert f"interrupted by {number.name}; the logs are in " in errors
    assert "Traceback" not in errors
    assert all_ended(ranks)


def test_an_interrupted_script_may_save_before_it_ends(sleeping, tmp_path) -> None:
    launcher, ranks = sleeping("tidy")
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=300)
    assert launcher.returncode == 128 + signal.SIGINT
    assert all_ended(ranks)
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "saved1").exists()


def test_no_rank_outlives_a_killed_launcher(sleeping) -> None:
    launcher, ranks = sleeping()
    launcher.kill()
    assert all_ended(ranks)


def test_on_a_terminal_the_script_sees_one_and_control_c_ends_all_ranks(script, tmp_path) -> None:
    source = script("import sys\nprint('tty', sys.stdout.isatty(), sys.stderr.isatty())" + SLEEPER)
    launcher, terminal = pty.fork()
    if launcher == 0:
        os.chdir(tmp_path)
        os.execv(sys.executable, [*COMMAND, "--nproc", "2", source, "tidy"])
    ranks = process_ids(tmp_path)
    os.write(terminal, b"\x03")
    shown = read_all(terminal)
    _, status = os.waitpid(launcher, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGINT
    assert b"tty True True\r\n" in shown
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "saved1").exists()
    assert all_ended(ranks)
    assert "tty True True\n" in (tmp_path / "logs" / "rank0.log").read_text()


def read_all(descriptor: int) -> bytes:
    found = b""
    try:
        while data := os.read(descriptor, 4096):
            found += data
    except OSError:  # how a pseudo-terminal says that nobody writes any more
        pass
    os.close(descriptor)
    return found


def all_ended(pids: Sequence[int]) -> bool:
    return all(wait_for(lambda pid=pid: not alive(pid), 60) for pid in pids)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True

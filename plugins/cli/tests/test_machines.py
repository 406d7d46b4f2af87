"""``drivetrain run`` on several machines, and its end when ranks do not want to end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from drivetrain_cli.nodes import Nodes
from torch.distributed import TCPStore

from drivetrain.cli import main

RUN = [sys.executable, "-m", "drivetrain.cli", "run", "--nproc", "1"]

# A rank that ignores signals, one that is stopped, and children of both, one in a session of its
# own and one whose parent has gone.
STUBBORN = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
nested = f"import subprocess; print(subprocess.Popen({sleep}, stdout=-3).pid)"
children = [
    subprocess.Popen(sleep, start_new_session=True).pid,
    int(subprocess.check_output([sys.executable, "-c", nested])),
]
rank = os.environ["RANK"]
aside = pathlib.Path(f"pids{rank}.part")
aside.write_text(" ".join(map(str, [os.getpid(), *children])))
aside.rename(f"pids{rank}")
if rank == "1":
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(600)
"""


def refuse(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["run", "--nproc", "1", *arguments, __file__])
    assert result.exit_code == 2
    assert result.stdout == ""
    return result.stderr


def nodes(**changes: object) -> Nodes:
    values: dict[str, object] = {
        "count": "2",
        "rank": 0,
        "master_addr": "127.0.0.1",
        "master_port": None,
        "rdzv_endpoint": None,
        "rdzv_id": "job",
        "max_restarts": 0,
    }
    return Nodes(**{**values, **changes})  # type: ignore[arg-type]


MASTER = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--nnodes", "two"], "--nnodes takes a positive number or MIN:MAX, got 'two'"),
        (["--nnodes", "0"], "--nnodes takes a positive number or MIN:MAX, got '0'"),
        (["--nnodes", "3:2"], "--nnodes takes a positive number or MIN:MAX, got '3:2'"),
        (["--node-rank", "1"], "--node-rank counts machines from 0 to 0 (--nnodes 1), got 1"),
        ([*MASTER, "29500", "--node-rank", "2"], "machines from 0 to 1 (--nnodes 2), got 2"),
        ([*MASTER, "29500", "--node-rank", "-1"], "machines from 0 to 1 (--nnodes 2), got -1"),
        ([*MASTER, "0"], "--master-port must be between 1 and 65535, got 0"),
        ([*MASTER, "65536"], "--master-port must be between 1 and 65535, got 65536"),
        (["--max-restarts", "-1"], "--max-restarts cannot be negative, got -1"),
        (
            ["--nnodes", "2", "--rdzv-endpoint", "no-such-host.invalid:29500"],
            "knows no way to 'no-such-host.invalid': its name does not resolve",
        ),
        (
            ["--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:port"],
            "--rdzv-endpoint takes HOST:PORT with a port between 1 and 65535, got '127.0.0.1:port'",
        ),
        (["--nnodes", "2", "--rdzv-endpoint", "[::1]:70000"], "got '[::1]:70000'"),
        (
            ["--nnodes", "2", "--master-addr", "no-such-host.invalid", "--master-port", "29500"],
            "--master-addr: ",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_once(arguments: list[str], expected: str) -> None:
    message = refuse(*arguments)
    assert expected in message
    assert len(message.strip().splitlines()) <= 2


def test_the_first_machine_is_that_of_the_master_address(monkeypatch) -> None:
    monkeypatch.setattr("drivetrain_cli.nodes.is_own", lambda address: False)
    message = refuse(*MASTER, "29500")
    assert (
        "--node-rank 0 runs on the machine of --master-addr, but 127.0.0.1 (127.0.0.1)" in message
    )


def hang_up(server: socket.socket) -> None:
    """Answer connections as a program does that speaks another protocol."""
    while True:
        try:
            connection, _ = server.accept()
        except OSError:  # closed: the test is over
            return
        connection.recv(9, socket.MSG_WAITALL)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        connection.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_where_another_program_listens_is_no_place_to_meet(host: str) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        threading.Thread(target=hang_up, args=(server,), daemon=True).start()
        port = server.getsockname()[1]
        message = refuse("--nnodes", "1:2", "--rdzv-endpoint", f"{host}:{port}")
        server.shutdown(socket.SHUT_RDWR)
    assert message.splitlines()[-1] == (
        f"error: port {port} of --rdzv-endpoint cannot be used (Address already in use), and what "
        "listens on it is no other machine's run; give another port, the same on every machine"
    )


def test_the_port_of_a_master_that_is_taken_is_refused_on_the_first_machine_alone() -> None:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        message = refuse(*MASTER, str(port), "--node-rank", "0")
        assert f"error: port {port} cannot be used (Address already in use)" in message
        assert "give another --master-port" in message
        nodes(master_port=port, rank=1).check_port()


def test_a_run_joins_the_one_that_has_opened_the_meeting() -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    found = nodes(rdzv_endpoint=f"localhost:{store.port}", count="1:2").arguments()
    assert found[found.index("--rdzv-conf") + 1] == "is_host=false"


def test_torchrun_is_told_who_hosts_the_meeting_and_how_this_machine_is_reached(
    monkeypatch,
) -> None:
    from drivetrain.communication.network import Route

    def meeting(own: str, other: str) -> list[str]:
        monkeypatch.setattr("drivetrain_cli.nodes.route_to", lambda host: Route(own, other, "e0"))
        monkeypatch.setattr("drivetrain_cli.nodes.is_own", lambda address: address == own)
        return nodes(rdzv_endpoint="first:29511").arguments()[-4:]

    local = ["--rdzv-conf", "is_host=true", "--local-addr", "first"]
    assert meeting("192.0.2.1", "192.0.2.1") == local
    assert meeting("127.0.1.1", "127.0.1.1") == local  # as many systems resolve their own name
    there = ["--rdzv-conf", "is_host=false", "--local-addr", "192.0.2.2"]
    assert meeting("192.0.2.2", "192.0.2.1") == there
    assert nodes(rdzv_endpoint="first:29511").interface() == "e0"
    assert nodes(count="1").interface() == ""


def test_machines_wait_in_words_and_logs_bear_global_ranks(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import os; print('rank', os.environ['RANK'])")
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])

    def start(number: str) -> subprocess.Popen[str]:
        where = ["--nnodes", "2", "--master-port", port, "--node-rank", number]
        return subprocess.Popen(
            [*RUN, *where, "--log-dir", f"machine{number}", "train.py"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    first = start("0")
    assert first.stderr is not None
    said = [first.stderr.readline() for _ in range(2)]
    assert said[0].startswith("warning: on ")
    assert f"machine 1, is waiting for machine 2 of 2 at 127.0.0.1:{port}\n" in said[1]
    second = start("1")
    assert first.communicate(timeout=300)[0] == "rank 0\n"
    assert second.communicate(timeout=300)[0] == "rank 1\n"
    assert (first.returncode, second.returncode) == (0, 0)
    assert (tmp_path / "machine0" / "rank0.log").read_text().endswith("rank 0\n")
    # which torch may add to, when the store of the first machine ends first
    assert "rank 1" in (tmp_path / "machine1" / "rank1.log").read_text().splitlines()
    assert not (tmp_path / "machine1" / "rank0.log").exists()


def test_one_signal_ends_whatever_ranks_do(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(STUBBORN)
    command = [*RUN[:-1], "2", "--grace", "2", "--log-dir", "logs", "train.py"]
    launcher = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        files = [tmp_path / f"pids{rank}" for rank in range(2)]
        deadline = time.monotonic() + 300
        while not all(file.exists() for file in files):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pids = [int(pid) for file in files for pid in file.read_text().split()]
        assert len(pids) == 6
        began = time.monotonic()
        launcher.send_signal(signal.SIGTERM)
        _, errors = launcher.communicate(timeout=300)
        assert time.monotonic() - began < 25  # before torchrun, which kills after 30 s
        assert launcher.returncode == 128 + signal.SIGTERM
        assert "interrupted by SIGTERM" in errors
        assert [pid for pid in pids if runs(pid)] == []
    finally:
        launcher.kill()
        launcher.communicate()


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False

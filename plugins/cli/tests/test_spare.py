"""Ranks that are copies of a warm spare: what they see, how they end, and what is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from drivetrain_cli import spare
from drivetrain_cli.rank import FOLDER_VARIABLE

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="a spare needs Linux")

COMMAND = [sys.executable, "-m", "drivetrain.cli", "run", "--spare", "--log-dir", "logs"]

SCRIPT = """
import json, os, random, signal, sys
from pathlib import Path
import torch
rank, start = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
facts = {
    "name": __name__, "file": __file__, "argv": sys.argv, "stdin": sys.stdin.read(),
    "cwd": os.getcwd(), "group": os.getpgrp() == os.getpid(), "drawn": random.random(),
    "spare": os.getppid(), "sum": torch.ones(2).sum().item(),
}
Path(f"{start}-{rank}.json").write_text(json.dumps(facts))
print("rank", rank, "start", start, flush=True)
if sys.argv[1] == "fail" and start == "0":
    if rank == "1":
        while not Path("0-0.json").exists(): pass
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()
sys.exit(3 if sys.argv[1] == "exit" and rank == "1" else 0)
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(SCRIPT, "utf-8")
    return subprocess.run(
        [*COMMAND, *arguments], cwd=folder, capture_output=True, text=True, timeout=300
    )


def facts(folder: Path, start: int, rank: int) -> dict:
    return json.loads((folder / f"{start}-{rank}.json").read_text("utf-8"))


def is_gone(process: int) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.05)
    return False


def test_ranks_are_copies_of_a_spare_and_so_are_those_after_a_failure(tmp_path: Path) -> None:
    done = run(tmp_path, "--nproc", "2", "--max-restarts", "1", "train.py", "fail", "--lr", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["rank 0 start 0", "rank 0 start 1"]
    every = [facts(tmp_path, start, rank) for start in (0, 1) for rank in (0, 1)]
    for each in every:
        assert (each["name"], each["file"]) == ("__main__", "train.py")
        assert each["argv"] == ["train.py", "fail", "--lr", "1"]
        assert (each["stdin"], each["cwd"]) == ("", str(tmp_path))
        assert (each["group"], each["sum"]) == (True, 2.0)
    assert len({each["drawn"] for each in every}) == 4
    (process,) = {each["spare"] for each in every}  # one for all of them
    assert is_gone(process)
    log = (tmp_path / "logs" / "rank1.log").read_text("utf-8")
    assert log.splitlines() == ["rank 1 start 0", "rank 1 start 1"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("exit", "rank 1 failed: the script exited with 3"),
        pytest.param("fail", "rank 1 was killed by SIGKILL", marks=pytest.mark.long),
    ],
)
def test_the_end_of_a_rank_is_seen_as_without_a_spare(
    tmp_path: Path, how: str, message: str
) -> None:
    done = run(tmp_path, "--nproc", "2", "train.py", how)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_signal_reaches_the_ranks(tmp_path: Path) -> None:
    source = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "def end(*_): Path('ended' + os.environ['RANK']).touch(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "Path('up' + os.environ['RANK']).touch()\n"
        "while True: signal.pause()\n"
    )
    (tmp_path / "train.py").write_text(source, "utf-8")
    process = subprocess.Popen(
        [*COMMAND, "--nproc", "2", "train.py"], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    while not all((tmp_path / f"up{rank}").exists() for rank in (0, 1)):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(200) == 128 + signal.SIGTERM
    assert all((tmp_path / f"ended{rank}").exists() for rank in (0, 1))


def test_a_rank_starts_from_the_beginning_where_the_spare_is_missing(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('trained')", "utf-8")
    variables = {
        spare.VARIABLE: f"drivetrain-spare-{os.getpid()}-nobody",
        FOLDER_VARIABLE: str(tmp_path),
        "RANK": "0",
        "LOCAL_RANK": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "drivetrain_cli.warm_rank", "script", "train.py"],
        cwd=tmp_path,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "trained\n", done.stderr
    assert "warning: the spare process is missing, so ranks start from the beginning" in done.stderr


def test_another_spare_is_started_when_one_has_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A program in place of Python, which writes down that it ran and ends at once.
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho $DRIVETRAIN_SPARE >> {tmp_path / 'started'}\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setattr(spare.sys, "executable", str(program))
    starter = spare.SpareStarter()
    starter.run()
    assert (tmp_path / "started").read_text().split() == [starter.name_of_socket] * 3


LOUD = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"

LOADED = """
import sys
print([n for n in ("loud", "quiet", "quiet.needed", "foreign") if f"drivetrain_{n}" in sys.modules])
print("torch.distributed.pipelining" in sys.modules)
"""


class LoneSpare:
    """A spare without an agent, in whose environment two plugins are installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, source in (("loud", LOUD), ("quiet", ""), ("foreign", "")):
            (folder / f"drivetrain_{name}").mkdir()
            (folder / f"drivetrain_{name}" / "__init__.py").write_text(source, "utf-8")
            if name == "foreign":  # which offers nothing to Drivetrain
                continue
            facts = folder / f"drivetrain_{name}-1.dist-info"
            facts.mkdir()
            (facts / "METADATA").write_text(f"Name: drivetrain-{name}\nVersion: 1\n", "utf-8")
            entry = f"[drivetrain.plugins]\n{name} = drivetrain_{name}.plugin:Plugin\n"
            (facts / "entry_points.txt").write_text(entry, "utf-8")
        (folder / "drivetrain_quiet" / "needed.py").touch()
        variables = {
            spare.VARIABLE: f"drivetrain-spare-{os.getpid()}-{folder.name}",
            FOLDER_VARIABLE: str(folder),
            "PYTHONPATH": str(folder),
            "RANK": "0",
            "LOCAL_RANK": "0",
        }
        self._environment = {**os.environ, **variables}
        command = [sys.executable, "-m", "drivetrain_cli.spare"]
        self.process = subprocess.Popen(command, env=self._environment)
        listening = f"@{variables[spare.VARIABLE]}"
        while listening not in Path("/proc/net/unix").read_text():
            assert self.process.poll() is None
            time.sleep(0.05)

    def rank(self, source: str) -> list[str]:
        """What a rank prints."""
        (self.folder / "train.py").write_text(source, "utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "drivetrain_cli.warm_rank", "script", "train.py"],
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    def threads(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))


def test_what_ranks_have_imported_is_loaded_in_those_after_a_failure(tmp_path: Path) -> None:
    lone = LoneSpare(tmp_path)
    try:
        assert lone.rank(LOADED) == ["[]", "False"]
        threads = lone.threads()
        lone.rank(
            "import drivetrain_loud, drivetrain_foreign, drivetrain_quiet.needed\n"
            "import torch.distributed.pipelining\n"
            "try: import drivetrain_quiet.not_there\n"
            "except ImportError: pass\n"
        )
        # When ranks are quiet the spare loads package by package, in the order of the ranks' own.
        deadline = time.monotonic() + 240
        while lone.rank(LOADED)[1] == "False" and time.monotonic() < deadline:
            time.sleep(3 * spare.LULL_SECONDS)  # a rank that looks is not quiet itself
        # Copies of a process with another thread would lack it, so "loud" is left to the ranks.
        assert lone.rank(LOADED) == ["['quiet', 'quiet.needed']", "True"]
        assert lone.threads() == threads
    finally:
        lone.process.kill()
        lone.process.wait()

"""Scripts that end without closing what they opened: nothing crashes and nothing hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

# Forks two ranks per ending, from a process that has torch loaded: a rank then starts in no time,
# and its interpreter ends as that of a script does.
SCRIPT = """
import atexit, json, os, signal, socket, sys, time

last_words = []
atexit.register(lambda: [say() for say in last_words])  # first to come, so last to be called

import torch
import torch.distributed as dist
from drivetrain.communication import process_group
from drivetrain import init_distributed
from drivetrain.contracts import Purpose, Tag
from drivetrain.job.job import Job, open_jobs
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry, core_entries

process_group._END_SECONDS = 1.0


def rank(how, number):
    if how == "without a job":
        init_distributed()
        dist.all_reduce(torch.ones(3))
        return
    plan = Plan.build(
        {}, world_size=2, batch_required=False, registry=Registry(core_entries())
    )
    job = Job.open(plan)
    reduce = job.communicator.all_reduce
    reduce(torch.ones(3), "world", Tag(Purpose.CONTROL))
    if how == "by an exit code":
        sys.exit(3)
    if how == "by an exception":
        raise ValueError("odd")
    if how.startswith("with a collective"):
        if number == 1:
            time.sleep(100)
        global under_way
        under_way = reduce(torch.ones(3), "world", Tag(Purpose.CONTROL), asynchronous=True)
        if "exception" in how:
            raise ValueError("odd")


def start(how):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for number in range(2):
        child = os.fork()
        if child == 0:
            environment |= {"RANK": number, "LOCAL_RANK": number}
            os.environ.update({name: str(value) for name, value in environment.items()})
            path = f"{folder}/{how} {number}"
            last_words.append(
                lambda: open(path, "w").write(f"{dist.is_initialized()} {open_jobs()}")
            )
            return number
        children.append(child)
    worlds[how] = children


folder, worlds, codes = sys.argv[1], {}, {}
for how in json.loads(sys.argv[2]):
    number = start(how)
    if number is not None:
        rank(how, number)
        break
else:
    for how, children in worlds.items():
        codes[how] = []
        for child in children:
            codes[how].append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            if how.startswith("with a collective") and child == children[0]:
                os.kill(children[1], signal.SIGKILL)  # which the first rank has not waited for
    print(json.dumps(codes))
"""

CODES = {
    "at the last line": [0, 0],
    "without a job": [0, 0],
    "by an exit code": [3, 3],
    "by an exception": [1, 1],
    "with a collective under way": [0, -9],
    "with a collective under way and an exception": [1, -9],
}


def test_what_a_script_leaves_open_is_closed_before_the_interpreter_goes(tmp_path: Path) -> None:
    """A group whose threads live on ends some processes with "terminate called": a race, so that
    its absence at the exit is asked for, as well as how processes end."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    words = tmp_path / "words"
    words.mkdir()
    found = subprocess.run(
        [sys.executable, str(script), str(words), json.dumps(list(CODES))],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RES_OPTIONS": "timeout:1 attempts:1"},
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == CODES, found.stderr
    assert "terminate called" not in found.stderr
    assert "could not be closed" not in found.stderr
    said = {file.name: file.read_text() for file in words.iterdir()}
    ended = {f"{how} {n}" for how, codes in CODES.items() for n in (0, 1) if codes[n] >= 0}
    assert said == dict.fromkeys(ended, "False []")

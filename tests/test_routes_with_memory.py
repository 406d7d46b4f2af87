"""Shared memory is one route among others: chosen by rules, in order with the rest, or refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from drivetrain_communication.routes.command import comm
from drivetrain_communication.routes.plugin import routers

from drivetrain.contracts import Kind
from drivetrain.errors import ConfigError
from drivetrain.testing import run_distributed

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins" / "communication" / "tests"))

from interleaved import TAG, open_job, run_all

RULES = [
    {"collective": "all_reduce", "at_least_bytes": 100_000, "route": "two_levels"},
    {"collective": "all_reduce", "at_least_bytes": 2000, "route": "gloo"},
    {"collective": "all_gather", "below_bytes": 2000, "route": "gloo"},
    {"collective": "broadcast", "route": "gloo"},
    {"route": "shared_memory"},
]


def over_memory_and_gloo(turns: int) -> tuple[list[str], list[str], bool]:
    with open_job(rules=RULES, ranks_per_host=2) as job:
        wrong = run_all(job, turns)
        # What is read in place stays where it lies, whatever a rule says.
        shard = job.communicator.buffer(100, torch.float32, "world")
        shard.fill_(job.rank)
        whole = torch.empty(400)
        job.communicator.barrier("world", TAG)
        in_place = job.communicator.reads_settled(shard, "world")
        if job.rank != 3:  # the others need not take part
            job.communicator.all_gather(whole, shard, "world", TAG, settled=True)
            in_place = in_place and torch.equal(whole, torch.arange(4.0).repeat_interleave(100))
        job.communicator.barrier("world", TAG)
        taken = {route for _, _, route in routers[job].taken}
        return wrong, sorted(taken), in_place


def test_memory_gloo_and_two_levels_keep_one_order() -> None:
    for wrong, routes, in_place in run_distributed(over_memory_and_gloo, 4, 150):
        assert wrong == []
        assert routes == ["gloo", "shared_memory", "two_levels"]
        assert in_place


def without_memory() -> str:
    others = {"cpu": {"shared_memory": False}}
    with pytest.raises(ConfigError) as caught:
        open_job(others, rules=[{"route": "shared_memory"}])
    return str(caught.value)


def test_memory_that_ranks_do_not_share_is_no_route() -> None:
    for message in run_distributed(without_memory, 2):
        assert "there is no route 'shared_memory' here: ranks share memory on CPUs" in message


def test_the_command_measures_the_routes_and_writes_a_table_that_is_used(tmp_path: Path) -> None:
    out = tmp_path / "routes.json"
    command = [sys.executable, "-m", "drivetrain.cli", "comm", "tune", "--ranks", "2"]
    options = ["--op", "all_reduce", "--op", "all_gather", "--largest", "16k"]
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")}
    done = subprocess.run(
        [*command, *options, "--seconds", "0.001", "--out", str(out)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "all_reduce over 2 ranks on 1 hosts: " in done.stdout
    found = json.loads(out.read_text())
    assert found["cluster"]["ranks_of_hosts"] == [2]
    rows = found["measured"]
    assert {(r["collective"], r["bytes"]) for r in rows} == {
        (kind, size) for kind in ("all_reduce", "all_gather") for size in (1024, 4096, 16384)
    }
    assert all({"job", "gloo", "shared_memory"} <= set(r["seconds"]) for r in rows)
    assert run_distributed(used, 2, str(out)) == [True] * 2


def used(path: str) -> bool:
    with open_job(table=path) as job:
        tensor = torch.ones(1000)
        job.communicator.all_reduce(tensor, "data", TAG)
        shape = routers[job].shape("data")
        table = routers[job].table
        assert table is not None
        route = table.route(Kind.ALL_REDUCE, shape, 4000)
        return bool((tensor == 2).all()) and ("data", Kind.ALL_REDUCE, route) in routers[job].taken


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "--smallest", "1M", "--largest", "1k"], "below --smallest"),
        (["tune", "--op", "gather_all"], "--op"),
        (["tune", "--route", "pigeons"], "--route"),
        (["tune"], "one rank has nobody to talk to"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    result: Any = CliRunner().invoke(comm, arguments)
    assert result.exit_code != 0
    assert message in result.output

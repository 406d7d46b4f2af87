"""Cores for ranks: each its own, of one NUMA node, and no more than the process may use."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from drivetrain_cli.cores import (
    VARIABLE,
    core_variables,
    format_cores,
    parse_cores,
    physical_first,
    share_out,
)

from drivetrain.errors import DrivetrainError

TWO_NODES = [range(8), range(8, 16)]


@pytest.mark.parametrize(
    ("text", "cores"),
    [("0", [0]), ("0-3", [0, 1, 2, 3]), ("0-1,4,6-7", [0, 1, 4, 6, 7])],
)
def test_lists_of_cores_are_read_as_linux_writes_them(text: str, cores: list[int]) -> None:
    assert parse_cores(text) == cores
    assert parse_cores(format_cores(cores)) == cores


@pytest.mark.parametrize("text", ["", "a", "0-", "3-1", "0,3-1", "0,0", "0-2,1", "8,2", "-1"])
def test_what_is_no_list_of_cores_is_refused(text: str) -> None:
    with pytest.raises(DrivetrainError, match="--core-list"):
        parse_cores(text)


def test_ranks_get_disjoint_cores_of_one_node_each() -> None:
    shares = share_out(range(16), TWO_NODES, 4)
    assert shares == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    # three ranks: two on the first node; each gets as many as the one that has least
    assert share_out(range(16), TWO_NODES, 3) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_where_nodes_have_too_few_cores_the_list_is_cut_in_order() -> None:
    assert share_out([0, 8, 9, 10], TWO_NODES, 4) == [[0], [8], [9], [10]]


def test_one_thread_of_each_physical_core_is_shared_out() -> None:
    siblings = [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert physical_first([0, 1, 2, 3], siblings) == [0, 1]


def test_too_few_cores_and_cores_of_others_are_refused() -> None:
    with pytest.raises(DrivetrainError, match="3 ranks need a core each, and there are 2"):
        share_out([0, 1], [[0, 1]], 3)
    with pytest.raises(DrivetrainError, match=re.escape("may not use cores 4000-4001")):
        core_variables(1, "4000-4001")


def test_a_rank_runs_on_its_cores_alone(tmp_path) -> None:
    core = max(os.sched_getaffinity(0))
    (tmp_path / "train.py").write_text("import os\nprint(os.sched_getaffinity(0))\n")
    command = [sys.executable, "-m", "drivetrain.cli", "run", "--log-dir", "logs", "--nproc", "1"]
    done = subprocess.run(
        [*command, "--core-list", str(core), "train.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{{{core}}}\n", done.stderr
    assert core_variables(1, str(core)) == {VARIABLE: str(core), "OMP_NUM_THREADS": "1"}

"""Hostfiles and filters: which hosts and slots take part, and what is wrong in which line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from drivetrain_launch.hosts import Host, choose, read_hostfile

from drivetrain.errors import DrivetrainError

HOSTS = [Host("worker-0", (0, 1)), Host("worker-1", (0, 1, 2, 3)), Host("gpu.example.org", (0,))]


def written(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text, "utf-8")
    return path


def test_a_hostfile_names_hosts_in_its_order_with_their_slots(tmp_path: Path) -> None:
    text = "# rack 1\nworker-0 slots=2\n\n  worker-1\tslots = 4  # new\ngpu.example.org slots=1\n"
    assert read_hostfile(written(tmp_path, text)) == HOSTS


def test_every_wrong_line_is_named_with_its_number(tmp_path: Path) -> None:
    text = "worker-0 slots=2\nworker-1\nworker-0 slots=4\nworker-2 slots=0\nworker-3 slots=x\n"
    with pytest.raises(DrivetrainError) as caught:
        read_hostfile(written(tmp_path, text))
    lines = str(caught.value).splitlines()
    assert [line.split(":")[1] for line in lines] == ["2", "3", "4", "5"]
    assert "'worker-1' is not of the form 'NAME slots=NUMBER'" in lines[0]
    assert "host 'worker-0' is in line 1 already" in lines[1]
    assert "host 'worker-2' has no slots" in lines[2]


@pytest.mark.parametrize("text", ["", "# none\n\n"])
def test_a_hostfile_without_hosts_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DrivetrainError, match="names no host"):
        read_hostfile(written(tmp_path, text))


def test_a_hostfile_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DrivetrainError, match=r"missing cannot be read: No such file"):
        read_hostfile(tmp_path / "missing")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, HOSTS),
        ({"include": "worker-1"}, [HOSTS[1]]),
        ({"include": "worker-1:3,0"}, [Host("worker-1", (0, 3))]),
        # the order is the hostfile's, so ranks are where they are without the filter
        ({"include": "worker-1:2@worker-0"}, [HOSTS[0], Host("worker-1", (2,))]),
        ({"exclude": "worker-1:0,2"}, [HOSTS[0], Host("worker-1", (1, 3)), HOSTS[2]]),
        ({"exclude": "worker-0:0,1"}, HOSTS[1:]),
        ({"exclude": "worker-0@gpu.example.org"}, [HOSTS[1]]),
        ({"nodes": 2}, HOSTS[:2]),
        ({"nodes": 2, "per_node": 1}, [Host("worker-0", (0,)), Host("worker-1", (0,))]),
    ],
)
def test_filters_take_and_leave_hosts_and_slots(options: dict, expected: list[Host]) -> None:
    assert choose(HOSTS, **options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "worker-2"}, "no host is named 'worker-2'; did you mean 'worker-"),
        ({"include": "worker-0:2"}, "--include worker-0: no slot 2; it has 0 to 1"),
        ({"exclude": "worker-0:a"}, "slots are numbers with commas between, got 'a'"),
        ({"include": "worker-0", "exclude": "worker-1"}, "cannot be used together"),
        ({"include": "worker-0", "nodes": 1}, "cannot be used together with --include"),
        ({"exclude": "worker-0@worker-1@gpu.example.org"}, "--exclude leaves no host"),
        ({"nodes": 4}, "--num-nodes 4: there are 3 hosts"),
        ({"per_node": 2}, "--num-gpus 2: gpu.example.org has 1"),
        ({"per_node": 0}, "--num-gpus 0: it must be positive"),
    ],
)
def test_filters_that_do_not_fit_the_hosts_are_refused(options: dict, message: str) -> None:
    with pytest.raises(DrivetrainError, match=re.escape(message)):
        choose(HOSTS, **options)

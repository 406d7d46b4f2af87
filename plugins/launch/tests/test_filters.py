"""Hosts and slots as scripts of DeepSpeed read them."""

from __future__ import annotations

import base64
import json

import pytest
from drivetrain_launch.filters import (
    encode_world_info,
    fetch_hostfile,
    parse_hostfile,
    parse_inclusion_exclusion,
    parse_resource_filter,
)

from drivetrain.errors import DrivetrainError

HOSTS = {"one": [0, 1, 2, 3], "two": [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ("", "", HOSTS),
        ("two:0,3", "", {"two": [0, 3]}),
        ("", "two", {"one": [0, 1, 2, 3]}),
        ("", "one:0,1@two:3", {"one": [2, 3], "two": [0, 1, 2]}),
        ("two:3@two:0,3", "", {"two": [0, 3]}),
        ("", "one@two:0@two:1,2,3", {}),
    ],
)
def test_filters_leave_hosts_and_slots(include, exclude, left):
    assert parse_resource_filter(HOSTS, include, exclude) == left
    assert parse_inclusion_exclusion({"one": 4, "two": 4}, include, exclude) == left


def test_without_a_filter_hosts_stay_as_they_are():
    assert parse_resource_filter({"one": [0], "two": []}) == {"one": [0], "two": []}


@pytest.mark.parametrize("include", ["three", "two:4", "two@one:1@5"])
def test_filters_of_what_there_is_not_are_refused(include):
    with pytest.raises(DrivetrainError, match="--include"):
        parse_resource_filter(HOSTS, include)
    with pytest.raises(DrivetrainError, match="cannot be used together"):
        parse_resource_filter(HOSTS, "one", "two")


def test_hostfiles_are_read_if_there_is_one(tmp_path):
    file = tmp_path / "hosts"
    assert fetch_hostfile(str(file)) is None
    file.write_text("# all\none slots=2\n\ntwo slots=4\n")
    assert fetch_hostfile(str(file)) == {"one": 2, "two": 4}
    file.write_text("one slots=2\none slots=2\n")
    with pytest.raises(DrivetrainError, match="is in line 1 already"):
        fetch_hostfile(str(file))


def test_lines_of_hostfiles_are_read_without_a_file():
    assert parse_hostfile(["  one slots=2", "", "# two slots=1", "three slots=4"]) == {
        "one": 2,
        "three": 4,
    }
    with pytest.raises(DrivetrainError, match="hostfile:2: 'two' is not of the form"):
        parse_hostfile(["one slots=2", "two"])


def test_hosts_travel_as_one_word():
    assert json.loads(base64.urlsafe_b64decode(encode_world_info(HOSTS))) == HOSTS

"""Reading configs and laying overlays over them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from drivetrain.errors import ConfigError
from drivetrain.plan.config.loading import load_config, overlay

COMMENTED = """
// a comment at the top
{
    "train_batch_size": 32, # how many
    /* several
       lines, "fp16": 1 */
    "note": "no // comment, no # comment, no /* comment */ and no ,] either",
    "list": [1, 2, ],
    "fp16": {"enabled": true,},
}
"""


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_json_may_have_comments_and_trailing_commas(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "c.json", COMMENTED)) == {
        "train_batch_size": 32,
        "note": "no // comment, no # comment, no /* comment */ and no ,] either",
        "list": [1, 2],
        "fp16": {"enabled": True},
    }


def test_a_path_may_be_a_string_and_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert load_config(str(path)) == {"a": 1}


def test_a_dict_is_copied_all_the_way_down() -> None:
    given = {"fp16": {"enabled": True}, "list": [{"a": 1}]}
    loaded = load_config(given)
    loaded["fp16"]["enabled"] = False
    loaded["list"][0]["a"] = 2
    assert given == {"fp16": {"enabled": True}, "list": [{"a": 1}]}


@pytest.mark.parametrize("padding", [True, False])
def test_base64_url_json_is_a_config(padding: bool) -> None:
    config = {"train_batch_size": 32, "text": "a?b>c~~\u00fc"}
    encoded = base64.urlsafe_b64encode(json.dumps(config, ensure_ascii=False).encode()).decode()
    assert load_config(encoded if padding else encoded.rstrip("=")) == config


def test_long_base64_json_is_not_taken_for_a_file_name() -> None:
    config = {f"key{i}": i for i in range(2000)}
    assert load_config(base64.urlsafe_b64encode(json.dumps(config).encode()).decode()) == config


@pytest.mark.parametrize("suffix", ["yaml", "yml", "YAML"])
def test_yaml_reads_scalars_as_json_does(tmp_path: Path, suffix: str) -> None:
    text = """
    bucket: 5e8
    rate: 1.5e-4
    whole: 32
    negative: -3
    on: yes
    octal: 010
    off: false
    nothing:
    date: 2026-01-01
    base: &base {stage: 2}
    derived: {<<: *base, overlap: true}
    """
    assert load_config(written(tmp_path, f"c.{suffix}", text)) == {
        "bucket": 5e8,
        "rate": 1.5e-4,
        "whole": 32,
        "negative": -3,
        "on": "yes",
        "octal": "010",
        "off": False,
        "nothing": None,
        "date": "2026-01-01",
        "base": {"stage": 2},
        "derived": {"stage": 2, "overlap": True},
    }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.json", '{\n  "a": 1,\n  "b" 2\n}', r"c.json, line 3, column 7: expecting ':'"),
        ("c.json", '{\n  /* one\n two */ "a": }', r"line 3, column 14: expecting value\n.*\n +\^"),
        ("c.json", '{"a": 1', r"line 1, column 8: expecting ',' delimiter"),
        ("c.json", "", r"line 1, column 1: expecting value"),
        ("c.json", '{"a": "open\n}', r"line 1, column 12: invalid control character\n"),
        ("c.json", '{\n"a": 1,\n"a": 2}', r"'a' is given twice in one object .* lines 2, 3"),
        ("c.json", '{"x": {"b": 1, "b": 2}}', r"'b' is given twice"),
        ("c.json", '{\n"lr": NaN}', r"c.json, line 2, column 7: no JSON number: NaN"),
        ("c.json", "[1, 2]", r"must hold one object with config keys, but is \[1, 2\]"),
        ("c.json", "[" * 100_000, "nested too deeply"),
        ("c.yaml", "a: 1\na: 2", r"c.yaml, line 2, column 1: key 'a' is given twice"),
        ("c.yaml", "x:\n  b: 1\n  b: 2", r"line 3, column 3: key 'b' is given twice"),
        ("c.yaml", "a: [1, 2", r"c.yaml, line [12], column"),
        (
            "c.yaml",
            "a: !!python/object:os.system x",
            r"line 1, column 4: the tag .*os.system' is not allowed",
        ),
        ("c.yaml", "", r"must hold one object with config keys, but is empty"),
        ("c.yaml", "1: 2", r"config keys are strings, got 1"),
        ("c.yaml", "a: {1: 2}", r"config keys are strings, got 1 in a"),
    ],
)
def test_malformed_text_is_refused_with_its_place(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(written(tmp_path, name, text))


def test_the_error_shows_the_line_and_points_at_the_column(tmp_path: Path) -> None:
    path = written(tmp_path, "c.json", '{\n  "a": 1,\n  "b" 2\n}')
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).splitlines()[1:] == ['      "b" 2', "          ^"]


def test_sources_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'missing.json' does not exist"):
        load_config("missing.json")
    with pytest.raises(ConfigError, match="is no regular file"):
        load_config(tmp_path)
    (tmp_path / "c.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_config(tmp_path / "c.json")
    with pytest.raises(ConfigError, match="a dict, a path or base64-url JSON, got int"):
        load_config(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("a.b=2", {"a": {"b": 2, "c": 1}}),
        ("a.new.deep=true", {"a": {"b": 1, "c": 1, "new": {"deep": True}}}),
        ("a.b=5e8", {"a": {"b": 5e8, "c": 1}}),
        ("a.b=AdamW", {"a": {"b": "AdamW", "c": 1}}),
        ('a.b="3"', {"a": {"b": "3", "c": 1}}),
        ("a.b=x=y", {"a": {"b": "x=y", "c": 1}}),
        ('a={"d": [1]}', {"a": {"d": [1]}}),
        ("a.b=null", {"a": {"b": None, "c": 1}}),
        ("a.b=", {"a": {"b": "", "c": 1}}),
    ],
)
def test_an_overlay_replaces_one_value(assignment: str, expected: dict[str, Any]) -> None:
    given = {"a": {"b": 1, "c": 1}}
    assert overlay(given, [assignment]) == expected
    assert given == {"a": {"b": 1, "c": 1}}


def test_later_overlays_win() -> None:
    assert overlay({}, ["a.b=1", "a.b=2", "a.c=3"]) == {"a": {"b": 2, "c": 3}}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("a.b", "not of the form path=value"),
        ("=3", "not of the form path=value"),
        ("a..b=3", "not of the form path=value"),
        ("a.b.c=3", "a.b is 1, not a section"),
    ],
)
def test_an_overlay_that_cannot_be_applied_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        overlay({"a": {"b": 1}}, [assignment])

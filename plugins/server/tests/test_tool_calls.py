"""Calls of tools are found in what models write, however it is cut into pieces."""

from __future__ import annotations

import json
import random

import pytest
from drivetrain_server.api.tools import Call, ToolReader, schema_of_calls

CALL = '{"name": "add", "arguments": {"a": 1, "b": "<x>"}}'
WANTED = [("add", {"a": 1, "b": "<x>"})]


def read(text, pieces):
    reader, found = ToolReader(["add", "sub"]), []
    for piece in pieces(text):
        found += reader.feed(piece)
    found += reader.finish()
    said = "".join(each for each in found if isinstance(each, str))
    calls = [(each.name, json.loads(each.arguments)) for each in found if isinstance(each, Call)]
    assert reader.calls == len(calls)
    return said, calls


def at_once(text):
    return [text]


def by_letter(text):
    return list(text)


def anyhow(text):
    draw, pieces = random.Random(len(text)), []
    while text:
        size = draw.randrange(1, 9)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


@pytest.mark.parametrize("pieces", [at_once, by_letter, anyhow])
@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (f"<tool_call>\n{CALL}\n</tool_call>", "", WANTED),
        (f"Let me see. <tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>",
         "Let me see. ", WANTED * 2),
        (f"<tool_call>{CALL}", "", WANTED),
        ('<function=add>{"a": 1, "b": "<x>"}</function>', "", WANTED),
        (f"[TOOL_CALLS][{CALL}]", "", WANTED),
        (f"[TOOL_CALLS] [{CALL}, {CALL}]", "", WANTED * 2),
        (f"<|python_tag|>{CALL}", "", WANTED),
        ('{"name": "add", "parameters": {"a": 1, "b": "<x>"}}', "", WANTED),
        (f"[{CALL}]", "", WANTED),
        ('{"name": "other", "arguments": {}}', '{"name": "other", "arguments": {}}', []),
        ('{"answer": 42}', '{"answer": 42}', []),
        ("[1, 2", "[1, 2", []),
        ("[", "[", []),
        ("<tool_call>broken</tool_call> then", "<tool_call>broken</tool_call> then", []),
        ("a < b and <tool", "a < b and <tool", []),
        ("plain text\nwith <b>tags</b>", "plain text\nwith <b>tags</b>", []),
        ("", "", []),
    ],
)  # fmt: skip
def test_calls_are_told_from_text(text, said, calls, pieces):
    assert read(text, pieces) == (said, calls)


def test_text_is_shown_as_soon_as_it_cannot_be_a_call():
    reader = ToolReader(["add"])
    assert reader.feed("Hello <") == ["Hello "]
    assert reader.feed("b>") == ["<b>"]


def test_a_schema_of_calls_keeps_references_findable():
    own = {"$defs": {"x": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/x"}}}
    schema = schema_of_calls([("add", own), ("sub", None)])
    assert schema["$defs"] == {"x": {"type": "integer"}}
    assert [each["properties"]["name"]["const"] for each in schema["anyOf"]] == ["add", "sub"]

"""The load of experts is written by step, and drawn as a heat map."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
from click.testing import CliRunner
from dense_experts import EXPERTS, RATE, Model, tokens
from drivetrain_moe.heat_map import colour_of, heat_map, read_history
from drivetrain_moe.history import LoadHistory

import drivetrain
from drivetrain.cli import main
from drivetrain.errors import ConfigError, DrivetrainError
from drivetrain.testing import PluginConformance, run_distributed

SVG = "{http://www.w3.org/2000/svg}"


class TestLoadHistory(PluginConformance):
    plugin = LoadHistory
    config = {"moe": {"load": {"file": None}}}


def train(file: str, steps: int) -> list[list[float]]:
    """Share of choices of each expert on this rank, by step."""
    model, seen = Model("dropless top-2"), []
    model.moe.register_forward_hook(lambda _layer, _inputs, out: seen.append(out[2].tolist()))
    engine, *_ = drivetrain.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
            "moe": {"ep_size": 2, "load": {"file": file}},
        },
    )
    for step in range(steps):
        engine.backward(engine(*tokens(step, engine.job.rank)))
        engine.step()
    engine.destroy()
    engine.job.close()
    return [[count / sum(counts) for count in counts] for counts in seen]


def test_each_step_is_a_line_with_the_share_of_each_expert(tmp_path: Path) -> None:
    file = tmp_path / "new" / "load.jsonl"
    shares = torch.tensor(run_distributed(train, 2, str(file), 3)).mean(0)
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [(row["step"], row["samples"]) for row in rows] == [(1, 2), (2, 4), (3, 6)]
    for row, expected in zip(rows, shares.tolist(), strict=True):
        assert row["load"] == {"moe": pytest.approx(expected, abs=1e-6)}
    (layer,) = read_history(file)
    assert (layer.name, layer.experts, list(layer.steps)) == ("moe", EXPERTS, [1, 2, 3])


def refused(file: str) -> str:
    with pytest.raises(ConfigError) as caught:
        train(file, 1)
    return str(caught.value)


def test_a_file_that_cannot_be_written_is_refused_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, why in ((tmp_path / "file" / "load.jsonl", "File exists"), (tmp_path, "directory")):
        for message in run_distributed(refused, 2, str(path)):
            assert f"moe.load.file: {path} cannot be written by rank 0: " in message
            assert why in message


# -- the picture -----------------------------------------------------------------------------------


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def rows(steps: int) -> list[dict[str, Any]]:
    """One layer whose first expert takes over, and one with even load."""
    return [
        {
            "step": step,
            "samples": 8 * step,
            "load": {
                "blocks.0.moe": [0.25 + 0.5 * step / steps, 0.75 - 0.5 * step / steps],
                "blocks.1.moe": [0.25] * 4,
            },
        }
        for step in range(1, steps + 1)
    ]


def cells(svg: str) -> list[tuple[str, str]]:
    """(What a cell tells, its colour) of all cells."""
    tree = ET.fromstring(svg)
    found = ((rect.findtext(f"{SVG}title"), rect.get("fill")) for rect in tree.iter(f"{SVG}rect"))
    return [(text, str(fill)) for text, fill in found if text]


def test_a_cell_tells_and_shows_the_share_of_an_expert(tmp_path: Path) -> None:
    svg = heat_map(read_history(write(tmp_path / "load.jsonl", rows(4))), "a <run>")
    found = cells(svg)
    assert len(found) == 4 * 2 + 4 * 4
    assert found[0] == ("step 1, expert 0: 37.5% of choices, 0.75 even shares", colour_of(0.75))
    assert ("step 4, expert 0: 75.0% of choices, 1.50 even shares", colour_of(1.5)) in found
    assert ("step 4, expert 3: 25.0% of choices, 1.00 even shares", colour_of(1)) in found
    texts = [text.text for text in ET.fromstring(svg).iter(f"{SVG}text")]
    assert "Load of experts over time: a <run>" in texts
    assert "blocks.0.moe (2 experts, even share 50.0%)" in texts
    assert texts.count("optimizer step") == texts.count("expert") == 2
    assert {"share of choices,", "in even shares", "0", "1 (even)", "8 or more"} <= set(texts)


def test_colours_darken_with_the_load() -> None:
    sums = [
        sum(int(colour_of(load / 4)[at : at + 2], 16) for at in (1, 3, 5)) for load in range(40)
    ]
    assert sums[:33] == sorted(set(sums), reverse=True)
    assert sums[33:] == [sums[32]] * 7  # 8 or more


def test_many_steps_are_put_together_as_means(tmp_path: Path) -> None:
    history = read_history(write(tmp_path / "load.jsonl", rows(1000)), "blocks.0")
    found = cells(heat_map(history, "run", columns=10))
    assert len(found) == 10 * 2
    mean = 0.25 + 0.5 * sum(range(1, 101)) / 100 / 1000
    assert (
        found[0][0]
        == f"steps 1 to 100, expert 0: {mean:.1%} of choices, {2 * mean:.2f} even shares"
    )


def test_a_picture_of_many_experts_stays_small(tmp_path: Path) -> None:
    many = [{"step": step, "load": {"a": [1 / 512] * 512}} for step in range(1, 101)]
    svg = heat_map(read_history(write(tmp_path / "load.jsonl", many)), "run")
    assert len(cells(svg)) == 39 * 512  # 20,000 cells at most
    assert len(svg) < 4e6


def test_the_command_writes_the_picture_beside_the_file(tmp_path: Path) -> None:
    # A resumed run writes steps again; the last line has no end, as its writer was killed.
    again = [*rows(6)[:4], {"step": 4, "load": {"blocks.0.moe": [1.0, 0.0]}}]
    file = write(tmp_path / "load.jsonl", again)
    with file.open("a") as open_file:
        open_file.write('{"step": 5, "loa')
    done = CliRunner().invoke(main, ["moe", "load", str(file), "--layer", "0"])
    assert done.exit_code == 0, done.output
    line, wrote = done.output.splitlines()
    first = (0.25 + 0.5 / 6 + 0.25 + 1 / 6 + 0.25 + 1.5 / 6 + 1) / 4
    assert line == (
        f"blocks.0.moe: steps 1 to 4, 2 experts; most: expert 0 with {first:.1%} of choices, "
        f"least: expert 1 with {1 - first:.1%}, even: 50.0%"
    )
    assert wrote == f"wrote {tmp_path / 'load.svg'}"
    svg = (tmp_path / "load.svg").read_text("utf-8")
    assert "step 4, expert 0: 100.0% of choices" in svg
    assert "blocks.1.moe" not in svg


@pytest.mark.parametrize(
    ("content", "arguments", "expected"),
    [
        ([{"samples": 4, "train_loss": 2.0}], [], "no load of experts: no line has the key 'load'"),
        ([], [], "no load of experts"),
        (["text"], [], "no load of experts"),
        ([{"step": 1, "load": {"a": 3}}], [], r"line 1: expected {\"step\": 1, \"load\""),
        (
            [{"step": 1, "load": {"a": [1.0]}}, {"step": 2, "load": {"a": [0.5, 0.5]}}],
            [],
            "a has 1 and 2 experts at different steps",
        ),
        (rows(2), ["--layer", "x"], "--layer: 'x' matches none of blocks.0.moe, blocks.1.moe"),
        (rows(2), ["--layer", "("], "--layer: '(' is no regular expression"),
        (rows(2), ["-o", "/dev/null/x.svg"], "/dev/null/x.svg cannot be written"),
    ],
)
def test_a_file_without_loads_is_refused(
    content: list[Any], arguments: list[str], expected: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "load.jsonl", content)
    done = CliRunner().invoke(main, ["moe", "load", str(file), *arguments])
    assert done.exit_code == 2
    assert expected.replace("\\", "") in done.output
    assert not (tmp_path / "load.svg").exists()


def test_what_is_no_file_of_lines_is_refused(tmp_path: Path) -> None:
    for content, expected in ((b"\xff\xfe\n", "is not text"), (b"{\n", "line 1 is not JSON")):
        (tmp_path / "load.jsonl").write_bytes(content)
        with pytest.raises(DrivetrainError, match=expected):
            read_history(tmp_path / "load.jsonl")
    with pytest.raises(DrivetrainError, match=re.escape("absent.jsonl cannot be read")):
        read_history(tmp_path / "absent.jsonl")

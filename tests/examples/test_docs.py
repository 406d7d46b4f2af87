"""What the documentation says is true: references, configs, commands and their output.

Above a fenced block, a comment says what it is to these tests:

- ``<!-- run -->``: its ``$`` lines are executed, in one folder per page, and the output shown must
  appear; ``...`` stands for any text. ``<!-- run: fails -->`` expects an exit code other than 0.
- ``<!-- file: NAME -->``: the block is written to that file of the page's folder.
- ``<!-- see: TEST FILE -->``: the commands take long; that test file runs them.

Every block of commands has one of these. Every ``json`` block is a config that must be valid.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from drivetrain.engine.engine import Engine
from drivetrain.errors import ConfigError
from drivetrain.plan.config.loading import load_config
from drivetrain.plan.hub import HOOKS
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry
from tools import generate_docs, workspace
from tools.api_page import NAMES, thing
from tools.docstrings import Docstring

ROOT = workspace.ROOT
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {part for part in path.relative_to(ROOT).parts if part.startswith(".")}
    and not {"site", "runs", "changelog.d", "template"} & set(path.parts)
)
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>(?:run|file|see)[^\n]*?) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    mark: str
    language: str
    text: str

    @property
    def place(self) -> str:
        """Page and line."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text("utf-8")
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("language")) + 1
        content = re.sub(rf"^{found['indent']}", "", found["text"], flags=re.MULTILINE)
        yield Block(page, line, found["mark"] or "", found["language"], content)


def of_language(*languages: str) -> list[Block]:
    return [b for page in PAGES for b in blocks(page) if b.language in languages]


CONFIGS = of_language("json", "jsonc", "yaml")
COMMANDS = of_language("console", "bash", "sh", "shell")
EXECUTED = [page for page in PAGES if any(b.mark.startswith("run") for b in blocks(page))]


# -- references ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", generate_docs.pages(), ids=lambda path: path.name)
def test_a_reference_page_is_what_the_code_says(page: Path) -> None:
    assert page.read_text("utf-8") == generate_docs.pages()[page], (
        "stale; run: python tools/generate_docs.py"
    )


def test_every_hook_is_documented() -> None:
    text = (generate_docs.REFERENCE / "hooks.md").read_text("utf-8")
    assert re.findall(r"^### `(\w+)`$", text, re.MULTILINE)
    assert set(re.findall(r"^### `(\w+)`$", text, re.MULTILINE)) == set(HOOKS)


def test_every_config_key_has_a_meaning() -> None:
    text = (generate_docs.REFERENCE / "config.md").read_text("utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| (.*?) \|$", text, re.MULTILINE)
    assert len(rows) > 50
    assert [key for key, meaning in rows if not meaning] == []
    sections = re.findall(r"^### `([\w.]+)`\n\n(.*)$", text, re.MULTILINE)
    assert [path for path, meaning in sections if not meaning] == []


@pytest.mark.parametrize("path", [name for names in NAMES.values() for name in names])
def test_the_python_page_tells_each_documented_field_and_member(path: str) -> None:
    found, name = thing(path), path.rpartition(".")[2]
    assert Docstring.of(found).text, f"{path} has no docstring"
    text = (generate_docs.REFERENCE / "python.md").read_text("utf-8")
    part = text.partition(f"### `{name}`\n")[2].partition("\n### ")[0]
    assert f"import {name}" in part
    rows = re.findall(r"^\| (?:`|<code>)(\w+)", part, re.MULTILINE)
    assert set(Docstring.of(found).meanings()) <= set(rows)
    assert not re.findall(r"^\| `\w+` \| .* \|  \|$", part, re.MULTILINE), "a row without a meaning"


def test_every_optimizer_and_schedule_is_in_the_catalogue() -> None:
    text = (generate_docs.REFERENCE / "optimizers.md").read_text("utf-8")
    titles = set(re.findall(r"^### `(\w+)`$", text, re.MULTILINE))
    served = {
        name
        for distribution in workspace.load().values()
        for group in ("drivetrain.optimizers", "drivetrain.schedulers")
        for name in distribution.entry_points.get(group, ())
    }
    assert served | {"AdamW", "WarmupLR", "OneCycle"} <= titles
    rows = re.findall(r"^\| `\w+` \|.*\| (.*?) \|$", text, re.MULTILINE)
    assert len(rows) > 100
    assert "" not in rows


def test_a_changed_default_makes_a_reference_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    from drivetrain.sections.precision import FP16

    before = generate_docs.pages()[generate_docs.REFERENCE / "config.md"]
    monkeypatch.setattr(
        FP16, "model_json_schema", classmethod(lambda cls: {"properties": {"x": {"type": "null"}}})
    )
    assert generate_docs.pages()[generate_docs.REFERENCE / "config.md"] != before


# -- configs and code ----------------------------------------------------------------------------


@pytest.mark.parametrize("block", CONFIGS, ids=lambda block: block.place)
def test_a_config_in_the_docs_is_valid(block: Block, tmp_path: Path) -> None:
    file = tmp_path / f"config.{'yaml' if block.language == 'yaml' else 'json'}"
    file.write_text(block.text, "utf-8")
    config = load_config(file)
    if "modifiers" in config:  # a recipe of compression
        from drivetrain_compression import Recipe

        assert Recipe.read(file).modifiers
        return
    batch = {"train_batch_size", "train_micro_batch_size_per_gpu", "elasticity"}
    if not batch & config.keys():
        config["train_batch_size"] = 8  # a page may show the section that it is about alone
    plan_for_some_world(config)


def plan_for_some_world(config: dict[str, Any]) -> Plan:
    """The plan for the smallest world that the config's axes fit into; each is a power of two."""
    for world_size in (1, 2, 4):
        try:
            return Plan.build(config, world_size=world_size)
        except ConfigError as error:
            if not re.search("ranks cannot be divided|does not nest", str(error)):
                raise
    return Plan.build(config, world_size=8)


@pytest.mark.parametrize("block", of_language("python"), ids=lambda block: block.place)
def test_python_in_the_docs_is_python(block: Block) -> None:
    ast.parse(block.text)


def test_every_name_that_a_page_gives_for_deepspeeds_exists() -> None:
    """The right column of the table, and the engine's methods below it."""
    text = (ROOT / "docs" / "howto" / "deepspeed.md").read_text("utf-8")
    table = text.partition("## What has which name here")[2].partition("###")[0]
    offered = [line.split("|")[2] for line in table.splitlines() if line.startswith("| `")]
    names = {n for cell in offered for n in re.findall(r"`(drivetrain\w*(?:\.\w+)+)", cell)}
    assert len(names) > 15
    assert [name for name in names if not _exists(name)] == []
    same = text.partition("The same: ")[2].partition("For others")[0]
    methods = set(Registry.installed().names("methods"))
    made_in_init = {"module", "optimizer", "lr_scheduler", "progress"}
    called = set(re.findall(r"`(\w+)`", same)) - made_in_init
    assert len(called) > 30
    assert {name for name in called if not hasattr(Engine, name)} <= methods


def _exists(dotted: str) -> bool:
    module, _, name = dotted.rpartition(".")
    if hasattr(importlib.import_module(module), name):
        return True
    try:
        importlib.import_module(dotted)
    except ModuleNotFoundError:
        return False
    return True


# -- commands ------------------------------------------------------------------------------------


def test_every_command_in_the_docs_is_run_by_a_test() -> None:
    allowed = {"CONTRIBUTING.md"}  # its commands are the suite itself
    unmarked = [b.place for b in COMMANDS if not b.mark and b.page.name not in allowed]
    assert [place for place in unmarked if place.startswith(("docs/", "README.md"))] == []


@pytest.mark.parametrize(
    "block", [b for b in COMMANDS if b.mark.startswith("see:")], ids=lambda block: block.place
)
def test_commands_that_others_run_are_run_there(block: Block) -> None:
    """The named file exists and mentions each script or make target."""
    where = ROOT / block.mark.removeprefix("see:").strip()
    text = where.read_text("utf-8")
    for line in block.text.splitlines():
        for name in re.findall(r"examples/([\w/]+\.py)|make (\w+)", line):
            assert "".join(name) in text, f"{where.name} does not run {''.join(name)}"


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A fresh environment of its own that sees what this one has, without a network.

    What a page installs stays in there. The commands are those of the docs; ``pip install`` gets
    the options which keep it from looking for anything elsewhere.
    """
    folder = tmp_path_factory.mktemp("shell") / "venv"
    venv.create(folder, symlinks=True)
    ours = next(Path(p) for p in sys.path if p.endswith("site-packages"))
    theirs = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    (theirs / "ours.pth").write_text(f"import site; site.addsitedir({str(ours)!r})\n")
    python = folder / "bin" / "python"
    offline = "--no-deps --no-build-isolation --no-index --quiet --disable-pip-version-check"
    for name, run in {
        "pip": f'[ "$1" = install ] && shift && set -- install {offline} "$@"\n'
        f'exec {python} -m pip "$@"',
        "drivetrain": f'exec {python} -m drivetrain.cli "$@"',
        "pytest": f'exec {python} -m pytest -p no:cacheprovider "$@"',
    }.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{run}\n")
        (folder / "bin" / name).chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "WORLD_"))}
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**environment, "PATH": path, "COLUMNS": "100", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("page", EXECUTED, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_does_what_it_shows(page: Path, shell: dict[str, str], tmp_path: Path) -> None:
    """Follow the page literally, in a folder outside the repository."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for block in blocks(page):
        if block.mark.startswith("file:"):
            file = tmp_path / block.mark.removeprefix("file:").strip()
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, "utf-8")
        elif block.mark.startswith("run"):
            for command, expected in steps(block.text):
                check(block, command, expected, shell, tmp_path)


def steps(text: str) -> Iterator[tuple[str, str]]:
    """(command, output shown below it), with lines that end in a backslash joined."""
    joined = text.replace("\\\n", "")
    parts = re.split(r"^\$ (.*)\n?", joined, flags=re.MULTILINE)
    yield from zip(parts[1::2], parts[2::2], strict=True)


def check(block: Block, command: str, expected: str, shell: dict[str, str], folder: Path) -> None:
    done = subprocess.run(
        command,
        shell=True,
        executable="/bin/bash",
        cwd=folder,
        env=shell,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    message = f"{block.place}: $ {command}\n{done.stdout}"
    assert (done.returncode != 0) == ("fails" in block.mark), message
    pieces = [re.escape(plain(part)) for part in re.split(r"\.\.\.", expected.strip())]
    assert re.search(r".*?".join(pieces), plain(done.stdout), re.DOTALL), message


def plain(text: str) -> str:
    """Without spaces at the ends of lines, where tables have them."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


# -- the site ------------------------------------------------------------------------------------


def test_the_site_builds_without_a_warning(root: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=root,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "reference" / "hooks" / "index.html").is_file()
    # What readers see: to which file a block of code goes, and the README of every package.
    page = (tmp_path / "tutorial" / "plugin" / "index.html").read_text()
    assert '<span class="filename">hello/hello_drivetrain.py</span>' in page
    for name, distribution in workspace.load().items():
        shown = (tmp_path / "packages" / name / "index.html").read_text()
        title = distribution.folder.joinpath("README.md").read_text("utf-8").splitlines()[0]
        assert title.removeprefix("# ") in shown, name


def test_the_site_asks_nobody_else_for_anything(root: Path, tmp_path: Path) -> None:
    """Fonts, pictures and scripts come with the site."""
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", tmp_path],
        cwd=root,
        check=True,
        capture_output=True,
    )
    loaded = re.compile(r'<(?:script|img|link)[^>]*(?:src|href)="(https?://[^"]+)"')
    found = {url for page in tmp_path.rglob("*.html") for url in loaded.findall(page.read_text())}
    assert found == set()


def test_every_picture_says_what_it_shows() -> None:
    for page in PAGES:
        for words, picture in re.findall(r"!\[(.*?)\]\((.*?)\)", page.read_text("utf-8")):
            assert len(words) > 20, f"{page.name}: {picture}"
            assert (page.parent / picture).is_file(), f"{page.name}: {picture}"
    for svg in (ROOT / "docs").rglob("*.svg"):
        assert "<title" in svg.read_text("utf-8"), svg.name


def test_configs_of_the_examples_are_valid() -> None:
    files = sorted((ROOT / "examples").glob("*.json"))
    assert files
    for file in files:
        ranks = 4 if "pipeline" in file.stem else 2  # stages of two ranks where layers are cut, too
        Plan.build(file, world_size=ranks)

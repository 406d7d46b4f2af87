"""Seconds that are planted in a run are in their column, and all columns are its wall time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from drivetrain_profiler.ledger.command import ledger
from drivetrain_profiler.ledger.plugin import LedgerOfRun
from drivetrain_profiler.ledger.reading import read_run
from drivetrain_profiler.ledger.summary import Summary, summary
from torch import nn
from torch.utils.data import dataloader

import drivetrain
from drivetrain.errors import DrivetrainError
from drivetrain.testing import PluginConformance, run_distributed


class TestLedger(PluginConformance):
    plugin = LedgerOfRun
    config = {"ledger": {"timeline_every": 2}}

    @pytest.fixture(autouse=True)
    def _in_a_folder_of_its_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)


class Net(nn.Module):
    """A small model; one rank may be slow."""

    def __init__(self, late: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 1)
        self.late = late

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.late:
            time.sleep(self.late)
        return self.second(self.first(x).relu()).square().mean()


def build(folder: Path, model: nn.Module, **options: Any) -> drivetrain.Engine:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "ledger": {"path": str(folder), **options},
    }
    return drivetrain.initialize(model=model, config=config)[0]


def batches(seconds: float = 0.0) -> Any:
    while True:
        time.sleep(seconds)
        yield torch.ones(4, 32)


class CloseTo:
    """Seconds that were slept: not 5 % less; more where the machine wakes sleepers late."""

    def __init__(self, seconds: float) -> None:
        self._least, self._most = 0.95 * seconds, 1.5 * seconds + 0.2

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and self._least <= other <= self._most

    def __repr__(self) -> str:
        return f"{self._least} to {self._most}"

    __hash__ = None  # type: ignore[assignment]


def of(folder: Path) -> Summary:
    found = summary(read_run(folder))
    for columns in found.ranks.values():
        assert sum(columns.values()) == pytest.approx(found.wall, rel=0.01)
    return found


def slow(folder: Path, data: float, late: float) -> None:
    rank = int(os.environ["RANK"])
    engine = build(folder, Net(late if rank == 1 else 0.0))
    found = batches(data)
    for _ in range(4):
        engine.train_batch(found)
    engine.job.close()


def test_slow_data_is_data_s(tmp_path: Path) -> None:
    run_distributed(slow, 2, tmp_path, 0.2, 0.0)
    assert of(tmp_path).columns["data"] == CloseTo(0.8)


def test_a_slow_rank_computes_and_the_other_waits_for_it(tmp_path: Path) -> None:
    run_distributed(slow, 2, tmp_path, 0.0, 0.25)
    found = of(tmp_path)
    assert found.ranks[1]["compute"] - found.ranks[0]["compute"] == CloseTo(1.0)
    waited = {
        rank: sum(s for column, s in of.items() if column.startswith("communication data"))
        for rank, of in found.ranks.items()
    }
    assert waited[0] - waited[1] == CloseTo(1.0)
    first = found.stragglers[0]
    assert (first.rank, first.steps, first.column) == (1, 4, "compute")
    assert first.seconds == CloseTo(1.0)
    assert found.sent["data gradient"] == 4 * (32 * 64 + 64 + 64 + 1) * 4


def one_rank(function: Any, *arguments: Any) -> None:
    run_distributed(function, 1, *arguments)


def with_loader(folder: Path) -> None:
    class Slow(torch.utils.data.Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> torch.Tensor:
            time.sleep(0.05)
            return torch.ones(32)

    before: Any = dataloader._BaseDataLoaderIter.__next__
    engine = build(folder, Net())
    for batch in torch.utils.data.DataLoader(Slow(), batch_size=4):
        engine.backward(engine(batch))
        engine.step()
        time.sleep(0.1)
    engine.job.close()
    assert dataloader._BaseDataLoaderIter.__next__ is before  # type: ignore[comparison-overlap]


def test_a_loader_that_the_script_iterates_over_itself_is_data_s(tmp_path: Path) -> None:
    one_rank(with_loader, tmp_path)
    found = of(tmp_path)
    assert found.columns["data"] == CloseTo(0.8)
    assert found.columns["idle"] == CloseTo(0.4)


def compiled(folder: Path) -> None:
    def backend(graph: Any, _: Any) -> Any:
        time.sleep(1.0)
        return graph

    engine = build(folder, Net())
    engine.train_batch(batches())
    engine.compile(backend=backend)
    for _ in range(3):
        engine.train_batch(batches())
    engine.job.close()


def test_compiling_is_compilation_s_and_once(tmp_path: Path) -> None:
    one_rank(compiled, tmp_path)
    attempts = read_run(tmp_path)
    per_step = [step.seconds.get("compile", 0.0) for step in attempts[0].ranks[0].steps]
    assert per_step[0] == 0
    assert per_step[2:] == [0.0] * len(per_step[2:])
    assert per_step[1] == CloseTo(1.0)
    assert of(tmp_path).columns["compute"] < 0.9  # without the second of the compiler


def saved(folder: Path) -> None:
    engine = build(folder / "ledger", Net())
    engine.train_batch(batches())
    sync = os.fsync

    def throttled(file: int) -> None:
        time.sleep(0.25)
        sync(file)

    os.fsync = throttled
    begun = time.perf_counter()
    engine.save_checkpoint(str(folder / "saves"))
    spent = time.perf_counter() - begun
    os.fsync = sync
    engine.train_batch(batches())
    engine.load_checkpoint(str(folder / "saves"))
    engine.job.close()
    (folder / "spent").write_text(str(spent))


def test_a_slow_disk_is_the_checkpoint_s(tmp_path: Path) -> None:
    one_rank(saved, tmp_path)
    spent = float((tmp_path / "spent").read_text())
    steps = read_run(tmp_path)[0].ranks[0].steps
    assert spent > 0.5
    assert steps[1].seconds["checkpoint"] == CloseTo(spent)
    assert steps[2].seconds["checkpoint"] > 0  # loading


SCRIPT = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from test_ledger_of_a_run import Net, batches, build
from pathlib import Path
engine = build(Path({folder!r}), Net())
begin = int(sys.argv[1])
if begin:
    engine.load_checkpoint("saves")
found = batches(0.05)
while engine.global_steps < 12:
    engine.train_batch(found)
    print(engine.global_steps, flush=True)
    if engine.global_steps == 5 and not begin:
        engine.save_checkpoint("saves")
engine.job.close()
print(time.time(), flush=True)
"""


def start(folder: Path, begin: int) -> subprocess.Popen[str]:
    text = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder / "ledger"))
    command = [sys.executable, "-c", text, str(begin)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)


def test_an_attempt_that_was_killed_counts_and_its_steps_are_done_again(tmp_path: Path) -> None:
    begun = time.time()
    first = start(tmp_path, 0)
    assert first.stdout is not None
    for line in first.stdout:
        if line.strip() == "8":
            first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(1.0)
    second = start(tmp_path, 1)
    text, _ = second.communicate()
    ended = float(text.split()[-1])
    found = of(tmp_path)
    assert found.wall == pytest.approx(ended - begun, abs=1.0)
    assert (found.attempts, found.killed, found.steps) == (2, 1, 12)
    assert found.redone in (3, 4)
    assert found.columns["done again"] >= found.redone * 0.05
    attempts = read_run(tmp_path)
    opened = attempts[1].ranks[0].opened - attempts[0].ended
    assert 1.0 < opened <= found.columns["restart"]
    assert 0 < found.goodput < 0.2


def test_table_page_and_trace_say_the_same(tmp_path: Path) -> None:
    run_distributed(slow, 2, tmp_path / "ledger", 0.05, 0.0)
    page, trace = tmp_path / "page.html", tmp_path / "trace.json"
    arguments = [str(tmp_path), "--html", str(page), "--trace", str(trace)]
    shown = CliRunner().invoke(ledger, arguments, catch_exceptions=False)
    found = of(tmp_path)
    assert f"data                                {found.columns['data']:>11.3f}" in shown.output
    assert "all columns" in shown.output
    assert f"{found.goodput:.1%}" in page.read_text()
    assert "http" not in page.read_text()
    events = json.loads(trace.read_text())["traceEvents"]
    kept = read_run(tmp_path)[0].ranks[1].steps[0].spans
    assert kept
    mine = [e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == (1, 1)]
    assert sum(e["dur"] for e in mine if e["cat"] == "data") / 1e6 == CloseTo(0.1)
    assert {f"step {n}" for n in range(1, 5)} <= {e["name"] for e in events}
    numbers = CliRunner().invoke(ledger, [str(tmp_path), "--json"], catch_exceptions=False)
    assert json.loads(numbers.output)["columns"]["data"] == found.columns["data"]


def test_a_line_that_a_crash_cut_off_is_left_out_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    one_rank(slow, tmp_path, 0.0, 0.0)
    (file,) = tmp_path.glob("*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    assert of(tmp_path).killed == 1
    file.write_bytes(b"".join([*lines[:3], lines[3][:20] + b"\n", *lines[4:]]))
    with pytest.raises(DrivetrainError, match=r"\.jsonl:4 is damaged"):
        read_run(tmp_path)


def test_a_folder_without_a_ledger_says_how_to_keep_one(tmp_path: Path) -> None:
    with pytest.raises(DrivetrainError, match=r'has no ledger of a run: write "ledger": \{\}'):
        read_run(tmp_path)


def blocked(folder: Path) -> None:
    (folder / "taken").write_text("")
    build(folder / "taken", Net())


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DrivetrainError, match=r"ledger.path: .* cannot be written"):
        one_rank(blocked, tmp_path)

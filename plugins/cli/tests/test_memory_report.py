"""``drivetrain report --memory``, against numbers computed by hand and a machine made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner, Result
from drivetrain_cli import machine, memory_report
from drivetrain_cli.machine import Machine, look
from drivetrain_cli.memory import Model, Ranks, forecast
from drivetrain_cli.memory_tables import folders_in, shortages
from drivetrain_cli.rehearsal import rehearsal
from drivetrain_cli.stand_in import (
    Shape,
    StandIn,
    block_activations,
    number_of_parameters,
    without_memory,
)
from torch import nn

from drivetrain.cli import main
from drivetrain.contracts import Accelerator, Plugin, Section, hookimpl
from drivetrain.errors import ConfigError, DrivetrainError
from drivetrain.job.accelerator_choice import HostAccelerator
from drivetrain.plan.registry import Registry
from drivetrain.testing.models import Block

GIB = 1 << 30
BF16 = {
    "train_micro_batch_size_per_gpu": 2,
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW"},
}


def drivetrain(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def cells(text: str, start: str) -> list[str]:
    row = next(line for line in text.splitlines() if line.startswith(f"│ {start}"))
    return [cell.strip() for cell in row.strip("│ ").split("│")]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(BF16))
    return file


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


# -- the command -------------------------------------------------------------------------------


def test_without_a_config_it_is_about_the_machine() -> None:
    text = drivetrain("report", "--memory").stdout
    assert float(cells(text, "device")[1].split()[0].replace(",", "")) > 0
    assert float(cells(text, "host, available")[1].split()[0].replace(",", "")) > 0
    assert cells(text, "a process may lock")
    assert cells(text, f"free at {Path.cwd()}")


def test_a_job_of_1_gib_of_parameters(config: Path) -> None:
    size = (1 << 30) // 2
    text = drivetrain("report", "--memory", "--config", config, "--parameters", size).stdout
    assert cells(text, "parameters") == ["parameters", "1.00", "-", "-", "-"]
    assert cells(text, "gradients") == ["gradients", "1.00", "-", "-", "-"]
    assert cells(text, "master weights") == ["master weights", "2.00", "-", "-", "-"]
    assert cells(text, "optimizer state exp_avg ")[1] == "2.00"
    assert cells(text, "optimizer state exp_avg_sq")[1] == "2.00"


def test_values_can_be_replaced(config: Path) -> None:
    options = ("--config", config, "--parameters", 1 << 28, "--set", "bf16.enabled=false")
    text = drivetrain("report", "--memory", *options).stdout
    assert cells(text, "parameters")[1] == "1.00"
    assert "master weights" not in text


def test_what_is_assumed_is_said(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("{}")
    text = drivetrain("report", "--memory", "--config", file, "--parameters", "1m").stdout
    assert "the config names no optimizer; AdamW is assumed" in text
    assert "a usual shape for this size" in text
    assert "activations are an estimate" in text


def test_too_little_memory_is_said(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Machine(1, 4 << 20, 4 << 20, None, None, "")
    monkeypatch.setattr(memory_report, "look", lambda *_: small)
    options = ("--config", config, "--parameters", "1m", "--device", "gpu")
    monkeypatch.setattr("drivetrain_cli.report._chosen", lambda: (OneDevice(), "one"))
    text = drivetrain("report", "--memory", *options).stdout
    assert "too little: device:" in text
    assert "but there are 4.00 MiB" in text
    assert "too little: host" not in text


class OneDevice(HostAccelerator):
    device_type = "one"


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--config", "x.json"], "--config needs --memory"),
        (["--memory", "--parameters", "7b"], "give its --config"),
        (["--memory", "--config", "CONFIG"], "give either --parameters or --model"),
        (
            ["--memory", "--config", "CONFIG", "--parameters", "7b", "--model", "a:b"],
            "give either --parameters or --model",
        ),
        (
            ["--memory", "--config", "CONFIG", "--parameters", "big"],
            "expected a number such as 7b, 125M or 1.3e9, got 'big'",
        ),
        (["--memory", "--config", "CONFIG", "--model", "no_such:thing"], "MODULE:FUNCTION"),
        (["--memory", "--config", "no.json", "--parameters", "7b"], "no.json"),
        (
            ["--memory", "--config", "CONFIG", "--parameters", "1m", "--hidden", "4096"],
            "blocks of hidden size 4096 have 201,379,840 parameters",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(options: list[str], hint: str, config: Path) -> None:
    result = drivetrain("report", *(str(config) if o == "CONFIG" else o for o in options))
    assert result.exit_code == 2
    assert hint in " ".join(result.output.split())


def test_a_model_of_ones_own(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "import torch\n\ndef make():\n    return torch.nn.Linear(1 << 14, 1 << 14, bias=False)\n"
    )
    (tmp_path / "model_of_mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    options = ("--config", config, "--model", "model_of_mine:make")
    text = drivetrain("report", "--memory", *options).stdout
    assert "268,435,456 parameters (model_of_mine:make)" in text
    assert cells(text, "parameters")[1] == "0.50"
    assert "activations are not known; give --hidden" in text


# -- a rehearsal -------------------------------------------------------------------------------


def small() -> nn.Module:
    return without_memory(lambda: nn.Linear(8, 8), "a layer")


@pytest.mark.parametrize("ranks", [1, 1000])
def test_a_rehearsal_leaves_nothing_behind(ranks: int) -> None:
    with rehearsal(BF16, small(), ranks=ranks, ranks_on_host=1, on_cpu=False) as engine:
        assert engine.job.world_size == ranks
        assert all(parameter.is_meta for parameter in engine.module.parameters())
    assert not dist.is_initialized()


def test_a_rank_of_a_job_cannot_rehearse_another() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with (
            pytest.raises(DrivetrainError, match="rank of a job"),
            rehearsal(BF16, small(), ranks=2, ranks_on_host=2, on_cpu=True),
        ):
            pass
    finally:
        dist.destroy_process_group()


def test_a_config_that_no_job_would_run_is_refused() -> None:
    with (
        pytest.raises(ConfigError, match="optimiser"),
        rehearsal({"optimiser": {}}, small(), ranks=2, ranks_on_host=2, on_cpu=True),
    ):
        pass
    assert not dist.is_initialized()


class Lender(Plugin):
    """Needs 5 bytes on the device, and moves one block's activations to the host."""

    name = "lender"
    sections = {"lender": Section}

    @hookimpl
    def memory_rows(self, engine: Any, block_activations: int) -> list[tuple[str, str, int, int]]:
        n = block_activations
        return [
            ("loans", "device", 5, 0),
            ("activations", "device", -n, 0),
            ("activations", "host", n, n),
        ]


def test_plugins_tell_what_they_add_and_move(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry.installed().with_plugins(Lender)
    monkeypatch.setattr(Registry, "installed", classmethod(lambda cls: registry))
    model = Model.of_size(100_000, layers=4, hidden=32)
    expected = forecast({**BF16, "lender": {}}, model, Ranks(1, 1, False), sequence=10)
    block = block_activations(32, 2 * 10, 2)
    kinds = expected.by_kind()
    assert kinds["loans"] == {"device": 5, "host": 0, "nvme": 0, "pinned": 0}
    moved = {"device": 3 * block, "host": block, "nvme": 0, "pinned": block}
    assert kinds["activations"] == moved


# -- models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7b", 7 * 10**9),
        ("125M", 125 * 10**6),
        ("1.3e9", 13 * 10**8),
        ("6_700", 6700),
        ("2k", 2000),
    ],
)
def test_sizes_may_be_written_in_many_ways(text: str, number: int) -> None:
    assert number_of_parameters(text) == number


@pytest.mark.parametrize("text", ["", "b", "7x", "-1", "0", "24"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--parameters: expected"):
        number_of_parameters(text)


@pytest.mark.parametrize("size", [25, 1000, 10**6, 124 * 10**6, 7 * 10**9, 10**12])
def test_a_stand_in_has_as_many_parameters_as_were_asked_for(size: int) -> None:
    module = without_memory(lambda: StandIn(Shape.of(size)), "it")
    assert sum(p.numel() for p in module.parameters()) == size


@pytest.mark.parametrize(
    ("size", "layers", "hidden"),
    [(6_700 * 10**6, 32, 4096), (13 * 10**9, 40, 5120), (65 * 10**9, 80, 8192)],
    ids=["7B", "13B", "65B"],
)
def test_guesses_are_near_models_that_exist(size: int, layers: int, hidden: int) -> None:
    shape = Shape.of(size)
    assert shape.layers == pytest.approx(layers, rel=0.2)
    assert shape.hidden == pytest.approx(hidden, rel=0.1)


def test_what_is_given_is_no_guess() -> None:
    assert Shape.of(10**9, layers=10, hidden=1024) == Shape(10**9, 10, 1024, guessed=False)
    assert Shape.of(10**9, layers=10).layers == 10
    assert Shape.of(10**9, hidden=1024).hidden == 1024


def test_a_model_that_cannot_be_made_without_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="RuntimeError"):
        without_memory(lambda: torch.zeros(2).item() and nn.Linear(2, 2), "it")
    with pytest.raises(ConfigError, match=r"made a int, expected a torch\.nn\.Module"):
        without_memory(lambda: 3, "it")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_about_those_that_a_block_saves(dtype: torch.dtype) -> None:
    width, batch, sequence = 64, 2, 48
    block = Block(width, heads=4, dropout=0.0).to(dtype)
    own = {p.untyped_storage()._cdata for p in block.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    inputs = torch.randn(batch, sequence, width, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = block(inputs)
    assert outputs.requires_grad
    found = sum(storage.nbytes() for storage in saved.values())
    expected = block_activations(width, batch * sequence, dtype.itemsize)
    assert found == pytest.approx(expected, rel=0.1)


# -- the machine -------------------------------------------------------------------------------


def test_folders_are_found_wherever_they_are() -> None:
    config = {
        "zero_optimization": {"offload_param": {"nvme_path": "/a"}, "stage": 3},
        "activation_offload": {"nvme_path": "/b"},
        "nvme_path": None,
    }
    assert list(folders_in(config)) == ["/a", "/b"]


def test_a_folder_need_not_exist(tmp_path: Path) -> None:
    found = look(None, (str(tmp_path / "not" / "there"),))
    assert found.nvme is not None
    assert found.nvme > 0
    assert not list(tmp_path.iterdir())
    assert (found.devices, found.device) == (0, None)


def test_a_control_group_may_leave_less_than_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 800 kB\n")
    group = tmp_path / "groups" / "job"
    group.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/job\n")
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "_OWN_CGROUP", tmp_path / "own")
    assert look(None, ()).host == 800 << 10
    (group / "memory.max").write_text(f"{500 << 10}\n")
    (group / "memory.current").write_text(f"{300 << 10}\n")
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {100 << 10}\n")
    assert look(None, ()).host == 300 << 10


def test_ranks_that_share_a_device_need_it_together() -> None:
    model = Model.of_size(1_000_000, layers=2, hidden=64)
    expected = forecast(BF16, model, Ranks(1, 1, False), sequence=1)
    held = 16_000_000
    one = Machine(2, 2 * held + (1 << 22), None, None, None, "")
    assert not shortages(expected, Ranks(4, 1, False), one)
    assert shortages(expected, Ranks(6, 1, False), one)
    assert not shortages(expected, Ranks(9, 1, True), one)  # a CPU: nobody knows of the host


def test_an_accelerator_is_asked_for_its_memory() -> None:
    class Two(HostAccelerator):
        def device_count(self) -> int:
            return 2

        def total_memory(self) -> int:
            return 7 * GIB

    accelerator: Accelerator = Two()
    found = look(accelerator, ())
    assert (found.devices, found.device) == (2, 7 * GIB)

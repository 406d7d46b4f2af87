"""``drivetrain plan``, against memory, bytes and times computed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from drivetrain_cli.memory import Ranks
from drivetrain_cli.planning.allocators import heap_peak
from drivetrain_cli.planning.fitting import needed
from drivetrain_cli.planning.machine_table import MachineTable, seconds_at, usual_place
from drivetrain_cli.planning.plan_command import Bytes
from drivetrain_cli.planning.price import price_of
from drivetrain_cli.planning.rehearsed import Rehearsed, rehearse
from drivetrain_cli.planning.subject import Subject, subject_of
from drivetrain_cli.planning.walk import walking
from torch import nn

from drivetrain.cli import main
from drivetrain.contracts import Phase, Plugin, Section, Transform, hookimpl
from drivetrain.errors import ConfigError, DrivetrainError
from drivetrain.plan.registry import Registry
from drivetrain.testing.models import TinyGPT

WIDTH, SAMPLES = 256, 32
SIZE = 4 * WIDTH * WIDTH
"""Bytes of one layer."""

TOKENS = 4 * SAMPLES * WIDTH
"""Bytes of one layer's output."""

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": SAMPLES,
    "optimizer": {"type": "AdamW"},
}
MODULE = """
import torch
from torch import nn
from drivetrain.testing.models import TinyGPT

def gpt():
    return TinyGPT(vocabulary=512, width=64, layers=2)

def layers():
    return nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))

def rows(samples, sequence):
    return torch.zeros(samples, 256)

def script():
    return nn.Linear(256, 256)

if __name__ == "__main__":
    raise SystemExit("was run")

def looks():
    found = gpt()
    found.scale = float(torch.ones(1)[0].numpy())
    return found
"""


def layers() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)))


def linear_subject() -> Subject:
    return Subject(layers, "layers", 1, lambda samples, _: torch.zeros(samples, WIDTH), [])


def rehearsed(config: dict[str, Any], ranks: int = 1, on_cpu: bool = True) -> Rehearsed:
    return rehearse({**CONFIG, **config}, linear_subject(), Ranks(ranks, 1, on_cpu))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "of_mine.py").write_text(MODULE)
    (tmp_path / "lacks.py").write_text("import no_such_package\n")
    (tmp_path / "breaks.py").write_text("raise RuntimeError('not today')\n")
    (tmp_path / "job.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def forget_the_module() -> Iterator[None]:
    yield
    __import__("sys").modules.pop("of_mine", None)


def drivetrain(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


# -- memory ------------------------------------------------------------------------------------


def test_states_are_those_of_adam_in_fp32() -> None:
    held = rehearsed({}).peaks["step"].held
    names = ("parameters", "gradients", "optimizer state exp_avg", "optimizer state exp_avg_sq")
    assert {name: held[name, "device"] for name in names} == dict.fromkeys(names, 4 * SIZE)


def test_half_precision_has_masters() -> None:
    held = rehearsed({"bf16": {"enabled": True}}).peaks["step"].held
    assert held["parameters", "device"] == held["master weights", "device"] / 2 == 4 * SIZE / 2
    assert held["gradients", "device"] in (2 * SIZE, 4 * SIZE)


def test_a_layer_keeps_its_input_for_backward() -> None:
    """Three inputs of layers that need gradients, the batch, the last output and the loss."""
    held = rehearsed({}).peaks["forward"].held["activations", "device"]
    assert held == pytest.approx(5 * TOKENS, abs=64)


def test_recomputing_by_hand_keeps_less() -> None:
    class Again(nn.Sequential):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            for layer in self:
                inputs = torch.utils.checkpoint.checkpoint(layer, inputs, use_reentrant=False)
            return inputs

    def make() -> nn.Module:
        with torch.device("meta"):
            return Again(
                *(
                    nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
                    for _ in range(4)
                )
            )

    subject = linear_subject()
    subject.make = make
    found = rehearse(CONFIG, subject, Ranks(1, 1, True))
    plain = Subject(lambda: nn.Sequential(*make()), "plain", 1, subject.inputs, [])
    whole = rehearse(CONFIG, plain, Ranks(1, 1, True))

    def kept(each: Rehearsed) -> int:
        return each.peaks["forward"].held["activations", "device"]

    assert kept(whole) - kept(found) == pytest.approx(3 * 2 * TOKENS, rel=0.4)


def test_a_walk_sees_memory_come_and_go() -> None:
    with walking() as walk:
        one = torch.empty(1000, device="meta")
        other = one + one
        view = other[10:]
        del other
        view.untyped_storage().resize_(0)
        del one, view
    assert [change.nbytes for change in walk.changes] == [4000, 4000, -4000, -4000]


def test_of_what_ranks_share_a_walk_counts_one_part() -> None:
    with walking() as walk:
        with walk.shared_by(4):
            row = torch.zeros(1000, device="meta")
        own = row[:250]
        row.untyped_storage().resize_(2000)
        del own, row
    assert [change.nbytes for change in walk.changes] == [1000, -500, -500]
    assert walk.shared == {walk.changes[0].piece}


def test_attention_stores_no_scores() -> None:
    subject = Subject(
        lambda: _on_meta(lambda: TinyGPT(vocabulary=64, width=64, layers=1)), "gpt", 1024, None, []
    )
    config = {**CONFIG, "train_micro_batch_size_per_gpu": 1}
    found = rehearse(config, subject, Ranks(1, 1, True))
    scores = 4 * 4 * 1024 * 1024
    assert found.peaks["forward"].held["activations", "device"] < scores / 2


def _on_meta(make: Any) -> nn.Module:
    with torch.device("meta"):
        return make()


class Doubler(Plugin):
    """A plugin that nobody has heard of: each layer computes twice and keeps a buffer."""

    name = "doubler"
    sections = {"doubler": Section}

    @hookimpl
    def transform_module(self, job: Any, module: nn.Module) -> list[Transform]:
        def apply(found: nn.Module) -> nn.Module:
            for layer in found.children():
                layer.register_buffer("kept", torch.zeros(1000, device=job.device))
                layer.register_forward_hook(lambda _m, _i, out: out * 1.0 + out)
            return found

        return [Transform(Phase.ADAPT, apply)]


def test_a_plugin_that_nobody_has_heard_of_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry.installed().with_plugins(Doubler)
    monkeypatch.setattr(Registry, "installed", classmethod(lambda cls: registry))
    plain, doubled = rehearsed({}), rehearsed({"doubler": {}})
    buffers = doubled.peaks["step"].held["buffers", "device"]
    assert buffers - plain.peaks["step"].held.get(("buffers", "device"), 0) == 4 * 4000
    adds = [o for o in doubled.operators.in_window(3) if o.name == "aten.add.Tensor"]
    assert sum(o.calls[3, "forward"] for o in adds) == 4


# -- bytes and time ----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_gradients_travel_once_a_step(steps: int) -> None:
    found = rehearsed({"gradient_accumulation_steps": steps}, ranks=4)
    gradients = [each for each in found.sent if each.purpose == "gradient"]
    assert sum(each.payload for each in gradients) == 4 * SIZE
    assert sum(each.sent for each in gradients) == 2 * 4 * SIZE * 3 / 4
    assert {each.ranks for each in gradients} == {4}


@pytest.mark.parametrize("steps", [1, 3])
def test_time_is_that_of_the_table(steps: int) -> None:
    found = rehearsed({"gradient_accumulation_steps": steps}, ranks=2)
    rate = 1e9
    table = MachineTable(
        {},
        matmul={"float32": [(1.0, 1 / rate), (1e12, 1e12 / rate)]},
        collectives={"all_reduce": {"2": [(1.0, 1e-3), (1e12, 1e-3)]}},
    )
    price = price_of(found, table, on_cpu=True)
    product = 2 * SAMPLES * WIDTH * WIDTH
    assert price.flops == steps * (4 + 4 + 3) * product  # the batch needs no gradient
    assert price.phases["forward"] == pytest.approx(steps * 4 * product / rate, rel=1e-6)
    assert price.phases["backward"] == pytest.approx(steps * 7 * product / rate, rel=1e-6)
    calls = sum(each.calls for each in found.sent)
    assert price.exposed == pytest.approx(1e-3 * calls)
    table.overhead = 1.0
    assert price_of(found, table, on_cpu=True).overhead > 10


def test_what_was_run_by_itself_goes_before_curves() -> None:
    found = rehearsed({})
    (product,) = [o for o in found.operators.in_window(3) if o.calls[3, "forward"] == 4]
    table = MachineTable({}, operators={product.signature: 2.0})
    assert price_of(found, table, on_cpu=True).phases["forward"] == pytest.approx(8.0)


def test_many_configs_are_planned_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config that is wrong is a line like any other; times come from operators that are run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    MachineTable({}, overhead=1e-6).write(usual_place())
    (tmp_path / "of_plans.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(64, 64)\n"
        "def rows(samples, _):\n    return torch.zeros(samples, 64)\n"
    )
    optimizer = {"type": "AdamW"}
    configs = {
        "few": {"train_micro_batch_size_per_gpu": 2, "optimizer": optimizer},
        "many": {"train_micro_batch_size_per_gpu": 65536, "optimizer": optimizer},
        "wrong": {"train_micro_batch_size_per_gpu": 2, "optimiser": optimizer},
    }
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    options = ["--model", "of_plans:make", "--inputs", "of_plans:rows", "--device", "cpu"]
    result = CliRunner().invoke(main, ["plans", "configs.json", *options, "--memory", "40M"])
    assert result.exit_code == 0, result.output
    few, many, wrong = map(json.loads, result.output.splitlines())
    assert (few["samples"], many["samples"]) == (2, 65536)
    assert few["fits"]
    assert not many["fits"]
    assert many["needs"] > few["needs"]
    assert many["flops"] == 32768 * few["flops"]
    assert many["seconds"] > few["seconds"] > 0
    assert "optimiser" in wrong["error"]
    assert "optimiser" not in few["error"]


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1}'])
def test_configs_that_are_none_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "configs.json").write_text(text)
    file = str(tmp_path / "configs.json")
    result = CliRunner().invoke(main, ["plans", file, "--model", "of_plans:make"])
    assert result.exit_code == 2
    assert "is no JSON object of configs by name" in " ".join(result.output.split())


def test_a_curve_is_straight_between_logarithms() -> None:
    curve = [(10.0, 1.0), (1000.0, 100.0)]
    assert [seconds_at(curve, size) for size in (1, 10, 100, 1000, 2000)] == pytest.approx(
        [1, 1, 10, 100, 200]
    )


# -- what an allocator holds -------------------------------------------------------------------


def test_small_objects_keep_freed_blocks_from_being_joined() -> None:
    """Two blocks are freed side by side; one of both their sizes is behind them all the same."""
    block = 1 << 20
    requests = [(0, 4 * block), (0, -4 * block)]  # from here on smaller ones come from the heap
    requests += [(1, block), (2, block), (3, block), (1, -block), (2, -block)]
    assert heap_peak([*requests, (4, 2 * block)]) == pytest.approx(5 * block, rel=0.05)
    # What has served and is free again serves others that fit.
    assert heap_peak([*requests, (4, block // 2), (5, block // 2)]) < 4.1 * block


def test_large_blocks_have_pages_of_their_own() -> None:
    block = 40 << 20
    found = heap_peak([(1, block), (1, -block), (2, block), (2, -block), (3, block)])
    assert found == pytest.approx(block, abs=8192)


def test_what_others_map_is_no_part_of_the_heap() -> None:
    """Pages of their own; that they are freed does not make the heap take larger blocks."""
    block = 1 << 20
    requests = [(0, 5000), (1, 4 * block), (1, -4 * block), (2, block), (2, -block), (3, block)]
    found = heap_peak(requests, apart={0, 1})
    assert found == 8192 + 4 * block
    assert heap_peak(requests[:1], apart={0}) == 8192


def test_what_a_thread_has_had_stays_in_its_heap() -> None:
    """And serves that thread again, but nobody else."""
    block = 8 << 20
    there = [(0, block), (0, -block), (1, block), (1, -block), (2, block), (2, -block)]
    assert heap_peak(there, threads=dict.fromkeys(range(3), 1)) < 1.1 * block
    found = heap_peak([*there, (3, block)], threads=dict.fromkeys(range(3), 1))
    assert 2 * block <= found < 2.1 * block


# -- what fits ---------------------------------------------------------------------------------


def test_the_largest_micro_batch_fits_and_the_next_does_not(folder: Path) -> None:
    limit = 44 << 20  # 32 MiB stay free; states, and activations of several hundred samples
    options = ("job.json", "--model", "of_mine:layers", "--inputs", "of_mine:rows")
    result = drivetrain(*options, "--memory", limit, "--device", "cpu", "--json")
    largest = json.loads(result.stdout)["largest_micro_batch"]
    for samples, fits in ((largest, True), (largest + 1, False)):
        found = rehearsed({"train_micro_batch_size_per_gpu": samples})
        assert (needed([found]) <= limit) is fits


def test_what_does_not_fit_is_said_with_what_would(folder: Path) -> None:
    """4096 samples save 20 MiB, states take 4."""
    options = ("job.json", "--model", "of_mine:layers", "--inputs", "of_mine:rows")
    options += ("--set", "train_micro_batch_size_per_gpu=4096", "--device", "cpu")
    result = drivetrain(*options, "--memory", "44M")
    assert result.exit_code == 1
    text = " ".join(result.output.split())
    assert re.search(r"does not fit into 44.00 MiB: a rank needs (?:[5-9]\d|1[01]\d)\.", text)
    assert "this would fit: --set train_micro_batch_size_per_gpu=1" in text
    result = drivetrain(*options, "--memory", "1M")
    assert result.exit_code == 1
    assert "no micro-batch fits" in result.output
    assert "nothing that was tried fits" in result.output


@pytest.mark.parametrize(("text", "nbytes"), [("80G", 80 << 30), ("1.5m", 3 << 19), ("512", 512)])
def test_sizes_of_memory(text: str, nbytes: int) -> None:
    assert Bytes().convert(text, None, None) == nbytes


# -- the command -------------------------------------------------------------------------------


def test_the_command_says_what_it_found(folder: Path) -> None:
    result = drivetrain("job.json", "--model", "of_mine:gpt", "--gpus", 4, "--memory", "80G")
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "train_batch_size │ 128 │ derived from the others" in text
    assert "fits into 80.00 GiB: a device needs" in text
    assert "largest micro-batch that fits:" in text
    assert "samples of 2048 tokens are assumed" in text
    assert "no table of the machine" in text


def test_a_script_is_a_model_and_is_not_run(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "of_mine.py").rename(folder / "elsewhere" / "of_mine.py")
    options = ("--model", "elsewhere/of_mine.py:script")
    options += ("--inputs", "elsewhere/of_mine.py:rows", "--json")
    found = json.loads(drivetrain("job.json", *options).stdout)
    assert found["parameters"] == 256 * 256 + 256


def test_a_section_whose_package_is_not_installed_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIVETRAIN_PLUGINS", "drivetrain-cli")
    options = ("job.json", "--model", "of_mine:gpt", "--set", "zero_optimization.stage=2")
    result = drivetrain(*options)
    assert result.exit_code == 2
    assert "drivetrain-zero" in result.output


def test_a_page_has_a_picture_and_stands_alone(folder: Path) -> None:
    options = ("job.json", "--model", "of_mine:gpt", "--sequence", 32, "--html", "plan.html")
    assert drivetrain(*options, "--memory", "80G").exit_code == 0
    text = (folder / "plan.html").read_text()
    assert text.count("<polygon") >= 5
    assert "optimizer state exp_avg" in text
    assert "http" not in text


def test_a_measured_machine_gives_times(folder: Path) -> None:
    result = CliRunner().invoke(main, ["measure", "--seconds", "0.001"])
    assert result.exit_code == 0, result.output
    table = MachineTable.read(folder / "drivetrain" / "machine.json")
    assert all(taken > 0 for curve in (table.memory, *table.matmul.values()) for _, taken in curve)
    assert table.overhead >= 0
    options = ("job.json", "--model", "of_mine:gpt", "--sequence", 16, "--device", "cpu", "--here")
    found = json.loads(drivetrain(*options, "--json").stdout)
    assert found["time"]["exact"] > 0.9
    assert 1e-4 < found["time"]["seconds"] < 10


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--model", "no_such:thing"], "MODULE:FUNCTION"),
        (["--model", "of_mine:layers"], "give --inputs MODULE:FUNCTION"),
        (["--model", "of_mine:looks"], "could not make a model of tensors without memory"),
        (["--model", "of_mine.py"], "names no function"),
        (["--model", "other.py:gpt"], "there is no file other.py"),
        (["--model", "of_mine.py:nothing"], "no 'of_mine.py:nothing'"),
        (["--model", "lacks.py:gpt"], "lacks.py imports no_such_package, which is not installed"),
        (["--model", "breaks.py:gpt"], "breaks.py cannot be imported: RuntimeError: not today"),
        (["--model", "of_mine:gpt", "--inputs", "of_mine:nothing"], "--inputs: no"),
        (["--model", "no.json"], "no.json"),
        (["--model", "of_mine:gpt", "--machine", "job.json"], "no table of a machine"),
        (["--model", "of_mine:gpt", "--set", "optimiser={}"], "optimiser"),
        (["--model", "of_mine:gpt", "--memory", "much"], "no size such as 80G"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(options: list[str], hint: str, folder: Path) -> None:
    result = drivetrain("job.json", *options)
    assert result.exit_code == 2
    assert hint in " ".join(result.output.split())


def test_a_config_without_batch_is_refused(folder: Path) -> None:
    (folder / "job.json").write_text('{"optimizer": {"type": "AdamW"}}')
    result = drivetrain("job.json", "--model", "of_mine:gpt")
    assert result.exit_code == 2
    assert "train_batch_size" in result.output


def test_a_step_that_needs_values_is_refused_by_name() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.layer(inputs) * float(inputs.detach().numpy().sum())

    subject = linear_subject()
    subject.make = lambda: _on_meta(Looks)
    with pytest.raises(DrivetrainError, match="a step of Looks does not run without memory"):
        rehearse(CONFIG, subject, Ranks(1, 1, True))


def test_a_config_of_transformers_needs_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install transformers"):
        subject_of(str(tmp_path), None, None)

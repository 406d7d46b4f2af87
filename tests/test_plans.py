"""What ``drivetrain plan`` foretells of bytes and memory is what a job then does."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from drivetrain_cli.memory import Ranks
from drivetrain_cli.planning.machine_table import MachineTable
from drivetrain_cli.planning.rehearsed import Rehearsed, rehearse
from drivetrain_cli.planning.subject import Subject
from drivetrain_cli.planning.verdict import Question, answer
from drivetrain_cli.rehearsed_messages import Post
from drivetrain_cli.stand_in import without_memory

import drivetrain
from drivetrain.cli import main
from drivetrain.errors import DrivetrainError
from drivetrain.testing import run_distributed
from drivetrain.testing.models import TinyGPT

RANKS, SEQUENCE, SAMPLES = 2, 16, 2
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def gpt() -> TinyGPT:
    return TinyGPT(vocabulary=128, width=64, layers=3, positions=SEQUENCE)


def config(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": SAMPLES,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **more,
    }


def planned(given: dict[str, Any], *, on_cpu: bool = True) -> Rehearsed:
    subject = Subject(lambda: without_memory(gpt, "gpt"), "gpt", SEQUENCE, None, [])
    return rehearse(given, subject, Ranks(RANKS, 1, on_cpu))


def sent(given: dict[str, Any]) -> dict[tuple[str, str], tuple[int, float]]:
    """What a second step sends: (purpose, collective) -> calls and bytes."""
    engine, *_ = drivetrain.initialize(model=gpt(), config=given)
    for _ in range(2):
        engine.job.byte_log.reset()
        for _ in range(engine.gradient_accumulation_steps()):
            tokens = torch.zeros(SAMPLES, SEQUENCE, dtype=torch.int64)
            engine.backward(engine(tokens, tokens))
            engine.step()
    found: Counter[tuple[str, str]] = Counter()
    calls: Counter[tuple[str, str]] = Counter()
    for call, traffic in engine.job.byte_log.items():
        found[call.purpose.value, str(call.op)] += round(traffic.sent_bytes)
        calls[call.purpose.value, str(call.op)] += traffic.calls
    engine.destroy()
    return {key: (calls[key], found[key]) for key in found if key[0] != "control"}


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        (0, {}),
        (1, {"gradient_accumulation_steps": 3}),
        (2, {"bf16": {"enabled": True}, "gradient_accumulation_steps": 4}),
        (3, {"bf16": {"enabled": True}, "gradient_accumulation_steps": 3}),
        (3, {"activation_checkpointing": {"recompute": "all"}}),
    ],
    ids=str,
)
def test_a_step_sends_what_was_planned(stage: int, more: dict[str, Any]) -> None:
    given = config(stage, **more)
    expected: dict[tuple[str, str], tuple[int, float]] = {}
    for each in planned(given).sent:
        if each.purpose != "control" and each.calls:
            calls, nbytes = expected.get((each.purpose, each.op), (0, 0))
            expected[each.purpose, each.op] = (calls + each.calls, nbytes + each.sent)
    found = run_distributed(sent, RANKS, given)[0]
    assert found == expected


def test_ranks_that_share_layers_are_planned_to_hold_a_part_of_them() -> None:
    """Of blocks half; embeddings, norms and what is added behind are whole on each rank."""
    whole, half = (
        planned(config(0, **more)).peaks["forward"].held["parameters", "device"]
        for more in ({}, {"tensor_parallel": {"autotp_size": 2}})
    )
    blocks = 4 * sum(p.numel() for p in gpt().blocks.parameters() if p.dim() > 1)
    assert whole - half >= 0.49 * blocks


@pytest.mark.parametrize(
    ("ranks", "more", "joined"),
    [
        (Ranks(2, 1, True), {}, True),
        (Ranks(2, 1, True), {"cpu": {"shared_memory": False}}, False),
        (Ranks(1, 2, True), {}, False),  # on two machines
        (Ranks(2, 1, False), {}, False),
    ],
    ids=["one host", "switched off", "two hosts", "devices"],
)
def test_ranks_that_share_memory_are_planned_to_gather_no_parameters(
    ranks: Ranks, more: dict[str, Any], joined: bool
) -> None:
    """Each reads the others' parts where they lie, and has half of what all of them take."""

    def make() -> TinyGPT:
        return TinyGPT(vocabulary=128, width=256, layers=3, positions=SEQUENCE)

    subject = Subject(lambda: without_memory(make, "gpt"), "gpt", SEQUENCE, None, [])
    held = rehearse(config(3, **more), subject, ranks).peaks["backward"].held
    blocks = 4 * sum(p.numel() for p in make().blocks.parameters())
    whole = 4 * sum(p.numel() for p in make().parameters())
    gathered = held.get(("gathered parameters", "device"), 0)
    assert gathered < blocks / 10 if joined else gathered > blocks / 4
    assert held["parameters", "device"] == pytest.approx(whole / 2, rel=0.1)


@pytest.mark.parametrize("shares", [True, False])
def test_ranks_that_share_no_memory_are_planned_to_hold_what_gloo_copies(shares: bool) -> None:
    """A whole bucket of parameters, on one of its threads, and one of gradients."""

    def make() -> TinyGPT:
        return TinyGPT(vocabulary=128, width=256, layers=3, positions=SEQUENCE)

    subject = Subject(lambda: without_memory(make, "gpt"), "gpt", SEQUENCE, None, [])
    given = config(1, cpu={"shared_memory": shares})
    found = rehearse(given, subject, Ranks(2, 1, True)).reserved
    without = rehearse(config(1), subject, Ranks(2, 1, True)).reserved
    whole = 4 * sum(p.numel() for p in make().parameters())
    assert (found - without == 0) if shares else (found - without > 0.9 * whole)


def benchmark() -> ModuleType:
    """``benchmarks/plan.py``."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("plan")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(
    "case",
    [
        "stage 3, bf16, wide, 2 ranks",
        pytest.param("stage 1, fp32, gpt, 2 ranks", marks=pytest.mark.long),
        pytest.param("stage 2, fp32, gpt, 2 ranks", marks=pytest.mark.long),
    ],
)
def test_ranks_of_one_host_take_what_was_planned(case: str) -> None:
    """Within 10 % of what the plan says is held, and is to be left free for what differs.

    A page that both map counts half in each, so that both add up. On some machines the peak of the
    same rank is 354 to 444 MB from run to run, where 376 are planned to be held and 45 left free.
    """
    plan = benchmark()
    given, model, ranks = plan.ON_RANKS[case]
    expected = plan.planned(given, model, ranks)
    found = plan.worked(given, model, ranks, 2, expected.needs)
    assert len(found) == ranks
    for each in found:
        assert each["others"] > 0
        assert 0.9 * expected.reserved < each["peak"] < 1.1 * expected.needs


@pytest.mark.parametrize("schedule", ["1f1b", "zb_v"])
def test_each_stage_of_a_pipeline_is_planned_to_send_what_it_sends(schedule: str) -> None:
    """Shapes come from the stage before, both ways where chunks go to and fro (``zb_v``)."""

    def make() -> TinyGPT:
        return TinyGPT(vocabulary=128, width=64, layers=8, positions=SEQUENCE)

    given = config(1, pipeline={"stages": 2, "schedule": schedule}, gradient_accumulation_steps=4)
    subject = Subject(lambda: without_memory(make, "gpt"), "gpt", SEQUENCE, None, [])
    found = answer(Question(given, subject, Ranks(4, 1, True), 4, None, None, largest=False))
    first, last = found.ranks
    # A rank for each stage: 0 and the one that it sends to, with two copies of each stage.
    assert (first.rank, last.rank, first.stages) == (0, 2, 2)
    value = 4 * SAMPLES * SEQUENCE * 64
    edges = {"1f1b": [(1, 0), (0, 1)], "zb_v": [(1, 1), (1, 1)]}[schedule]
    for stage, (values, gradients) in zip((first, last), edges, strict=True):
        sent = sum(s.sent for s in stage.sent if (s.purpose, s.axis) == ("activation", "pp"))
        assert sent == 4 * (values + gradients) * value
    # Embedding and head are on one stage each, and blocks are halved.
    parameters = sum(p.numel() for p in make().parameters())
    held = [stage.peaks["step"].held["parameters", "device"] for stage in found.ranks]
    assert sum(held) == pytest.approx(4 * parameters, rel=0.1)


class Layers(torch.nn.Module):
    """Equal layers, and a loss that takes no time."""

    def __init__(self) -> None:
        super().__init__()
        layers = (torch.nn.Linear(64, 64, bias=False) for _ in range(32))
        self.layers = torch.nn.ModuleList(torch.nn.Sequential(layer) for layer in layers)
        self.scale = torch.nn.Parameter(torch.ones(64))  # gives the first layer's input a gradient

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale
        for layer in self.layers:
            x = layer(x)
        return x.mean()


def waits(schedule: str, micro_batches: int, collectives: dict[str, Any]) -> tuple[float, float]:
    """Planned seconds of waiting and of all else, where products alone take time."""

    given = {
        "train_micro_batch_size_per_gpu": 64,
        "gradient_accumulation_steps": micro_batches,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "pipeline": {"stages": 2, "schedule": schedule, "partition": "uniform"},
    }

    def inputs(samples: int, _: int) -> tuple[torch.Tensor]:
        return (torch.randn(samples, 64),)

    subject = Subject(lambda: without_memory(Layers, "layers"), "layers", 1, inputs, [])
    rate = [(1.0, 1e-9), (1e12, 1e3)]
    table = MachineTable({}, matmul={"float32": rate}, collectives=collectives)
    price = answer(Question(given, subject, Ranks(2, 1, True), 2, None, table, largest=False)).price
    assert price is not None
    return price.bubble, price.seconds - price.bubble


@pytest.mark.parametrize(
    ("schedule", "micro_batches", "share"),
    # Of p = 2 stages and m micro-batches: (p - 1) / m, and half of it with two chunks a stage.
    [("1f1b", 4, 1 / 4), ("gpipe", 8, 1 / 8), ("interleaved", 4, 1 / 8)],
)
def test_stages_are_planned_to_wait_as_long_as_theory_says(
    schedule: str, micro_batches: int, share: float
) -> None:
    waiting, own = waits(schedule, micro_batches, {})
    assert waiting / own == pytest.approx(share, rel=0.05)


def test_stages_wait_for_messages_as_well() -> None:
    """Of four micro-batches two are under way at a time, there as values and back as gradients."""
    slow = {"send_receive": {"2": [(1.0, 1.0), (1e9, 1.0)]}}
    assert waits("1f1b", 4, slow)[0] == pytest.approx(4.0, rel=0.05)


def test_ranks_that_wait_for_each_other_are_told_and_not_rehearsed_for_ever() -> None:
    post = Post()

    def wait(rank: int) -> None:
        post.receive(torch.zeros(1), 1 - rank, rank)

    with pytest.raises(DrivetrainError, match=r"rank \d waits for a message of rank \d"):
        post.rehearse(wait)


EXAMPLES = BENCHMARKS.with_name("examples")
PLANNED = {
    "gpt.py:small": [
        "gpt.json",
        "gpt_host.json",
        "gpt_nvme.json",
        "gpt_zero1.json",
        "gpt_zero3.json",
        "pipeline_gpt.json",
        "pipeline_tensor_gpt.json",
        "plain.json",
        "tensor_gpt.json",
    ],
    "gpt2.py:network": ["gpt2_pipeline.json", "gpt2_pipeline_tensor.json", "gpt2_tensor.json"],
}
"""Model -> configs of the examples that are planned with it."""

LONG = ("gpt2_pipeline.json", "gpt2_pipeline_tensor.json", "pipeline_gpt.json")

REFUSED = {
    # What replicas hold for each other is only known where they meet.
    "diloco_gpt.json": ("gpt.py:small", "diloco.replica: which replica is this job?"),
}
"""Config -> model and what is said, of those that cannot be planned."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to be in, in which nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    yield tmp_path
    assert not list(tmp_path.iterdir())


def example(model: str, name: str) -> Result:
    """``drivetrain plan`` of a config of the examples."""
    file = EXAMPLES / model
    length = "256" if model.startswith("gpt.py") else "16"
    options = ["plan", str(EXAMPLES / name), "--model", str(file), "--sequence", length]
    options += ["--gpus", "4", "--device", "cpu", "--memory", "2G", "--no-largest", "--json"]
    return CliRunner().invoke(main, options)


def test_every_config_of_the_examples_is_planned_or_refused_below() -> None:
    names = [*REFUSED, *(name for names in PLANNED.values() for name in names)]
    assert sorted(names) == sorted(file.name for file in EXAMPLES.glob("*.json"))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        pytest.param(model, name, marks=[pytest.mark.long] if name in LONG else [])
        for model, names in PLANNED.items()
        for name in names
    ],
)
@pytest.mark.usefixtures("folder")
def test_configs_of_the_examples_can_be_planned(model: str, name: str) -> None:
    result = example(model, name)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["fits"]
    assert found["world_size"] == 4
    assert found["samples_per_step"] % found["micro_batch"] == 0
    assert set(found["peaks"]) >= {"forward", "backward", "step"}
    assert found["traffic"]


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("folder")
def test_what_cannot_be_planned_of_the_examples_is_refused_by_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DRIVETRAIN_REPLICA", raising=False)
    model, hint = REFUSED[name]
    result = example(model, name)
    assert result.exit_code != 0
    assert hint in " ".join(result.output.split())


@pytest.mark.parametrize("on_cpu", [True, False])
def test_states_on_the_host_are_planned_there(on_cpu: bool) -> None:
    given = config(2, bf16={"enabled": True})
    given["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    held = planned(given, on_cpu=on_cpu).peaks["step"].held
    size = 2 * sum(p.numel() for p in gpt().parameters())  # 4 bytes for each of a half
    place = "device" if on_cpu else "host"
    for kind in ("master weights", "optimizer state exp_avg", "optimizer state exp_avg_sq"):
        there = held.get((kind, "host"), 0) + (held.get((kind, "device"), 0) if on_cpu else 0)
        assert there == pytest.approx(size, rel=0.02), (kind, place)


def test_recomputed_blocks_are_planned_to_keep_less() -> None:
    plain = planned(config(0)).peaks["forward"].held["activations", "device"]
    again = config(0, activation_checkpointing={"recompute": "all"})
    assert planned(again).peaks["forward"].held["activations", "device"] < plain / 2


def test_inputs_of_recomputed_blocks_are_planned_on_the_host() -> None:
    """With ``cpu_checkpointing`` on a device: one input of each of three blocks, in fp32."""
    here, there = (
        planned(
            config(0, activation_checkpointing={"recompute": "all", "cpu_checkpointing": away}),
            on_cpu=False,
        )
        for away in (False, True)
    )
    inputs = 3 * SAMPLES * SEQUENCE * 64 * 4
    assert there.peak("host") - here.peak("host") == inputs
    forward = [found.peaks["forward"].total("device") for found in (here, there)]
    assert inputs / 2 < forward[0] - forward[1] <= inputs  # the last block's is still used


def saved_before_the_last_block(model: TinyGPT, at_least: int) -> int:
    """Bytes of storages that autograd saves in all blocks but the last."""
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, tuple[int, torch.Tensor]] = {}
    last = False

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not last and storage.nbytes() >= at_least and storage.data_ptr() not in ours:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    def begins(*_: Any) -> None:
        nonlocal last
        last = True

    model.blocks[-1].register_forward_pre_hook(begins)
    tokens = torch.zeros(SAMPLES, 64, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, tokens)
    assert loss.grad_fn is not None
    return sum(nbytes for nbytes, _ in found.values())


def test_activations_that_wait_on_the_host_are_planned_there() -> None:
    def make() -> TinyGPT:
        return TinyGPT(vocabulary=128, width=64, layers=4, positions=64)

    at_least = 16 << 10
    subject = Subject(lambda: without_memory(make, "gpt"), "gpt", 64, None, [])
    away = config(0, activation_offload={"enabled": True, "min_bytes": at_least})
    here, there = (rehearse(given, subject, Ranks(RANKS, 1, False)) for given in (config(0), away))
    expected = saved_before_the_last_block(make(), at_least)
    assert there.peak("host") - here.peak("host") == pytest.approx(expected, rel=0.02)
    forward = [found.peaks["forward"].total("device") for found in (here, there)]
    assert expected / 2 < forward[0] - forward[1] <= expected  # what leaves is there for a time
    on_cpu = rehearse(away, subject, Ranks(RANKS, 1, True))
    assert on_cpu.in_use == rehearse(config(0), subject, Ranks(RANKS, 1, True)).in_use


def test_activations_in_files_are_refused_by_name(tmp_path: Path) -> None:
    away = {"enabled": True, "device": "nvme", "nvme_path": str(tmp_path)}
    with pytest.raises(DrivetrainError, match=r"activation_offload\.device: nvme"):
        planned(config(0, activation_offload=away), on_cpu=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("gpt", {}),
        pytest.param(
            "wide",
            {"gradient_accumulation_steps": 2, "activation_checkpointing": {"recompute": "all"}},
            id="wide",
        ),
    ],
)
def test_a_process_takes_the_memory_that_was_planned_and_runs_within_it(
    tmp_path: Path, model: str, more: dict[str, Any]
) -> None:
    """Within 10 %: resident set of one rank, less that of a training of no size before.

    What the plan needs is also the most that the process may map.
    """
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import plan_models
    finally:
        sys.path.remove(str(BENCHMARKS))
    given = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "AdamW"}, **more}
    make = getattr(plan_models, model)
    subject = Subject(lambda: without_memory(make, model), model, 128, None, [])
    expected = rehearse(given, subject, Ranks(1, 1, True))
    (tmp_path / "config.json").write_text(json.dumps(given))
    worker = [sys.executable, str(BENCHMARKS / "plan_worker.py"), str(tmp_path / "config.json")]
    subprocess.run(
        [*worker, model, "128", "2", str(tmp_path), str(expected.needs)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    peak = json.loads((tmp_path / "rank0.json").read_text())["peak"]
    assert peak == pytest.approx(expected.reserved, rel=0.1)

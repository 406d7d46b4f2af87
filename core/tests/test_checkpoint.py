"""Checkpoints continue a run bit by bit, load into other layouts, and are whole or refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.checkpoint import files
from drivetrain.checkpoint import save as save_function
from drivetrain.engine import Engine
from drivetrain.errors import CheckpointError
from drivetrain.fragment import Box
from drivetrain.job import Job, Ranks
from drivetrain.mesh_layout import Atom, AxisRequest
from drivetrain.parameters import Placement
from drivetrain.plan import Plan
from drivetrain.plugin import Plugin, Section, Sections, hookimpl
from drivetrain.registry import Registry
from drivetrain.testing import run_distributed

CONFIG: dict[str, Any] = {
    "train_batch_size": 12,
    "gradient_clipping": 0.5,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 30}},
}

BF16 = {"bf16": {"enabled": True}, "data_types": {"buffer_dtype": "bf16"}}


class Model(nn.Module):
    """Dropout and batch statistics: random streams and buffers have to be restored, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 1)
        )

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.layers(x.to(self.layers[0].weight.dtype)).float() - y).square().mean()


def make(**changes: Any) -> Engine:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(60, 4, generator=generator)
    module = Model()
    engine, *_ = drivetrain.initialize(
        model=module,
        model_parameters=module.parameters(),
        training_data=torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)),
        config={**CONFIG, **changes},
    )
    return engine


def train(engine: Engine, steps: int) -> list[float]:
    return [engine.train_batch().item() for _ in range(steps)]


def contents(engine: Engine) -> dict[str, list[float]]:
    """Every number of the engine's states, by kind and name."""
    found = {
        f"{f.kind} {f.name}": f.read().float().tolist()
        for f in engine.states.fragments()
        if f.kind != "gradient"
    }
    return found | {n: b.float().tolist() for n, b in engine.module.named_buffers() if b.dim()}


# -- functions that run on every rank --------------------------------------------------------------


def run_in_one_go(changes: dict[str, Any]) -> tuple[list[float], dict[str, list[float]]]:
    torch.manual_seed(10 + Ranks.current().rank)
    engine = make(**changes)
    losses = train(engine, 14)
    found = contents(engine)
    engine.destroy()
    return losses[7:], found


def run_until_saved(folder: str, changes: dict[str, Any]) -> None:
    torch.manual_seed(10 + Ranks.current().rank)
    engine = make(**changes)
    train(engine, 7)  # in the middle of the second epoch
    engine.save_checkpoint(folder, client_state={"note": "seven"})
    engine.destroy()


def resume(folder: str, changes: dict[str, Any]) -> tuple[list[float], dict[str, list[float]]]:
    engine = make(**changes)
    path, client = engine.load_checkpoint(folder)
    assert path is not None
    assert path.endswith("global_step7")
    assert client == {"note": "seven"}
    assert (engine.global_steps, engine.global_samples) == (7, 84)
    losses = train(engine, 7)
    found = contents(engine)
    engine.destroy()
    return losses, found


def save_and_report(folder: str, changes: dict[str, Any]) -> dict[str, list[float]]:
    engine = make(**changes)
    train(engine, 3)
    engine.save_checkpoint(folder, "t")
    found = contents(engine)
    engine.destroy()
    return found


def load_and_report(folder: str, changes: dict[str, Any]) -> dict[str, list[float]]:
    engine = make(**changes)
    engine.load_checkpoint(folder, "t")
    found = contents(engine)
    engine.destroy()
    return found


def save_under_tags_of_their_own(folder: str) -> str:
    engine = make()
    try:
        engine.save_checkpoint(folder, f"tag{Ranks.current().rank}")
    except CheckpointError as error:
        return str(error)
    finally:
        engine.destroy()
    return "saved"


def fail_on_rank_one(folder: str) -> str:
    def full(path: Path, tensors: dict[str, torch.Tensor]) -> str:
        raise OSError(28, "No space left on device", str(path))

    engine = make()
    failing = patch.object(files, "write_tensors", full)
    try:
        with failing if Ranks.current().rank == 1 else nullcontext():
            engine.save_checkpoint(folder, "second")
    except CheckpointError as error:
        return str(error)
    finally:
        engine.destroy()
    return "saved"


class Halved(Plugin):
    """Gives each of two ranks one row of a layer's weight, and of one that is not trained."""

    name = "halved"
    sections: ClassVar[Sections] = {"halved": Section}

    @hookimpl
    def mesh_axes(self, plan: Plan) -> Sequence[AxisRequest]:
        return [Atom("tp", 2)]

    @hookimpl
    def describe_parameters(self, job: Job, module: nn.Module) -> None:
        row = Box((job.mesh.coordinate("tp"), 0), (1, 3), 0)
        for parameter in module.parameters():
            job.parameters.info(parameter).placement = Placement((2, 3), (row,))


def save_rows(folder: str) -> None:
    module = nn.ModuleDict({n: nn.Linear(3, 1, bias=False) for n in ("trained", "frozen")})
    module["frozen"].requires_grad_(False)
    rank = Ranks.current().rank
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(rank + 1.0)
    engine, *_ = drivetrain.initialize(
        model=module,
        model_parameters=module.parameters(),
        config={**CONFIG, "train_batch_size": 2, "scheduler": {}, "halved": {}},
        registry=Registry.installed().with_plugins(Halved),
    )
    engine.save_checkpoint(folder, "rows")
    for fragment in engine.states.fragments():
        fragment.write(torch.zeros_like(fragment.read()))
    engine.load_checkpoint(folder, "rows")
    for parameter in module.parameters():
        assert torch.equal(parameter, torch.full((1, 3), rank + 1.0))
    engine.destroy()


def whole_rows(folder: str) -> list[list[list[float]]]:
    module = nn.ModuleDict({n: nn.Linear(3, 2, bias=False) for n in ("trained", "frozen")})
    engine, *_ = drivetrain.initialize(
        model=module,
        model_parameters=module.parameters(),
        config={**CONFIG, "train_batch_size": 2, "scheduler": {}},
    )
    engine.load_checkpoint(folder, "rows", load_module_only=True)
    answer = [module[name].weight.tolist() for name in ("trained", "frozen")]
    engine.destroy()
    return answer


def test_parts_of_a_parameter_are_put_together_by_their_placement(tmp_path: Path) -> None:
    run_distributed(save_rows, 2, str(tmp_path))
    assert whole_rows(str(tmp_path)) == [[[1.0] * 3, [2.0] * 3]] * 2


# -- resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [{}] + [{m: {"enabled": True}, "data_types": {"buffer_dtype": m}} for m in ("bf16", "fp16")],
    ids=str,
)
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(
    tmp_path: Path, world: int, changes: dict[str, Any]
) -> None:
    unbroken = run_distributed(run_in_one_go, world, changes)
    run_distributed(run_until_saved, world, str(tmp_path), changes)
    assert run_distributed(resume, world, str(tmp_path), changes) == unbroken


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(2, 1), (1, 3), (3, 2)])
def test_states_move_to_another_number_of_ranks(
    tmp_path: Path, saved_on: int, loaded_on: int
) -> None:
    saved = run_distributed(save_and_report, saved_on, str(tmp_path), {})[0]
    assert run_distributed(load_and_report, loaded_on, str(tmp_path), {}) == [saved] * loaded_on


def test_a_bf16_run_continues_in_fp32_from_its_masters(tmp_path: Path) -> None:
    saved = save_and_report(str(tmp_path), BF16)
    loaded = load_and_report(str(tmp_path), {})
    for name in ("layers.0.weight", "layers.3.bias"):
        assert loaded[f"parameter {name}"] == saved[f"master {name}"]
        assert loaded[f"exp_avg {name}"] == saved[f"exp_avg {name}"]


def test_module_only_leaves_counters_and_makes_masters_from_parameters(tmp_path: Path) -> None:
    saved = save_and_report(str(tmp_path), BF16)
    engine = make(**BF16)
    engine.load_checkpoint(tmp_path, "t", load_module_only=True)
    found = contents(engine)
    name = "layers.0.weight"
    assert engine.global_steps == 0
    assert found[f"parameter {name}"] == found[f"master {name}"] == saved[f"parameter {name}"]
    assert not any(found[f"exp_avg {name}"])
    engine.destroy()


# -- what is refused -------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_and_report(str(tmp_path), {})
    return tmp_path / "t"


def load_error(folder: Path, **options: Any) -> str:
    engine = make()
    try:
        with pytest.raises(CheckpointError) as caught:
            engine.load_checkpoint(folder, "t", **options)
    finally:
        engine.destroy()
    return str(caught.value)


def test_without_latest_nothing_is_loaded_and_a_warning_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make()
    assert engine.load_checkpoint(tmp_path) == (None, None)
    assert "latest does not exist" in caplog.text
    engine.destroy()


def test_a_missing_tag_is_named(tmp_path: Path) -> None:
    assert f"there is no checkpoint {tmp_path / 't'}" in load_error(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "rank00000.json", "rank00000.safetensors"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    assert f"{name} is missing" in load_error(saved.parent)


@pytest.mark.parametrize("name", ["manifest.json", "rank00000.json", "rank00000.safetensors"])
def test_a_truncated_file_is_named(saved: Path, name: str) -> None:
    path = saved / name
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{name} is damaged" in load_error(saved.parent)


def test_a_flipped_bit_is_noticed(saved: Path) -> None:
    path = saved / "rank00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    assert "checksum is not the recorded one" in load_error(saved.parent)


def test_a_tensor_of_another_shape_is_named(saved: Path) -> None:
    index = json.loads((saved / "rank00000.json").read_text())
    for entry in index["tensors"]:
        if entry["name"] == "layers.0.weight":
            entry["global_shape"] = [4, 4]
    (saved / "rank00000.json").write_text(json.dumps(index))
    error = load_error(saved.parent)
    assert "layers.0.weight (parameter) has shape [16, 4] in the model, but [4, 4]" in error


def test_a_missing_parameter_is_named_unless_loading_is_not_strict(saved: Path) -> None:
    index = json.loads((saved / "rank00000.json").read_text())
    index["tensors"] = [e for e in index["tensors"] if e["name"] != "layers.3.bias"]
    (saved / "rank00000.json").write_text(json.dumps(index))
    assert "lacks layers.3.bias" in load_error(saved.parent)
    engine = make()
    engine.load_checkpoint(saved.parent, "t", load_module_strict=False)
    engine.destroy()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"args": object()}, r"client_state.args \(object\) is not plain data"),
        ({"a": [1, {"b": torch.ones(1)}]}, r"client_state.a\[1\].b \(Tensor\)"),
        ({1: "x"}, "key 1 of client_state"),
    ],
)
def test_client_state_that_is_not_plain_data_is_refused_before_writing(
    tmp_path: Path, state: dict[Any, Any], message: str
) -> None:
    engine = make()
    with pytest.raises(CheckpointError, match=message):
        engine.save_checkpoint(tmp_path, client_state=state)
    assert list(tmp_path.iterdir()) == []
    engine.destroy()


@pytest.mark.parametrize("tag", ["", "a/b", ".."])
def test_a_tag_that_is_no_directory_name_is_refused(tmp_path: Path, tag: str) -> None:
    engine = make()
    with pytest.raises(CheckpointError, match="not a plain directory name"):
        engine.save_checkpoint(tmp_path, tag)
    engine.destroy()


def test_ranks_with_different_tags_are_refused_on_every_rank(tmp_path: Path) -> None:
    for rank, answer in enumerate(run_distributed(save_under_tags_of_their_own, 2, str(tmp_path))):
        assert f"different tags; this rank's is 'tag{rank}'" in answer
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_cannot_write_fails_all_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    run_distributed(save_and_report, 2, str(tmp_path), {})
    answers = run_distributed(fail_on_rank_one, 2, str(tmp_path))
    assert "No space left on device" in answers[1]
    assert "rank 1 failed" in answers[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "t"]
    assert (tmp_path / "latest").read_text() == "t"
    run_distributed(load_and_report, 2, str(tmp_path), {})


def test_saving_again_under_a_tag_replaces_it(saved: Path) -> None:
    engine = make()
    train(engine, 1)
    engine.save_checkpoint(saved.parent, "t")
    expected = contents(engine)
    engine.destroy()
    assert load_and_report(str(saved.parent), {}) == expected
    assert sorted(path.name for path in saved.parent.iterdir()) == ["latest", "t"]


def test_frozen_parameters_can_be_left_out(tmp_path: Path) -> None:
    engine = make()
    engine.module.layers[0].requires_grad_(False)
    engine.rebuild()
    save_function(engine, tmp_path, "t", exclude_frozen_parameters=True)
    engine.destroy()
    index = json.loads((tmp_path / "t" / "rank00000.json").read_text())
    names = {entry["name"] for entry in index["tensors"]}
    assert "layers.3.weight" in names
    assert "layers.0.weight" not in names

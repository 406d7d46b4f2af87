"""Checkpoints continue a run bit by bit, load into other layouts, and are whole or refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from small_engine import (
    BF16,
    CONFIG,
    Model,
    contents,
    damage,
    load_and_report,
    make,
    save_and_report,
    train,
)
from torch import nn

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.contracts import (
    Atom,
    AxisRequest,
    Box,
    Placement,
    Plugin,
    Section,
    Sections,
    hookimpl,
)
from drivetrain.engine.engine import Engine
from drivetrain.errors import CheckpointError
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed

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
    engine.save_checkpoint(folder, None, {"note": "seven"})  # in the order that DeepSpeed has, too
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
            job.parameters.info(parameter).placement = Placement((2, 3), (row,), "tp")


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


# -- what is refused, and what is said -------------------------------------------------------------


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


def load_with(module: nn.Module, folder: Path, **options: Any) -> str | None:
    """Load into another module; the message of the error, if there is one."""
    engine, *_ = drivetrain.initialize(
        model=module, model_parameters=module.parameters(), config=CONFIG
    )
    try:
        engine.load_checkpoint(folder, "t", **options)
    except CheckpointError as error:
        return str(error)
    finally:
        engine.destroy()
    return None


def test_without_latest_nothing_is_loaded_and_a_warning_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make()
    assert engine.load_checkpoint(tmp_path) == (None, None)
    assert "latest does not exist" in caplog.text
    engine.destroy()


def test_a_missing_tag_is_named(tmp_path: Path) -> None:
    assert f"there is no checkpoint {tmp_path / 't'}" in load_error(tmp_path)


def test_a_damaged_latest_gives_way_to_the_last_good_one_loudly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make()
    train(engine, 2)
    engine.save_checkpoint(tmp_path)
    expected = contents(engine)
    train(engine, 1)
    engine.save_checkpoint(tmp_path)
    damage(next((tmp_path / "global_step3").glob("rank*.safetensors")))
    train(engine, 1)
    path, _ = engine.load_checkpoint(tmp_path)
    assert path == str(tmp_path / "global_step2")
    assert contents(engine) == expected
    assert engine.global_steps == 2
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert "is damaged in checkpoint file" in errors[0]
    assert "falling back to the last good checkpoint" in errors[0]
    assert "global_step2, step 2" in errors[1]
    assert "it is not the latest, which is damaged" in errors[1]
    engine.destroy()


def test_a_latest_that_names_nothing_gives_way_too(tmp_path: Path) -> None:
    save_and_report(str(tmp_path), {})
    (tmp_path / "latest").write_text("../elsewhere")
    engine = make()
    assert engine.load_checkpoint(tmp_path)[0] == str(tmp_path / "t")
    engine.destroy()


def test_a_damaged_tag_that_was_asked_for_is_an_error_that_names_others(tmp_path: Path) -> None:
    save_and_report(str(tmp_path), {})
    engine = make()
    engine.save_checkpoint(tmp_path)
    engine.destroy()
    damage(next((tmp_path / "t").glob("rank*.safetensors")))
    error = load_error(tmp_path)
    assert "is damaged in checkpoint file" in error
    assert "other checkpoints there: global_step0" in error
    assert "the engine's states are no whole now" in error


def test_a_module_of_another_shape_is_refused_by_name(saved: Path) -> None:
    module = Model()
    module.layers[3] = nn.Linear(16, 2)
    error = load_with(module, saved.parent)
    assert error is not None
    assert "layers.3.bias (parameter) has shape [2] in the model, but [1]" in error


def test_a_parameter_more_or_less_is_named_unless_loading_is_not_strict(saved: Path) -> None:
    more, less = Model(), Model()
    more.extra = nn.Linear(2, 2)
    less.layers[3] = nn.Linear(16, 1, bias=False)
    found = load_with(more, saved.parent, load_module_only=True)
    assert found is not None
    assert "lacks extra.bias (parameter), extra.weight (parameter)" in found
    found = load_with(less, saved.parent)
    assert found is not None
    assert "has parameters that the module lacks: layers.3.bias" in found
    for module in (more, less):
        assert load_with(module, saved.parent, load_module_strict=False) is None


def compiled_whole() -> nn.Module:
    return torch.compile(Model(), backend="eager")


def compiled_in_part() -> nn.Module:
    module = Model()
    module.layers[1] = torch.compile(module.layers[1], backend="eager")
    return module


@pytest.mark.parametrize("make_compiled", [compiled_whole, compiled_in_part])
def test_what_torch_compile_wraps_is_saved_under_its_own_names(
    tmp_path: Path, make_compiled: Callable[[], nn.Module]
) -> None:
    compiled, *_ = drivetrain.initialize(model=make_compiled(), config=CONFIG)
    for parameter in compiled.module.parameters():
        parameter.data.fill_(0.5)
    compiled.save_checkpoint(tmp_path)
    compiled.destroy()
    plain = make()
    assert plain.load_checkpoint(tmp_path)[0] is not None
    assert all(bool((p == 0.5).all()) for p in plain.module.parameters())
    plain.destroy()


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


def test_a_tag_that_is_no_directory_name_or_a_name_of_ours_is_refused(tmp_path: Path) -> None:
    engine = make()
    engine.save_checkpoint(tmp_path, "good")
    names = [
        "",
        "a/b",
        "..",
        "latest",
        "Latest",
        "latest.new",
        "manifest.json",
        " a",
        "a\n",
        "\udcff",
    ]
    for tag in names:
        with pytest.raises(CheckpointError, match="not a plain directory name"):
            engine.save_checkpoint(tmp_path, tag)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "latest"]
    assert engine.load_checkpoint(tmp_path)[0] == str(tmp_path / "good")
    engine.destroy()


def test_a_tag_that_is_a_link_is_refused_when_saving_and_loads(tmp_path: Path) -> None:
    engine = make()
    engine.save_checkpoint(tmp_path, "good")
    (tmp_path / "best").symlink_to("good")
    with pytest.raises(CheckpointError, match="best was not saved: it is a link"):
        engine.save_checkpoint(tmp_path, "best")
    assert engine.load_checkpoint(tmp_path, "best")[0] == str(tmp_path / "best")
    engine.destroy()


def test_frozen_parameters_can_be_left_out_and_then_stay_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make()
    engine.module.layers[0].requires_grad_(False)
    engine.rebuild()
    engine.save_checkpoint(tmp_path, "t", exclude_frozen_parameters=True)
    with torch.no_grad():
        engine.module.layers[0].weight.fill_(7)
        engine.module.layers[3].weight.fill_(7)
    caplog.set_level("INFO")
    engine.load_checkpoint(tmp_path, "t")
    assert bool((engine.module.layers[0].weight == 7).all())
    assert not bool((engine.module.layers[3].weight == 7).any())
    assert "2 frozen parameters were excluded when saving" in caplog.text
    engine.destroy()


def test_hyper_parameters_follow_their_parameters_into_other_groups(tmp_path: Path) -> None:
    def grouped(*names: str) -> Engine:
        module = Model()
        of_name = dict(module.named_parameters())
        groups = [{"params": [of_name[n]], "lr": 0.1 * (1 + i)} for i, n in enumerate(names)]
        engine, *_ = drivetrain.initialize(
            model=module,
            model_parameters=groups,
            config={**CONFIG, "scheduler": {}},
        )
        return engine

    names = ["layers.0.weight", "layers.0.bias", "layers.3.weight", "layers.3.bias"]
    engine = grouped(*names)
    for group, value in zip(engine.optimizer.param_groups, (1.0, 2.0, 3.0, 4.0), strict=True):
        group["lr"] = value
    engine.save_checkpoint(tmp_path, "t")
    engine.destroy()
    engine = grouped(*reversed(names))
    engine.load_checkpoint(tmp_path, "t")
    assert engine.get_lr() == [4.0, 3.0, 2.0, 1.0]
    # JSON knows no tuples, but what reads the betas may compare them with its own.
    assert [type(group["betas"]) for group in engine.optimizer.param_groups] == [tuple] * 4
    engine.destroy()

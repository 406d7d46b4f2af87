"""Parameters that are summed, cut and replicated over axes count, start and are saved once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from several_axes import RATE, ROWS, data, make
from torch import nn
from toy_tensor_parallel import Model, ToyTensorParallel

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.contracts import Atom, AxisRequest, Plugin, hookimpl
from drivetrain.engine.engine import Engine
from drivetrain.job.job import Job
from drivetrain.plan.registry import Registry
from drivetrain.testing import RanksFailedError, run_distributed

AVERAGED = {"weight_average": {"decay": 0.9}}
STEPS = 4
LAYOUTS = [pytest.param(1, 2, id="dp 1 x tp 2"), pytest.param(2, 2, id="dp 2 x tp 2")]
STAGES = pytest.mark.parametrize("stage", [0, 1, 2, 3])

Curve = list[tuple[float, float]]
"""Loss and norm of the gradient before clipping, by step."""


def train(engine: Engine, begin: int, end: int, shards: int | None = None) -> Curve:
    """Loss of this rank; several shards of data are micro-batches where there are fewer ranks."""
    curve, mesh = [], engine.job.mesh
    engine.get_global_grad_norm()
    for step in range(begin, end):
        own = [mesh.coordinate("dp")] if shards is None else range(shards)
        losses = []
        for shard in own:
            loss = engine(*data(step, shard))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        norm = engine.get_global_grad_norm()
        assert norm is not None
        curve.append((sum(losses) / len(losses), norm))
    return curve


def reference(shards: int, clipping: float) -> tuple[list[list[float]], list[float], Model]:
    """One process, nothing but torch, float64: losses by step and shard, norms, the model."""
    model = Model().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    losses, norms = [], []
    for step in range(STEPS):
        each = [model(*data(step, shard)) for shard in range(shards)]
        optimizer.zero_grad()
        torch.stack(each).mean().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clipping or float("inf"))
        optimizer.step()
        losses.append([loss.item() for loss in each])
        norms.append(norm.item())
    return losses, norms, model


def parts_of(engine: Engine) -> list[tuple[str, tuple[slice, ...], torch.Tensor]]:
    """Name, place and values of every box of a parameter that this rank keeps."""
    found = []
    for fragment in engine.states.fragments():
        if fragment.kind == "parameter":
            flat = fragment.read().clone()
            for box in fragment.boxes:
                ends = zip(box.global_offset, box.size, strict=True)
                place = tuple(slice(start, start + size) for start, size in ends)
                found.append((fragment.name, place, box.of_storage(flat)))
    return found


# -- functions that run on every rank --------------------------------------------------------------


def trained(stage: int, tp: int, clipping: float) -> tuple[Curve, list[Any]]:
    engine = make(stage, tp, clipping)
    curve, parts = train(engine, 0, STEPS), parts_of(engine)
    engine.destroy()
    return curve, parts


def started_apart(stage: int) -> list[Any]:
    """Every rank has replicated parameters of its own at first."""
    model = Model().double()
    rank = Ranks.current().rank
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "up" not in name and "down.weight" not in name:
                parameter += rank
        model.blocks[1].norm.weight.requires_grad_(False)
    engine = make(stage, 2, model=model)
    parts = parts_of(engine)
    engine.destroy()
    return parts


def saved(folder: str, stage: int, tp: int) -> tuple[Curve, list[tuple[str, str]]]:
    engine = make(stage, tp)
    train(engine, 0, 2)
    engine.save_checkpoint(folder)
    owned = [
        (fragment.kind, fragment.name, box.global_offset)
        for fragment in engine.states.fragments()
        if fragment.owner and fragment.kind != "gradient"
        for box in fragment.boxes
    ]
    curve = train(engine, 2, STEPS)
    engine.destroy()
    return curve, owned


def resumed(folder: str, stage: int, tp: int, shards: int) -> Curve:
    engine = make(stage, tp, train_batch_size=ROWS * shards)
    engine.load_checkpoint(folder)
    alone = engine.job.mesh.size("dp") == 1
    curve = train(engine, 2, STEPS, shards=shards if alone else None)
    engine.destroy()
    return curve


class Axes(Plugin):
    """Two axes whose ranks have the same model, or not."""

    name = "axes"

    @hookimpl
    def mesh_axes(self) -> Sequence[AxisRequest]:
        return [Atom("pp", 2)]


class Stages(Axes):
    """A pipeline, as far as parameters are concerned."""

    name = "stages"

    @hookimpl
    def describe_parameters(self, job: Job, module: nn.Module) -> None:
        for parameter in module.parameters():
            job.parameters.info(parameter).distinct += ("pp",)


def norm_of_stages(plugin: type[Plugin]) -> float:
    rank = Ranks.current().rank
    module = nn.Sequential()
    module.add_module(f"layer{rank}", nn.Linear(2, 1, bias=False))
    engine, *_ = drivetrain.initialize(
        model=module,
        config={
            "train_batch_size": 1,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "plugins": {plugin.name: True},
        },
        registry=Registry.installed().with_plugins(plugin),
    )
    engine.get_global_grad_norm()
    engine.backward(engine(torch.tensor([3.0, 4.0]) * (1 + rank)).sum())
    engine.step()
    norm = engine.get_global_grad_norm()
    engine.destroy()
    assert norm is not None
    return norm


def initialize_with(change: str) -> None:
    class Wrong(ToyTensorParallel):
        @hookimpl
        def describe_parameters(self, job: Job, module: nn.Module) -> None:
            info = job.parameters.info(module.blocks[0].up.weight)
            if change == "no placement":
                info.placement = None
            elif change == "other whole":
                assert info.placement is not None
                shape = (7 + job.mesh.coordinate("tp"), 4)
                info.placement = type(info.placement)(shape, info.placement.boxes, "tp")
            elif change == "overlap":
                info.distinct = ("world",)
            else:
                assert info.placement is not None
                (box,) = info.placement.boxes
                wrong = {
                    "outside": [replace(box, global_offset=(5, 0))],
                    "behind the end": [replace(box, local_offset=4)],
                    "same place": [replace(box, size=(1, 4)), replace(box, size=(2, 4))],
                }
                info.placement = replace(info.placement, boxes=tuple(wrong[change]))

    drivetrain.initialize(
        model=Model(),
        config={"train_batch_size": 1, "toy_tensor_parallel": {}},
        registry=Registry.installed().with_plugins(Wrong),
    )


def train_with(optimizer: str, tp: int) -> None:
    params = {"lr": 1e-3}
    engine = make(1, tp, optimizer={"type": optimizer, "params": params}, **AVERAGED)
    train(engine, 0, 1)
    engine.destroy()


# -- claims ----------------------------------------------------------------------------------------


@STAGES
@pytest.mark.parametrize("clipping", [0.0, 0.1])
@pytest.mark.parametrize(("dp", "tp"), LAYOUTS)
def test_training_and_norm_are_those_of_one_process(
    dp: int, tp: int, clipping: float, stage: int
) -> None:
    losses, norms, model = reference(dp, clipping)
    expected = dict(model.named_parameters())
    for rank, (curve, parts) in enumerate(run_distributed(trained, dp * tp, stage, tp, clipping)):
        points = [(step[rank // tp], norm) for step, norm in zip(losses, norms, strict=True)]
        assert curve == [pytest.approx(point, rel=1e-9) for point in points]
        for name, place, values in parts:
            torch.testing.assert_close(values, expected[name].detach()[place])


@pytest.mark.parametrize("stage", [0, 3])
def test_copies_start_from_the_first_one(stage: int) -> None:
    expected = dict(Model().double().named_parameters())
    for parts in run_distributed(started_apart, 4, stage):
        for name, place, values in parts:
            torch.testing.assert_close(values, expected[name].detach()[place])


@pytest.mark.parametrize(
    ("stage", "to_stage", "to_dp", "to_tp"),
    [(0, 3, 2, 2), (3, 1, 2, 1), (2, 0, 1, 2), (1, 2, 1, 1)],
)
def test_one_copy_is_saved_and_loads_into_other_layouts(
    stage: int, to_stage: int, to_dp: int, to_tp: int, tmp_path: Path
) -> None:
    answers = run_distributed(saved, 4, str(tmp_path), stage, 2)
    times = Counter(box for _, owned in answers for box in owned)
    assert set(times.values()) == {1}
    straight = [curve for curve, _ in answers]
    expected = [
        ((first[0] + second[0]) / 2, first[1])
        for first, second in zip(straight[0], straight[2], strict=True)
    ]
    found = run_distributed(resumed, to_dp * to_tp, str(tmp_path), to_stage, to_tp, 2)
    curves = [found[0], found[to_tp]] if to_dp == 2 else [found[0], found[0]]
    for step, (first, second) in enumerate(zip(*curves, strict=True)):
        assert ((first[0] + second[0]) / 2, first[1]) == pytest.approx(expected[step], rel=1e-9)


def test_stages_of_a_pipeline_count_each() -> None:
    assert run_distributed(norm_of_stages, 2, Stages) == pytest.approx([5 * 5**0.5] * 2)


def test_ranks_with_other_parameters_must_say_so() -> None:
    with pytest.raises(RanksFailedError) as raised:
        run_distributed(norm_of_stages, 2, Axes)
    for text in ("layer0.weight", "absent on rank 1", "along pp", "ParameterInfo.distinct"):
        assert text in str(raised.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("no placement", "blocks.0.up.weight.shape is [3, 4] on rank 0, [2, 4] on rank 1"),
        ("other whole", "blocks.0.up.weight.whole shape is [7, 4] on rank 0, [8, 4] on rank 1"),
        ("overlap", "parameter blocks.0.up.weight: mesh axes ('data', 'world', 'tp') overlap"),
        *((c, "cannot be what its placement") for c in ("outside", "behind the end", "same place")),
    ],
)
def test_placements_that_cannot_be_are_refused(change: str, text: str) -> None:
    with pytest.raises(RanksFailedError) as raised:
        run_distributed(initialize_with, 2, change)
    assert text in str(raised.value)


@pytest.mark.parametrize("optimizer", ["Muon", "Lamb"])
def test_rules_over_whole_tensors_refuse_parts(optimizer: str) -> None:
    run_distributed(train_with, 2, optimizer, 1)
    with pytest.raises(RanksFailedError) as raised:
        run_distributed(train_with, 2, optimizer, 2)
    name = "blocks.1.down.weight [4, 5]"
    text = f"{optimizer} needs whole tensors, but of parameter {name} each rank along tp has a part"
    assert text in str(raised.value)

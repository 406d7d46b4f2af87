"""Students begin with a teacher's layers and learn from what it computes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compressed_models import batches, group, method, net
from drivetrain_compression import (
    Distillation,
    init_compression,
    redundancy_clean,
    student_initialization,
)
from drivetrain_compression.deepspeed.compress import init_compression as from_script
from test_smaller_in_training import BASE, engine_of
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.testing import run_distributed


def reduction(**keys: Any) -> dict[str, Any]:
    base = {
        "enabled": True,
        "keep_number_layer": 2,
        "module_name_prefix": "layers",
        "teacher_layer": [1, 3],
        "other_module_name": ["embed", "head"],
    }
    return {"compression_training": {"layer_reduction": {**base, **keys}}}


def test_a_student_begins_with_the_chosen_layers_of_its_teacher() -> None:
    teacher, student = net(layers=4), net(layers=2)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(2).add_(1)
    assert init_compression(student, reduction(), teacher_model=teacher) is student
    wanted = copy.deepcopy(teacher)
    wanted.layers = nn.ModuleList([wanted.layers[1], wanted.layers[3]])
    for key, value in wanted.state_dict().items():
        assert torch.equal(student.state_dict()[key], value)
    student.layers[0].up.weight.data.zero_()
    assert teacher.layers[1].up.weight.abs().sum() > 0
    again = student_initialization(net(layers=2), teacher, reduction())
    assert torch.equal(again.layers[1].up.weight, teacher.layers[3].up.weight)


@pytest.mark.parametrize(
    ("keys", "student", "message"),
    [
        ({"teacher_layer": [1, 4]}, 2, "teacher_layer: 4, but the teacher has layers 0 to 3"),
        ({}, 3, "the student has 3 layers in layers, but teacher_layer names 2"),
        ({"other_module_name": ["pooler"]}, 2, "student .Net. has no module 'pooler'"),
        ({"module_name_prefix": "blocks"}, 2, "student .Net. has no module 'blocks'"),
        ({"keep_number_layer": 3}, 3, "keep_number_layer is 3, but teacher_layer names 2"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    keys: dict[str, Any], student: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        init_compression(net(layers=student), reduction(**keys), teacher_model=net(layers=4))


def test_a_teacher_of_another_width_is_refused_and_nothing_is_copied() -> None:
    student, before = net(), net()
    with pytest.raises(ConfigError, match=r"layers.0.query.weight is \[8, 8\] .* \[16, 16\]"):
        init_compression(student, reduction(), teacher_model=net(layers=4, width=16))
    for a, b in zip(student.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ConfigError, match="teacher_model is required"):
        init_compression(student, reduction())
    with pytest.raises(ConfigError, match=r"layer_reduction needs a teacher"):
        engine_of(reduction()["compression_training"])


GROUPS = {"g": group(["up"], dense_ratio=0.5)}
TERMS = [
    {"student": "head", "loss": "soft_cross_entropy", "weight": 0.5, "temperature": 2.0},
    {"student": "layers.0", "teacher": "layers.1", "weight": 0.25},
    {"student": "layers.1", "teacher": "layers.3", "weight": 0.25},
]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_terms_of_a_teacher_are_added_to_the_loss(accumulation: int) -> None:
    teacher, student, reference = net(layers=4), net(), net()
    with torch.no_grad():
        teacher.embed.weight.mul_(1.5)
    engine = drivetrain.initialize(
        model=student, config={**BASE, "gradient_accumulation_steps": accumulation}
    )[0]
    distillation = Distillation(student, teacher, TERMS)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.3)

    def hidden(model: Any, tokens: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        x, found = model.embed(tokens), []
        for layer in model.layers:
            x = layer(x)
            found.append(x)
        return found, model.head(x)

    for number, (tokens, targets) in enumerate(batches(6)):
        loss = engine(tokens, targets)
        engine.backward(loss)
        engine.step()
        own, logits = hidden(reference, tokens)
        with torch.no_grad():
            given, wanted = hidden(teacher, tokens)
        soft = -(F.softmax(wanted / 2, -1) * F.log_softmax(logits / 2, -1)).sum(-1).mean() * 4
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten()) + 0.5 * soft
        for mine, his in ((own[0], given[1]), (own[1], given[3])):
            total = total + 0.25 * (mine - his).square().mean()
        (total / accumulation).backward()
        if (number + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(student.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-10, atol=1e-12, msg=name)
    distillation.close()
    assert not student._forward_pre_hooks


MOS = [
    {"student": "head", "loss": "kl", "weight": 0.5, "temperature": 2.0, "until_step": 2},
    {"student": "layers.1", "teacher": "layers.3", "until_step": 4, "decay_steps": 3},
]
WEIGHTS = ([0.5, 0.5, 0, 0, 0, 0], [1, 1, 2 / 3, 1 / 3, 0, 0])
"""Of both terms in each step, worked out by hand."""


def distilled(terms: list[dict[str, Any]] = MOS, **keys: Any) -> dict[str, Any]:
    own = {**reduction(**keys)["compression_training"]}
    return {
        **BASE,
        "compression_training": {**own, "distillation": {"enabled": True, "terms": terms}},
    }


def test_a_teacher_is_followed_until_a_step_and_runs_no_longer() -> None:
    teacher, student, reference = net(layers=4), net(), net()
    with torch.no_grad():
        teacher.embed.weight.mul_(1.5)
    for target in (student, reference):
        init_compression(target, reduction(), teacher_model=teacher)
        redundancy_clean(target)
    ran: list[int] = []
    config = distilled()
    init_compression(student, config, teacher_model=teacher)
    engine = drivetrain.initialize(model=student, config=config)[0]
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.3)

    def through(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = model.embed(tokens)
        for layer in model.layers:
            x = layer(x)
        return x, model.head(x)

    for step, (tokens, targets) in enumerate(batches(6)):
        with torch.no_grad():
            given, wanted = through(teacher, tokens)
        note = teacher.register_forward_pre_hook(lambda *_, step=step: ran.append(step))
        engine.backward(engine(tokens, targets))
        engine.step()
        note.remove()
        own, logits = through(reference, tokens)
        logs = F.log_softmax(logits / 2, -1)
        soft = F.kl_div(logs, F.softmax(wanted / 2, -1), reduction="none").sum(-1).mean() * 4
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss = loss + WEIGHTS[0][step] * soft + WEIGHTS[1][step] * (own - given).square().mean()
        assert engine.last_report.loss == pytest.approx(loss.item(), rel=1e-6)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, a), b in zip(student.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-10, atol=1e-12, msg=name)
    assert ran == [0, 1, 2, 3]
    engine.destroy()
    redundancy_clean(student)
    assert not student._forward_pre_hooks


def test_a_run_that_goes_on_follows_its_teacher_for_the_steps_that_are_left(tmp_path: Path) -> None:
    teacher, ends = net(layers=4), []
    for resumes in (False, True):
        student = init_compression(net(), distilled(), teacher_model=teacher)
        engine = drivetrain.initialize(model=student, config=distilled())[0]
        if resumes:
            engine.load_checkpoint(str(tmp_path))
        for step, (tokens, targets) in enumerate(batches(6)):
            if resumes and step < 3:
                continue
            engine.backward(engine(tokens, targets))
            engine.step()
            if not resumes and step == 2:
                engine.save_checkpoint(str(tmp_path))
        ends.append([p.detach().clone() for p in student.parameters()])
        engine.destroy()
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([], "it is enabled, so terms are required"),
        ([{"student": "head", "decay_steps": 2}], "decay_steps is 2, but until_step: there is no"),
        ([{"student": "head", "until_step": 2, "decay_steps": 3}], "is 3, but until_step: 2"),
        ([{"student": "head", "loss": "l1"}], "'mse', 'soft_cross_entropy' or 'kl'"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(terms: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        drivetrain.Plan.build(distilled(terms))
    with pytest.raises(ConfigError, match=message):
        init_compression(net(), distilled(terms), teacher_model=net(layers=4))


@pytest.mark.parametrize("call", [init_compression, from_script])
def test_a_teacher_that_is_an_engine_runs_as_one(
    call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = drivetrain.initialize(model=net(layers=4), config=BASE)[0]
    ran, forward = [], type(teacher).forward

    def noting(engine: Any, *args: Any, **kwargs: Any) -> Any:
        ran.append(engine is teacher)
        return forward(engine, *args, **kwargs)

    config = distilled()
    student = call(net(), config, teacher_model=teacher)
    assert torch.equal(student.layers[1].up.weight, teacher.module.layers[3].up.weight)
    engine = drivetrain.initialize(model=student, config=config)[0]
    monkeypatch.setattr(type(teacher), "forward", noting)
    tokens, targets = batches(1)[0]
    engine.backward(engine(tokens, targets))
    assert sorted(ran) == [False, True]


def test_distillation_needs_a_teacher_that_is_whole() -> None:
    config = distilled(enabled=False)
    with pytest.raises(ConfigError, match="distillation is enabled, so teacher_model is required"):
        init_compression(net(), config)
    with pytest.raises(ConfigError, match=r"compression_training.distillation needs a teacher"):
        drivetrain.initialize(model=net(), config=config)
    plan = {**config, "pipeline": {"stages": 2}}
    pytest.importorskip("drivetrain_pipeline")
    with pytest.raises(ConfigError, match="distillation: a stage has part of the student"):
        drivetrain.Plan.build(plan, world_size=2)


class Attends(nn.Module):
    """Returns its attention scores beside its output, as models of Transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = (self.query(x) @ x.transpose(1, 2)).softmax(-1)
        return scores @ x, scores


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attends = Attends()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.attends(x)[0].square().mean()
        return out


def test_scores_of_attention_are_learned_through_the_output_beside_them() -> None:
    torch.manual_seed(1)
    student, teacher = Small().double(), Small().double()
    reference = copy.deepcopy(student)
    engine = drivetrain.initialize(model=student, config=BASE)[0]
    Distillation(student, teacher, [{"student": "attends", "output": 1, "weight": 3.0}])
    x = torch.randn(4, 5, 4, dtype=torch.float64)
    engine.backward(engine(x))
    engine.step()
    out, scores = reference.attends(x)
    loss = out.square().mean() + 3 * (scores - teacher.attends(x)[1].detach()).square().mean()
    loss.backward()
    weight = reference.attends.query.weight
    assert weight.grad is not None
    wanted = weight - 0.3 * weight.grad
    torch.testing.assert_close(student.attends.query.weight, wanted, rtol=1e-11, atol=1e-13)


def test_distillation_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the teacher has no module 'layers.3'"):
        Distillation(net(), net(), [{"student": "layers.0", "teacher": "layers.3"}])
    with pytest.raises(ConfigError, match="no terms"):
        Distillation(net(), net(), [])
    student = net()
    Distillation(student, net(width=16, layers=2), [{"student": "layers.0"}])
    with pytest.raises(TrainingError, match=r"layers.0 returns \[4, 5, 8\] .* \[4, 5, 16\]"):
        student(*batches(1)[0])
    alone = net()
    Distillation(alone, net(), [{"student": "layers.0"}])
    with pytest.raises(TrainingError, match="the student has none"):
        alone(*batches(1)[0])


def test_a_script_compresses_before_it_makes_the_optimizer() -> None:
    section = {
        "row_pruning": method(
            {"method": "topk", "schedule_offset": 0},
            {"g": group([r"\.up"], [[r"\.down"]], dense_ratio=0.5)},
        )
    }
    config = {**BASE, "compression_training": section}
    model = init_compression(net(), config)
    engine = drivetrain.initialize(
        model=model, model_parameters=list(model.parameters()), config=config
    )[0]
    for tokens, targets in batches(2):
        engine.backward(engine(tokens, targets))
        engine.step()
    engine.eval()
    tokens, targets = batches(1)[0]
    wanted = engine(tokens, targets).item()
    engine.destroy()
    cleaned = redundancy_clean(model)
    assert cleaned.layers[0].up.out_features == 16
    assert cleaned(tokens, targets).item() == pytest.approx(wanted, rel=1e-12)
    with pytest.raises(ConfigError, match="is not compressed: give the config"):
        redundancy_clean(model)


def test_a_compressed_model_switches_the_plugin_on_by_itself() -> None:
    section = {"sparse_pruning": method({"schedule_offset": 1}, GROUPS)}
    model = init_compression(net(), {"compression_training": section})
    engine = drivetrain.initialize(model=model, config=BASE)[0]
    tokens, targets = batches(1)[0]
    engine.backward(engine(tokens, targets))
    assert bool(model.layers[0].up.sparse_pruning_mask.all())
    engine.step()
    assert int(model.layers[0].up.sparse_pruning_mask.sum()) == 128


def test_masks_that_were_loaded_are_what_a_model_is_cleaned_by(tmp_path: Path) -> None:
    section = {"sparse_pruning": method({"schedule_offset": 0}, GROUPS)}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"compression_training": section}))
    engine = engine_of(section)
    for tokens, targets in batches(3):
        engine.backward(engine(tokens, targets))
        engine.step()
    engine.eval()
    tokens, targets = batches(1)[0]
    wanted = engine(tokens, targets).item()
    other = init_compression(net(), path)
    other.load_state_dict(engine.module.state_dict())
    redundancy_clean(other)
    assert other(tokens, targets).item() == pytest.approx(wanted, rel=1e-12)
    fresh = redundancy_clean(net(), path)
    assert (fresh.layers[0].up.weight == 0).sum() == 128
    path.write_text('{"a": 1, "a": 2}')
    with pytest.raises(ConfigError, match="the key 'a' is there twice"):
        init_compression(net(), path)


def cleaned_twice(stage: int) -> tuple[list[float], list[float], list[int], str]:
    """Losses before and after cleaning a copy and the model, rows left, and what is refused."""
    section = {
        "row_pruning": method(
            {"method": "topk", "schedule_offset": 0},
            {"g": group([r"\.up"], [[r"\.down"]], dense_ratio=0.5)},
        ),
        "sparse_pruning": method(
            {"schedule_offset": 0}, {"g": group([r"\.down"], dense_ratio=0.5)}
        ),
    }
    zero = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    shards = zero if stage else {}  # which takes another package
    job = Job.open(Plan.build({**BASE, "compression_training": section, **shards}))
    engine = job.engine(net())
    tokens, targets = batches(1)[0]
    before, after, rows, refused = [], [], [], ""

    def train_a_step() -> None:
        engine.train()
        engine.backward(engine(tokens, targets))
        engine.step()
        engine.eval()
        before.append(engine(tokens, targets).item())

    train_a_step()
    with drivetrain.whole(engine.module):
        cleaned = copy.deepcopy(engine.module)
    redundancy_clean(cleaned)
    after.append(cleaned(tokens, targets).item())
    rows.append(cleaned.layers[0].up.out_features)
    train_a_step()
    if any(hasattr(parameter, "drivetrain_handle") for parameter in engine.module.parameters()):
        with pytest.raises(ConfigError) as error:
            redundancy_clean(engine.module)
        refused = str(error.value)
    engine.destroy()
    cleaned = redundancy_clean(engine.module)
    after.append(cleaned(tokens, targets).item())
    rows.append(cleaned.layers[0].up.out_features)
    job.close()
    return before, after, rows, refused


def cleaned_too_late() -> str:
    """What is said where the engine's job is closed with it."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    section = {"sparse_pruning": method({"schedule_offset": 0}, GROUPS)}
    engine = engine_of(section, zero_optimization=zero)
    engine(*batches(1)[0])
    engine.destroy()
    with pytest.raises(ConfigError) as error:
        redundancy_clean(engine.module)
    return str(error.value)


@pytest.mark.long
def test_shards_of_a_closed_job_are_not_cleaned() -> None:
    for refused in run_distributed(cleaned_too_late, 2):
        assert "destroyed with its job" in refused


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [(0, 1), *(pytest.param(stage, 2, marks=pytest.mark.long) for stage in range(4))],
)
def test_a_copy_made_whole_and_the_module_of_an_ended_engine_are_cleaned(
    stage: int, ranks: int
) -> None:
    every = [cleaned_twice(stage)] if ranks == 1 else run_distributed(cleaned_twice, ranks, stage)
    for before, after, rows, refused in every:
        assert after == pytest.approx(before, rel=1e-12)
        assert before[0] != before[1]
        assert rows == [16, 16]
        assert ("kept in shards by an engine: clean" in refused) == (stage == 3)

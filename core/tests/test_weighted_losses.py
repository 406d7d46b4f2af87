"""Which loss the gradient is of: means over parts of sequences, shards and micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.contracts import (
    BucketSpec,
    BucketView,
    Hyper,
    Plugin,
    Purpose,
    Section,
    Sections,
    StateSpec,
    StepReport,
    Tag,
    UpdateRule,
    hookimpl,
)
from drivetrain.engine.engine import Engine
from drivetrain.errors import TrainingError
from drivetrain.job.job import Job
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed
from drivetrain.testing.parts import SharedSequences

SAMPLES, LENGTH, WIDTH, STEPS = 2, 6, 3, 4
RATE = 0.05
NAN = float("nan")


class Tokens(nn.Module):
    """A model of single tokens; those whose target is NaN do not count."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(WIDTH, 5, generator=generator, dtype=torch.float64))
        self.out = nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of squared errors, and number of tokens that count."""
        counts = ~y.isnan()
        error = torch.tanh(x @ self.weight) @ self.out - y.nan_to_num()
        return (error.square() * counts).sum(), counts.sum()


class Means(Tokens):
    """Answers the mean, with its weight."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        total, count = super().forward(x, y)
        return {"loss": total / count.clamp(min=1), "loss_weight": count}


class ToySequenceSection(Section):
    pass


class ToySequence(Plugin):
    """Each rank of a sequence group computes with its part of the sequence; keeps reports."""

    name = "toy_sequence"
    sections: ClassVar[Sections] = {"toy_sequence": ToySequenceSection}
    reports: ClassVar[list[StepReport]] = []

    @hookimpl
    def prepare_inputs(
        self, engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        size, place = engine.job.mesh.size("sp"), engine.job.mesh.coordinate("sp")
        return tuple(whole.chunk(size, dim=1)[place] for whole in args), kwargs

    @hookimpl
    def step_end(self, report: StepReport) -> None:
        self.reports.append(report)


class OwnSum(UpdateRule):
    """Gradient descent that sums gradients itself."""

    def __init__(self, job: Job) -> None:
        self.defaults = {"lr": RATE}
        self._job = job

    def states(self, bucket: BucketSpec) -> Sequence[StateSpec]:
        return ()

    def wants_reduced(self, step: int) -> bool:
        return False

    def update(self, bucket: BucketView, hyper: Hyper, scale: float | torch.Tensor) -> None:
        term = bucket.gradient * scale
        tag = Tag(Purpose.STATE, bucket.key, "own sum")
        self._job.communicator.all_reduce(term, bucket.reduction, tag)
        bucket.weights.sub_(term, alpha=hyper["lr"])


def registry() -> Registry:
    answer = Registry.installed().with_plugins(ToySequence, SharedSequences)
    answer.add("optimizers", "OwnSum", lambda params, job: OwnSum(job))
    return answer


def data(step: int, micro: int, shard: int, *, uneven: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """One micro-batch of one data shard: x [samples, length, width], y [samples, length]."""
    generator = torch.Generator().manual_seed(1 + 100 * step + 10 * micro + shard)
    x = torch.randn(SAMPLES, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    y = torch.sin(3 * x.sum(-1))
    if uneven:
        y[torch.rand(y.shape, generator=generator) < 0.4] = NAN
        y[0, : LENGTH // 2] = NAN
        if (step + micro) % 2:  # the first part of the sequence has nothing to learn from
            y[:, : LENGTH // 2] = NAN
    return x, y


def make(keys: Mapping[str, Any] | None = None, model: type[nn.Module] = Tokens) -> Engine:
    engine, *_ = drivetrain.initialize(
        model=model(),
        config={
            "train_micro_batch_size_per_gpu": SAMPLES,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
            "toy_sequence": {},
            **(keys or {}),
        },
        registry=registry(),
    )
    return engine


Curve = tuple[list[float], list[list[float]]]
"""Loss that is reported for each step, and parameters at the end."""


def trained(how: str, keys: dict[str, Any]) -> Curve:
    engine = make(keys, Means if how == "train_batch" else Tokens)
    ToySequence.reports.clear()
    micros, shard = engine.gradient_accumulation_steps(), engine.job.mesh.coordinate("dp")
    ranks = engine.job.mesh.size("data")
    losses = []
    for step in range(STEPS):
        batches = [data(step, m, shard, uneven=how != "means") for m in range(micros)]
        if how == "train_batch":
            losses.append(engine.train_batch(iter(batches)).item())
            continue
        everything = sum(
            (~data(step, m, s, uneven=True)[1].isnan()).sum()
            for m in range(micros)
            for s in range(engine.job.mesh.size("dp"))
        )
        for batch in batches:
            total, count = engine(*batch)
            if how == "means":
                engine.backward(total / count)
            elif how == "divided":  # as Transformers' trainer does
                engine.backward(total / everything * ranks, scale_wrt_gas=False)
            elif how == "scaled":
                engine.scale(total / count.clamp(min=1), weight=int(count)).backward()
            else:
                engine.backward(total / count if count else 0 * total, weight=count)
            engine.step()
    reported = [report.loss for report in ToySequence.reports]
    if losses:
        assert losses == pytest.approx(reported, rel=1e-12)
    parameters = [p.detach().flatten().tolist() for p in engine.module.parameters()]
    engine.destroy()
    return reported, parameters


def trained_each_way(hows: Sequence[str], keys: dict[str, Any]) -> list[Curve]:
    return [trained(how, keys) for how in hows]


def expected(shards: int, micros: int, factor: float = 1.0, *, uneven: bool) -> Curve:
    """The same in one process: the mean over all tokens of a step."""
    model, losses = Tokens(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        parts = [
            model(*data(step, m, s, uneven=uneven)) for m in range(micros) for s in range(shards)
        ]
        loss = sum(total for total, _ in parts) / sum(count for _, count in parts)
        optimizer.zero_grad()
        (factor * loss).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach().flatten().tolist() for p in model.parameters()]


def assert_alike(found: Sequence[Curve], reference: Curve) -> None:
    for losses, parameters in found:
        assert losses == pytest.approx(reference[0], rel=1e-12)
        for mine, other in zip(parameters, reference[1], strict=True):
            assert mine == pytest.approx(other, rel=1e-10)


@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize(("dp", "sp"), [(1, 2), (2, 1), (2, 2)])
def test_training_is_that_of_the_mean_over_all_tokens(dp: int, sp: int, micros: int) -> None:
    keys = {"sequence_parallel_size": sp, "gradient_accumulation_steps": micros}
    uneven = ("weights", "scaled", "divided", "train_batch")
    for curves in run_distributed(trained_each_way, dp * sp, ("means", *uneven), keys):
        assert_alike(curves[:1], expected(dp, micros, uneven=False))
        assert_alike(curves[1:], expected(dp, micros, uneven=True))


@pytest.mark.parametrize("how", ["means", "weights"])
def test_sums_of_data_shards_are_sums_of_means_over_sequences(how: str) -> None:
    keys = {"sequence_parallel_size": 2, "gradient_allreduce_op": "sum"}
    found = run_distributed(trained, 4, how, keys)
    reference = expected(2, 1, factor=2.0, uneven=how == "weights")
    assert_alike(found, reference)


@pytest.mark.parametrize(
    "keys",
    [
        {"prescale_gradients": True},
        {"gradient_predivide_factor": 3.0},
        {"optimizer": {"type": "OwnSum"}},
        {"managed_gradient_accumulation": False},
    ],
    ids=str,
)
def test_weights_hold_however_gradients_travel(keys: dict[str, Any]) -> None:
    keys = {"sequence_parallel_size": 2, **keys}
    assert_alike(run_distributed(trained, 2, "weights", keys), expected(1, 1, uneven=True))


# -- one rank --------------------------------------------------------------------------------------


def parameters(engine: Engine) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in engine.module.parameters()]).clone()


def gradient(terms: Sequence[tuple[float, int]]) -> torch.Tensor:
    """Of the weighted mean of micro-batches, given as (weight, which one)."""
    model = Tokens()
    total = sum(weight for weight, _ in terms)
    for weight, micro in terms:
        loss, count = model(*data(0, micro, 0, uneven=False))
        (loss / count * (weight / total)).backward()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(found)


def backward(engine: Engine, micro: int, weight: Any = None) -> None:
    total, count = engine(*data(0, micro, 0, uneven=False))
    engine.backward(total / count, weight=weight)


def test_a_window_that_has_grown_is_the_weighted_mean_of_what_is_in_it() -> None:
    engine = make({"gradient_accumulation_steps": 4})
    before = parameters(engine)
    for micro in range(3):
        backward(engine, micro, 1.0 + micro)
        engine.step()
    engine.set_train_batch_size(2 * SAMPLES)
    backward(engine, 3, 4.0)
    engine.step()
    moved = before - parameters(engine)
    torch.testing.assert_close(moved, RATE * gradient([(1, 0), (2, 1), (3, 2), (4, 3)]))
    engine.destroy()


@pytest.mark.parametrize("drop", ["zero_grad", "drop_window", "skip_step", "rebuild"])
def test_what_was_dropped_has_no_weight(drop: str) -> None:
    engine = make({"gradient_accumulation_steps": 2})
    backward(engine, 0, 5.0)
    if drop == "skip_step":
        engine.skip_step()
    else:
        getattr(engine, drop)()
    before = parameters(engine)
    for micro, weight in ((1, 1.0), (2, torch.tensor(3))):
        backward(engine, micro, weight)
        engine.step()
    moved = before - parameters(engine)
    torch.testing.assert_close(moved, RATE * gradient([(1, 1), (3, 2)]))
    assert engine.last_report is not None
    losses = [Tokens()(*data(0, micro, 0, uneven=False)) for micro in (1, 2)]
    mean = sum(w * (t / n).item() for w, (t, n) in zip((1, 3), losses, strict=True)) / 4
    assert engine.last_report.loss == pytest.approx(mean)
    engine.destroy()


def test_a_window_without_losses_of_its_own_weight_begins_as_it_likes() -> None:
    engine = make()
    for weight in (None, 2.0, None):
        backward(engine, 0, weight)
        engine.step()
    engine.destroy()


def test_the_mean_over_nothing_may_be_nan() -> None:
    engine = make({"gradient_accumulation_steps": 2})
    before = parameters(engine)
    total, count = engine(*data(0, 0, 0, uneven=False))
    engine.backward(total / count + NAN, weight=0)  # a constant, so that gradients are finite
    engine.step()
    backward(engine, 1, 7)
    engine.step()
    torch.testing.assert_close(before - parameters(engine), RATE * gradient([(1, 1)]))
    assert engine.last_report is not None
    assert engine.last_report.loss is not None
    assert engine.last_report.loss < 1e9
    engine.destroy()


def test_the_report_is_of_the_loss_whose_gradient_was_used() -> None:
    """Backward passes over divided losses are terms of a sum, not of a mean."""
    engine = make({"managed_gradient_accumulation": False})
    values = []
    for micro in range(3):
        total, count = engine(*data(0, micro, 0, uneven=False))
        engine.backward(total / count / 3)
        values.append((total / count).item())
    engine.step()
    assert engine.last_report is not None
    assert engine.last_report.loss == pytest.approx(sum(values) / 3)
    engine.destroy()


@pytest.mark.parametrize("scale", [1.0, 128.0])
def test_gradients_that_a_script_reads_in_fp16_are_scaled_back(scale: float) -> None:
    fp16 = {"fp16": {"enabled": True, "loss_scale": scale}} if scale > 1 else {}
    engine, *_ = drivetrain.initialize(
        model=nn.Linear(2, 1, bias=False),
        config={
            "train_batch_size": 1,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
            **fp16,
        },
    )
    weight = engine.module.weight
    before = weight.detach().float().clone()
    for value, count in ((1.0, 3), (2.0, 1)):
        loss = engine(torch.full((1, 2), value, dtype=weight.dtype)).sum()
        engine.backward(loss, weight=count)
    engine.step()
    moved = (before - weight.detach().float()).flatten().tolist()
    assert moved == pytest.approx([1.25, 1.25], rel=2e-3)
    engine.destroy()


# -- refused ---------------------------------------------------------------------------------------


def with_and_without(engine: Engine) -> None:
    backward(engine, 0, 3)
    backward(engine, 0)


def without_and_with(engine: Engine) -> None:
    backward(engine, 0)
    backward(engine, 0, 3)


def bare_and_with(engine: Engine) -> None:
    engine(*data(0, 0, 0, uneven=False))[0].backward()
    backward(engine, 0, 3)


def with_and_bare(engine: Engine) -> None:
    backward(engine, 0, 3)
    engine(*data(0, 0, 0, uneven=False))[0].backward()


def divided_with_weight(engine: Engine) -> None:
    engine.backward(engine(*data(0, 0, 0, uneven=False))[0], scale_wrt_gas=False, weight=3)


def negative(engine: Engine) -> None:
    backward(engine, 0, -1)


def not_a_number(engine: Engine) -> None:
    backward(engine, 0, torch.tensor(NAN))


def of_a_shape(engine: Engine) -> None:
    backward(engine, 0, torch.ones(2))


def assigned(engine: Engine) -> None:
    backward(engine, 0, 3)
    engine.zero_grad()
    engine.states.weighted = True
    for parameter in engine.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    engine.step()


def nothing(engine: Engine) -> None:
    backward(engine, 0, 0)
    engine.step()


@pytest.mark.parametrize(
    ("misuse", "said"),
    [
        (with_and_without, "some losses of this window have weights"),
        (without_and_with, "some losses of this window have weights"),
        (bare_and_with, "some losses of this window have weights"),
        (with_and_bare, "some losses of this window have weights"),
        (divided_with_weight, "scale_wrt_gas=False"),
        (negative, "weight of a loss is a finite number from 0 on, got -1"),
        (not_a_number, "weight of a loss is a finite number from 0 on, got nan"),
        (of_a_shape, r"weight of a loss has shape \(2,\)"),
        (assigned, "nothing tells"),
        (nothing, "weights of the losses of step 1 have no positive sum"),
    ],
)
def test_a_misused_weight_is_refused(misuse: Callable[[Engine], None], said: str) -> None:
    engine = make()
    before = parameters(engine)
    with pytest.raises(TrainingError, match=said):
        misuse(engine)
    assert torch.equal(parameters(engine), before)
    engine.destroy()


def differs(keys: dict[str, Any], how: str) -> str:
    engine = make(keys)
    rank = engine.job.rank
    if how == "one without" or rank == 0:
        backward(engine, 0, 3 if rank == 0 else None)
    try:
        engine.step()
    except TrainingError as error:
        return str(error)
    finally:
        moved = [p.detach().sum().item() for p in engine.module.parameters()]
        engine.destroy()
    return str(moved)


@pytest.mark.parametrize("keys", [{}, {"optimizer": {"type": "OwnSum"}}], ids=["sums", "own sums"])
def test_ranks_that_differ_about_weights_are_told(keys: dict[str, Any]) -> None:
    for said in run_distributed(differs, 2, keys, "one without"):
        assert "weights on some ranks and none on others" in said


def test_a_rank_without_a_backward_adds_nothing() -> None:
    model = Tokens()
    total, count = model(*data(0, 0, 0, uneven=False))
    (total / count).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.data -= RATE * parameter.grad
    moved = [p.detach().sum().item() for p in model.parameters()]
    for said in run_distributed(differs, 2, {}, "one with"):
        assert [float(number) for number in said.strip("[]").split(",")] == pytest.approx(moved)


def drops_alone(drop: str) -> str:
    engine = make()
    said = ""
    try:
        if engine.job.rank == 0:
            backward(engine, 0)
        getattr(engine, drop)()
        backward(engine, 1)
        engine.step()
    except TrainingError as error:
        said = str(error)
    finally:
        engine.destroy()
    return said


def test_ranks_of_which_one_has_a_backward_to_drop_are_told() -> None:
    for said in run_distributed(drops_alone, 2, "zero_grad"):
        assert "that others did not run" in said
    assert run_distributed(drops_alone, 2, "skip_step") == ["", ""]

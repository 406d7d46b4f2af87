"""Stages of a pipeline train like one process: 1F1B, split backward, norms, losses, counters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed
from drivetrain.testing.distributed import RanksFailedError
from drivetrain.testing.pipeline import (
    Curve,
    Layers,
    ToyPipeline,
    data,
    loss_of,
    train_alone,
    train_stages,
)

STEPS, MICRO_BATCHES, RATE, CLIPPING = 3, 4, 0.1, 0.05


def make(stages: int, **changes: Any) -> Engine:
    split = changes.pop("split", "no")
    module = Layers()
    for layer in module.layers[: changes.pop("frozen", 0)]:
        layer.requires_grad_(False)
    engine, *_ = drivetrain.initialize(
        model=module,
        config={
            "train_micro_batch_size_per_gpu": 3,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
            "data_parallel": {"bucket_bytes": 256, "first_bucket_bytes": 128},
            "toy_pipeline": {"stages": stages, "split": split},
            **changes,
        },
        registry=Registry.installed().with_plugins(ToyPipeline),
    )
    engine.get_global_grad_norm()  # from now on it is computed
    return engine


def held(engine: Engine) -> dict[str, torch.Tensor]:
    """This stage's parameters, or their masters."""
    found = {}
    for kind in ("parameter", "master"):
        for f in engine.states.fragments():
            if f.kind == kind:
                found[f.name] = f.read().double().view(f.global_shape).clone()
    return found


def close(engine: Engine) -> None:
    engine.destroy()
    engine.job.close()


def train(stages: int, changes: dict[str, Any]) -> tuple[Curve, dict[str, torch.Tensor], Any]:
    engine = make(stages, **changes)
    curve = train_stages(engine, 0, STEPS, MICRO_BATCHES)
    progress = engine.progress.state_dict()
    answer = curve, held(engine), progress
    close(engine)
    return answer


FP16 = {"fp16": {"enabled": True, "loss_scale": 128.0}}
CLIPPED = {"gradient_clipping": CLIPPING}


@pytest.mark.parametrize(
    ("world", "stages", "changes", "rtol"),
    [
        pytest.param(2, 2, {}, 1e-5, id="two stages"),
        pytest.param(4, 4, CLIPPED, 1e-5, id="four stages, clipped"),
        pytest.param(4, 2, {}, 1e-5, id="two stages, copies over dp"),
        pytest.param(2, 2, {"split": "backward", **CLIPPED}, 1e-5, id="weights by a backward"),
        pytest.param(4, 2, {"split": "grad"}, 1e-5, id="weights by autograd.grad"),
        pytest.param(4, 2, {"split": "stored"}, 1e-5, id="weights by hand"),
        pytest.param(2, 2, FP16, 3e-3, id="fp16"),
        pytest.param(2, 2, {**FP16, "split": "grad"}, 3e-3, id="fp16, weights apart"),
        pytest.param(2, 2, {"bf16": {"enabled": True}}, 3e-2, id="bf16"),
    ],
)
def test_stages_train_like_one_process(
    world: int, stages: int, changes: dict[str, Any], rtol: float
) -> None:
    clipping = changes.get("gradient_clipping", 0.0)
    expected, trained = train_alone(STEPS, MICRO_BATCHES, world // stages, RATE, clipping)
    names: set[str] = set()
    counters = []
    for curve, parameters, progress in run_distributed(train, world, stages, changes):
        for point, want in zip(curve, expected, strict=True):
            assert point == pytest.approx(want, rel=rtol)
        for name, values in parameters.items():
            torch.testing.assert_close(values, trained[name], rtol=rtol, atol=rtol)
        names |= set(parameters)
        counters.append(progress)
    assert names == set(trained)
    assert all(each == counters[0] for each in counters)
    assert counters[0]["micro_steps"] == STEPS * MICRO_BATCHES
    assert counters[0]["samples"] == STEPS * MICRO_BATCHES * 3 * (world // stages)


def save_after_one(folder: str, stages: int, split: str) -> Curve:
    engine = make(stages, split=split)
    train_stages(engine, 0, 1, MICRO_BATCHES)
    engine.save_checkpoint(folder)
    curve = train_stages(engine, 1, STEPS, MICRO_BATCHES)
    close(engine)
    return curve


def load_and_go_on(folder: str, stages: int) -> Curve:
    engine = make(stages)
    engine.load_checkpoint(folder)
    curve = train_stages(engine, 1, STEPS, MICRO_BATCHES)
    close(engine)
    return curve


@pytest.mark.parametrize(("saved", "loaded"), [(2, 4), (4, 1)])
def test_stages_load_what_other_stages_have_saved(saved: int, loaded: int, tmp_path: Path) -> None:
    straight = run_distributed(save_after_one, saved, str(tmp_path), saved, "grad")
    for resumed in run_distributed(load_and_go_on, loaded, str(tmp_path), loaded):
        assert resumed == [pytest.approx(point, rel=1e-5) for point in straight[0]]


def evaluate(stages: int) -> float:
    engine = make(stages)
    mesh = engine.job.mesh
    x, y = data(1, 1, mesh.size("dp"))[0][0][mesh.coordinate("dp")]
    loss = engine.eval_batch(iter([(x.float(), y)])).item()
    close(engine)
    return loss


def test_every_rank_has_the_loss_of_an_evaluation() -> None:
    expected = [loss_of(Layers().double()(x), y).item() for x, y in data(1, 1, 2)[0][0]]
    for loss in run_distributed(evaluate, 4, 2):
        assert loss == pytest.approx(sum(expected) / 2, rel=1e-6)


def a_stage_fails(stages: int) -> None:
    engine = make(stages)
    if engine.job.rank == 1:
        engine.module.register_forward_hook(lambda *_: 1 / 0)
    train_stages(engine, 0, 1, MICRO_BATCHES)


def test_an_error_of_one_stage_reaches_all_by_name() -> None:
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(a_stage_fails, 2, 2, timeout=60)
    errors = caught.value.errors
    assert "ZeroDivisionError" in errors[1].error
    assert "rank 1 failed: ZeroDivisionError" in errors[0].error


def weighted(stages: int) -> dict[str, torch.Tensor]:
    """The last stage alone knows weights; every stage divides by them, and all see the loss."""
    engine = make(stages)
    (step,) = data(1, MICRO_BATCHES, 1)
    backward = engine.backward
    weights = iter(range(1, MICRO_BATCHES + 1))
    engine.backward = lambda loss, **kw: backward(loss, weight=next(weights), **kw)  # type: ignore[method-assign]
    engine.train_batch(iter([(x.float(), y) for ((x, y),) in step]))
    assert engine.last_report is not None
    terms = [loss_of(Layers().double()(x), y).item() for ((x, y),) in step]
    expected = sum(n * term for n, term in enumerate(terms, 1)) / 10
    assert engine.last_report.loss == pytest.approx(expected, rel=1e-6)
    found = held(engine)
    close(engine)
    return found


def test_all_stages_divide_by_the_weights_of_the_last() -> None:
    model = Layers().double()
    (step,) = data(1, MICRO_BATCHES, 1)
    loss = sum(n * loss_of(model(x), y) for n, ((x, y),) in enumerate(step, 1)) / 10
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    for found in run_distributed(weighted, 2, 2):
        for name, values in found.items():
            parameter = model.get_parameter(name)
            expected = parameter - RATE * parameter.grad
            torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


def a_stage_trains_nothing() -> None:
    make(2, frozen=2)


def test_a_stage_that_trains_nothing_is_refused_on_all() -> None:
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(a_stage_trains_nothing, 2, timeout=60)
    for error in caught.value.errors.values():
        assert "requires_grad=False, so it has nothing to train" in error.error


def one_stage_overflows() -> list[tuple[float, bool, int, int]]:
    """After two steps, the first with a gradient on stage 0 that is no number."""
    fp16 = {"enabled": True, "initial_scale_power": 7, "hysteresis": 1}
    engine = make(2, fp16=fp16)
    seen = []
    if engine.job.rank == 0:
        bias = next(p for p in engine.module.parameters() if p.dim() == 1)
        hook = bias.register_hook(lambda gradient: gradient * float("inf"))
    for step in range(2):
        if engine.job.rank == 0:  # the first stage alone sees tokens
            engine._reporter.count_tokens((torch.ones(2, 5, dtype=torch.int64),), {})
        (micro,) = data(step + 1, MICRO_BATCHES, 1)[step:]
        engine.train_batch(iter([(x.float(), y) for ((x, y),) in micro]))
        if engine.job.rank == 0 and not step:
            hook.remove()
        progress = engine.progress
        seen.append(
            (
                engine.loss_scaler.scale_value,
                engine.was_step_applied(),
                progress.skipped_steps,
                progress.tokens,
            )
        )
    close(engine)
    return seen


def test_stages_keep_one_loss_scale_and_count_alike() -> None:
    for seen in run_distributed(one_stage_overflows, 2):
        assert seen == [(64.0, False, 1, 10), (64.0, True, 1, 20)]

"""Backwards as the stages of a pipeline run them: from outputs, and several before one step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.errors import TrainingError

RATE, MICRO_BATCHES = 0.1, 4
PRECISIONS = [
    pytest.param({}, torch.float32, 1.0, 1e-6, id="fp32"),
    pytest.param({"bf16": {"enabled": True}}, torch.bfloat16, 1.0, 2e-2, id="bf16"),
    pytest.param(
        {"fp16": {"enabled": True, "loss_scale": 128.0}}, torch.float16, 128.0, 2e-3, id="fp16"
    ),
]


class Stage(nn.Module):
    """Returns hidden values, a second output nested beside them, and one without a graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"hidden": self.first(x).tanh(), "rest": (self.second(x), x.detach() > 0)}


@contextmanager
def engine_of(module: nn.Module, **changes: Any) -> Iterator[Engine]:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": RATE}},
        **changes,
    }
    engine, *_ = drivetrain.initialize(model=module, config=config)
    yield engine
    engine.destroy()
    engine.job.close()


def inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, generator=generator).to(dtype) for _ in range(MICRO_BATCHES)]


def loss_of(outputs: dict[str, Any]) -> torch.Tensor:
    """What later stages do with the outputs."""
    hidden, (rest, mask) = outputs["hidden"].double(), outputs["rest"]
    return hidden.square().mean() + (rest.double().sin() * mask[:, :2]).mean()


def gradients_of(outputs: dict[str, Any], scale: float) -> dict[str, Any]:
    """What the next stage sends back: derivatives of the scaled loss."""
    hidden = outputs["hidden"].detach().requires_grad_()
    rest = outputs["rest"][0].detach().requires_grad_()
    loss = loss_of({"hidden": hidden, "rest": (rest, outputs["rest"][1])}) * scale
    first, second = torch.autograd.grad(loss, [hidden, rest])
    return {"hidden": first, "rest": (second, None)}


def updated(module: nn.Module, steps: int) -> dict[str, torch.Tensor]:
    """The parameters after plain steps in float64."""
    module = copy.deepcopy(module).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack([loss_of(module(x)) for x in inputs(torch.float64)]).mean().backward()
        optimizer.step()
    return dict(module.named_parameters())


def masters(engine: Engine) -> dict[str, torch.Tensor]:
    found = {f.name: f.read() for f in engine.states.fragments() if f.kind == "parameter"}
    return found | {f.name: f.read() for f in engine.states.fragments() if f.kind == "master"}


@pytest.mark.parametrize(("changes", "dtype", "scale", "rtol"), PRECISIONS)
@pytest.mark.parametrize("through_engine", [True, False], ids=["engine", "module"])
def test_backwards_from_outputs_update_like_the_loss_behind_them(
    changes: dict[str, Any], dtype: torch.dtype, scale: float, rtol: float, through_engine: bool
) -> None:
    module = Stage()
    expected = updated(module, steps=2)
    with engine_of(module, **changes) as engine:
        for step in (1, 2):
            forward = engine if through_engine else engine.module
            made = [forward(x) for x in inputs(dtype)]
            for number, outputs in enumerate(made, 1):
                last = number == MICRO_BATCHES
                engine.backward_from(outputs, gradients_of(outputs, scale), last=last)
            assert engine.global_steps == step - 1
            engine.step(micro_batches=MICRO_BATCHES)
            assert engine.was_step_applied()
            assert (engine.global_steps, engine.micro_steps) == (step, step * MICRO_BATCHES)
            assert engine.global_samples == step * MICRO_BATCHES * 2
        assert engine.last_report is not None
        assert engine.last_report.loss is None
        for name, values in masters(engine).items():
            torch.testing.assert_close(
                values.double().view_as(expected[name]), expected[name], rtol=rtol, atol=rtol
            )


def test_the_last_stage_runs_its_micro_batches_before_one_step() -> None:
    module = nn.Linear(3, 1)
    reference = copy.deepcopy(module).double()
    torch.stack([reference(x).square().mean() for x in inputs(torch.float64)]).mean().backward()
    with engine_of(module) as engine:
        losses = [engine(x).square().mean() for x in inputs()]
        for number, loss in enumerate(losses, 1):
            engine.backward(loss, last=number == MICRO_BATCHES)
        engine.step(micro_batches=MICRO_BATCHES)
        assert engine.last_report is not None
        assert engine.last_report.loss == pytest.approx(
            sum(loss.item() for loss in losses) / MICRO_BATCHES
        )
        expected = reference.weight - RATE * reference.weight.grad
        torch.testing.assert_close(module.weight.double(), expected, rtol=1e-6, atol=1e-7)


def test_a_window_may_end_in_steps_of_different_numbers_of_micro_batches() -> None:
    with engine_of(nn.Linear(3, 1)) as engine:
        for count, ended in ((3, 0), (1, 1), (2, 1), (2, 2)):
            for x in inputs()[:count]:
                engine.backward(engine(x).sum())
            engine.step(micro_batches=count)
            assert engine.global_steps == ended
        assert engine.micro_steps == 2 * MICRO_BATCHES
        with pytest.raises(TrainingError, match="at least one micro-batch, got 0"):
            engine.step(micro_batches=0)


def test_states_are_told_once_before_each_backward_who_ever_runs_it() -> None:
    with engine_of(nn.Linear(3, 1), gradient_accumulation_steps=2) as engine:
        told: list[tuple[bool, bool]] = []
        begin, ended = engine.states.begin_backward, 0
        end = engine.states.end_backward

        def note(*, last: bool, local: bool) -> None:
            told.append((last, local))
            begin(last=last, local=local)

        def note_end() -> None:
            nonlocal ended
            ended += 1
            end()

        engine.states.begin_backward = note  # type: ignore[method-assign]
        engine._window._end = note_end
        x = inputs()[0]
        engine.backward(engine(x).sum())
        engine.step()
        engine(x).sum().backward()
        engine.step()
        with engine.no_sync():
            engine.backward(engine(x).sum())
            engine(x).sum().backward()
        engine.backward(engine.module(x).sum(), last=True)
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(engine(x).sum())
        assert told == [
            (False, False), (True, False), (False, True), (False, True), (True, False),
            (True, False),
        ]  # fmt: skip
        assert ended == len(told)


@pytest.mark.parametrize("last", [False, True])
def test_gradients_made_apart_are_those_of_a_micro_batch(last: bool) -> None:
    module = nn.Linear(3, 1)
    reference = copy.deepcopy(module)
    torch.stack([reference(x).sum() for x in inputs()]).mean().backward()
    with engine_of(module) as engine:
        for number, x in enumerate(inputs(), 1):
            made = torch.autograd.grad(engine(x).sum(), list(module.parameters()))
            for parameter, gradient in zip(module.parameters(), made, strict=True):
                parameter.grad = gradient
            engine.gradients_ready(module.parameters(), last=last and number == MICRO_BATCHES)
        engine.step(micro_batches=MICRO_BATCHES)
        expected = reference.weight - RATE * reference.weight.grad
        torch.testing.assert_close(module.weight, expected)


# -- refusals --------------------------------------------------------------------------------------


def detached(outputs: dict[str, Any]) -> dict[str, Any]:
    return {"hidden": outputs["hidden"].detach(), "rest": (torch.zeros(2, 2), outputs["rest"][1])}


class Hiding:
    """A container that torch does not know."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


ZEROS = {"hidden": torch.zeros(2, 4), "rest": (torch.zeros(2, 2), None)}


@pytest.mark.parametrize(
    ("change", "gradients", "message"),
    [
        (lambda o: o, {**ZEROS, "hidden": torch.zeros(4, 2)},
         r"gradient of output\['hidden'\] has shape \(4, 2\), the output \(2, 4\)"),
        (lambda o: o, {**ZEROS, "rest": (None, None)},
         r"output\['rest'\]\[0\] of shape \(2, 2\) needs a gradient, got none: give zeros"),
        (lambda o: o, {"hidden": 1.0, "rest": ZEROS["rest"]},
         r"output\['hidden'\] of shape \(2, 4\) needs a gradient, got float"),
        (lambda o: o, None, r"output\['hidden'\] of shape \(2, 4\) needs a gradient, got none"),
        (lambda o: o, {**ZEROS, "other": torch.zeros(1)},
         r"a gradient is given for output\['other'\], which is not among the outputs"),
        (lambda o: o, {**ZEROS, "rest": (torch.zeros(2, 2), torch.zeros(2, 3))},
         r"output\['rest'\]\[1\] \(Tensor\) has no graph, but a gradient is given"),
        (detached, {"hidden": None, "rest": (None, None)}, "no output has a graph"),
        (lambda o: Hiding(o["hidden"]), torch.zeros(2, 4), r"output \(Hiding\) has no graph"),
        (lambda o: [o["hidden"], Hiding(o["hidden"])], [torch.zeros(2, 4), None],
         r"output\[1\] is a Hiding, whose tensors cannot be told"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(change: Any, gradients: Any, message: str) -> None:
    with engine_of(Stage()) as engine:
        outputs = change(engine(inputs()[0]))
        with pytest.raises(TrainingError, match=message):
            engine.backward_from(outputs, gradients)


def test_an_engine_without_optimizer_runs_no_backward() -> None:
    with engine_of(Stage(), optimizer={}) as engine:
        for refused in (
            lambda: engine.backward_from(engine(inputs()[0]), ZEROS),
            lambda: engine.gradients_ready([]),
        ):
            with pytest.raises(TrainingError, match="this engine has no optimizer"):
                refused()


def test_a_deferred_gradient_that_is_never_ready_is_refused_by_name() -> None:
    with engine_of(nn.Linear(3, 1), gradient_accumulation_steps=1) as engine:
        engine.states.defer([engine.module.weight])
        engine.backward(engine(inputs()[0]).sum())
        with pytest.raises(TrainingError, match="gradient of parameter weight was deferred"):
            engine.step()
        engine.zero_grad()
        assert engine.module.weight.grad is None

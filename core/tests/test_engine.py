"""What a training loop may ask of an engine, and what it is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.errors import ConfigError, TrainingError


def make(module: nn.Module | None = None, **changes: Any) -> Engine:
    torch.manual_seed(0)
    module = module if module is not None else nn.Linear(3, 1)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        **changes,
    }
    engine, *_ = drivetrain.initialize(
        model=module, model_parameters=module.parameters(), config=config
    )
    return engine


@contextmanager
def engine_of(module: nn.Module | None = None, **changes: Any) -> Iterator[Engine]:
    engine = make(module, **changes)
    try:
        yield engine
    finally:
        engine.destroy()


def batch(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))


def weight(engine: Engine) -> torch.Tensor:
    return engine.module.weight.detach().clone()


# -- accumulation ----------------------------------------------------------------------------------


def test_parameters_change_only_at_the_boundary() -> None:
    with engine_of(gradient_accumulation_steps=3) as engine:
        before = weight(engine)
        for micro in range(3):
            assert engine.is_gradient_accumulation_boundary() is (micro == 2)
            engine.backward(engine(batch(micro)).sum())
            engine.step()
            assert torch.equal(weight(engine), before) is (micro < 2)
        assert (engine.micro_steps, engine.global_steps, engine.global_samples) == (3, 1, 6)


def test_backward_answers_the_loss_divided_by_accumulation_steps() -> None:
    with engine_of(gradient_accumulation_steps=4) as engine:
        loss = engine(batch()).sum()
        assert engine.backward(loss).item() == pytest.approx(loss.item() / 4)


def test_scale_wrt_gas_false_takes_a_loss_that_is_divided_already() -> None:
    with engine_of(gradient_accumulation_steps=2) as engine, engine_of() as other:
        for micro in range(2):
            engine.backward(engine(batch(micro)).sum() / 2, scale_wrt_gas=False)
            engine.step()
        summed = sum(other(batch(micro)).sum() for micro in range(2)) / 2
        other.backward(summed)
        other.step()
        assert torch.allclose(weight(engine), weight(other))


def test_the_boundary_can_be_set_by_hand() -> None:
    with engine_of(gradient_accumulation_steps=2) as engine:
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(engine(batch()).sum())
        engine.step()
        assert engine.global_steps == 1
        engine.set_gradient_accumulation_boundary(None)
        assert not engine.is_gradient_accumulation_boundary()  # a window has begun


def test_unmanaged_accumulation_sums_until_step() -> None:
    with engine_of(managed_gradient_accumulation=False) as engine:
        before = weight(engine)
        for micro in range(3):
            engine.backward(engine(batch(micro)).sum() / 3, scale_wrt_gas=False)
        engine.step()
        mean = sum(batch(micro).sum(0) for micro in range(3)) / 3
        assert torch.allclose(weight(engine), before - 0.5 * mean)
        with pytest.raises(TrainingError, match="managed_gradient_accumulation"):
            engine.set_gradient_accumulation_boundary(True)


def test_step_inside_no_sync_is_refused_and_no_sync_does_not_nest() -> None:
    with engine_of() as engine, engine.no_sync():
        engine.backward(engine(batch()).sum())
        with pytest.raises(TrainingError, match="no_sync"):
            engine.step()
        with pytest.raises(TrainingError, match="nested"), engine.no_sync():
            pass


def test_two_backward_passes_before_a_step_add_up() -> None:
    with engine_of() as engine:
        before = weight(engine)
        engine.backward(engine(batch(0)).sum())
        engine.backward(engine(batch(1)).sum())
        engine.step()
        assert torch.allclose(weight(engine), before - 0.5 * (batch(0) + batch(1)).sum(0))


def test_plain_loss_backward_trains_like_engine_backward() -> None:
    with engine_of() as engine, engine_of() as plain:
        for step in range(3):
            engine.backward(engine(batch(step)).square().mean())
            engine.step()
            plain(batch(step)).square().mean().backward()
            plain.step()
        assert torch.equal(weight(engine), weight(plain))


def test_zero_grad_and_skip_step_drop_what_was_accumulated() -> None:
    with engine_of() as engine:
        before = weight(engine)
        engine.backward(engine(batch()).sum())
        engine.zero_grad()
        engine.backward(engine(batch(1)).sum())
        engine.skip_step()
        assert torch.equal(weight(engine), before)
        assert (engine.global_steps, engine.skipped_steps) == (1, 1)
        assert not engine.was_step_applied()


def test_a_skipped_step_has_no_gradient_norm() -> None:
    with engine_of(gradient_clipping=1.0) as engine:
        engine.backward(engine(batch()).sum())
        engine.step()
        assert engine.get_global_grad_norm()
        engine.backward(engine(batch(1)).sum())
        engine.skip_step()
        assert engine.get_global_grad_norm() is None
        assert engine.last_report is not None
        assert engine.last_report.gradient_norm is None


def test_changing_the_global_batch_changes_accumulation() -> None:
    with engine_of() as engine:
        engine.set_train_batch_size(8)
        assert engine.gradient_accumulation_steps() == 4
        with pytest.raises(ConfigError, match=r"7 is not a multiple of 2 = 2 .* x 1"):
            engine.set_train_batch_size(7)
        engine.set_train_micro_batch_size(3)
        assert engine.train_batch_size() == 12


# -- what is refused -------------------------------------------------------------------------------


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    with engine_of() as engine, pytest.raises(TrainingError, match=r"scalar loss, got \(2, 1\)"):
        engine.backward(engine(batch()))


def test_a_loss_without_graph_is_refused() -> None:
    with engine_of() as engine, pytest.raises(TrainingError, match="no graph"):
        engine.backward(engine(batch()).sum().detach())


@pytest.mark.parametrize("mode", [{}, {"bf16": {"enabled": True}}])
def test_a_loss_that_is_no_number_stops_before_the_update(mode: dict[str, Any]) -> None:
    with engine_of(**mode) as engine:
        before = weight(engine)
        dtype = before.dtype
        engine.backward(engine(batch().to(dtype)).float().sum() * float("nan"))
        with pytest.raises(TrainingError, match="loss of step 1 is nan"):
            engine.step()
        assert torch.equal(weight(engine), before)


def spoil(gradient: torch.Tensor) -> torch.Tensor:
    return gradient * float("inf")


def test_gradients_that_are_no_numbers_stop_an_fp32_run_and_name_the_parameter() -> None:
    with engine_of(gradient_clipping=1.0) as engine:
        before = weight(engine)
        engine.module.weight.register_hook(spoil)
        engine.backward(engine(batch()).sum())
        with pytest.raises(TrainingError, match=r"norm of step 1 is not finite: weight \(3 of 3"):
            engine.step()
        assert torch.equal(weight(engine), before)


def test_a_bf16_step_with_such_gradients_is_skipped_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with engine_of(bf16={"enabled": True}) as engine:
        before = weight(engine)
        engine.module.weight.register_hook(spoil)
        engine.backward(engine(batch().bfloat16()).float().sum())
        engine.step()
        assert engine.skipped_steps == 1
        assert torch.equal(weight(engine), before)
        assert "step 1 is skipped, its gradients are not finite: weight" in caplog.text


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match="no trainable parameters"):
        make(nn.Tanh())


def test_an_optimizer_over_other_parameters_is_refused() -> None:
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="not the model's"):
        drivetrain.initialize(
            model=nn.Linear(3, 1), optimizer=other, config={"train_batch_size": 1}
        )


def test_something_that_is_no_module_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"torch.nn.Module, got dict"):
        drivetrain.initialize(model={}, config={"train_batch_size": 1})  # type: ignore[arg-type]


def test_a_config_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="config and config_params"):
        drivetrain.initialize(model=nn.Linear(1, 1), config={}, config_params={})


def test_an_engine_without_optimizer_only_runs_forward() -> None:
    engine, optimizer, *_ = drivetrain.initialize(
        model=nn.Linear(3, 1), config={"train_batch_size": 1}
    )
    assert optimizer is None
    assert engine(batch()).shape == (2, 1)
    with pytest.raises(TrainingError, match="no optimizer"):
        engine.backward(engine(batch()).sum())
    with pytest.raises(TrainingError, match="no optimizer"):
        engine.step()
    engine.destroy()


def test_unfreezing_without_rebuild_is_an_error_and_rebuild_keeps_states() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    module[0].requires_grad_(False)
    adam = {"type": "AdamW", "params": {"lr": 0.1}}
    with engine_of(module, optimizer=adam) as engine:
        engine.backward(engine(batch()).sum())
        engine.step()
        module[0].requires_grad_(True)
        engine.backward(engine(batch()).sum())
        with pytest.raises(TrainingError, match=r"0.bias was unfrozen|0.weight was unfrozen"):
            engine.step()
        engine.rebuild()
        moments = {
            (f.name, f.kind): f.read().clone()
            for f in engine.states.fragments()
            if f.kind == "exp_avg"
        }
        assert moments["1.weight", "exp_avg"].abs().sum() > 0
        assert moments["0.weight", "exp_avg"].abs().sum() == 0
        before = module[0].weight.detach().clone()
        engine.backward(engine(batch()).sum())
        engine.step()
        # Adam's first step of a parameter has length lr, whatever the others' step counts are.
        moved = (module[0].weight.detach() - before).abs()
        assert torch.allclose(moved, torch.full_like(moved, 0.1), rtol=1e-3)


# -- around the loop -------------------------------------------------------------------------------


def test_the_norm_is_that_of_the_mean_gradient_before_clipping() -> None:
    with engine_of(gradient_clipping=0.1, gradient_accumulation_steps=2) as engine:
        assert engine.get_global_grad_norm() is None
        for micro in range(2):
            engine.backward(engine(batch(micro)).sum())
            engine.step()
        mean = (batch(0).sum(0) + batch(1).sum(0)) / 2
        expected = torch.cat([mean, torch.tensor([2.0])]).norm().item()  # bias gradient: 2 samples
        assert engine.get_global_grad_norm() == pytest.approx(expected, rel=1e-6)


def test_the_report_tells_what_the_step_did() -> None:
    with engine_of(gradient_clipping=1.0) as engine:
        loss = engine(batch()).sum()
        engine.backward(loss)
        engine.step()
        report = engine.last_report
        assert report is not None
        assert (report.step, report.applied, report.step_samples) == (1, True, 2)
        assert report.loss == pytest.approx(loss.item())
        assert report.learning_rates == (0.5,)
        assert {"forward", "backward", "step", "communication wait"} <= report.times.keys()
        assert report.samples_per_second > 0


def test_steps_per_print_logs_a_line_every_n_steps(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "drivetrain.engine")
    with engine_of(steps_per_print=2, wall_clock_breakdown=True) as engine:
        for step in range(4):
            engine.backward(engine(batch(step)).sum())
            engine.step()
    lines = [r.message for r in caplog.records if r.message.startswith("step ")]
    assert [line.split(" |")[0] for line in lines] == ["step 2", "step 4"]
    assert all("forward" in line and "ms" in line for line in lines)


def test_learning_rates_are_live_in_the_optimizers_groups() -> None:
    with engine_of() as engine:
        before = weight(engine)
        assert engine.optimizer is not None
        engine.optimizer.param_groups[0]["lr"] = 0.0
        engine.backward(engine(batch()).sum())
        engine.optimizer.step()
        assert engine.global_steps == 1
        assert torch.equal(weight(engine), before)
        assert engine.get_lr() == [0.0]


def test_a_clients_schedule_on_the_clients_optimizer_drives_the_engine() -> None:
    module = nn.Linear(3, 1)
    client = torch.optim.SGD(module.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(client, gamma=0.5)
    engine, _, _, returned = drivetrain.initialize(
        model=module, optimizer=client, lr_scheduler=schedule, config={"train_batch_size": 2}
    )
    assert returned is schedule
    for _ in range(3):
        engine.backward(engine(batch()).sum())
        engine.step()
    assert engine.get_lr() == [0.125]
    engine.destroy()


def test_a_clients_optimizer_may_have_groups_without_a_rate() -> None:
    class Halving(torch.optim.Optimizer):
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                parameter.data *= 0.5

    module = nn.Linear(3, 1)
    before = module.weight.detach().clone()
    client = Halving(module.parameters(), {})
    engine, *_ = drivetrain.initialize(
        model=module, optimizer=client, config={"train_batch_size": 2}
    )
    engine.backward(engine(batch()).sum())
    engine.step()
    assert torch.equal(module.weight, before / 2)
    assert math.isnan(engine.get_lr()[0])
    assert math.isnan(engine.last_report.learning_rates[0])
    engine.destroy()


def test_a_schedule_without_an_optimizer_is_ignored_with_a_warning(caplog) -> None:
    config = {"train_batch_size": 2, "scheduler": {"type": "WarmupLR"}}
    engine, _, _, schedule = drivetrain.initialize(model=nn.Linear(3, 1), config=config)
    assert schedule is None
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        "the scheduler is ignored, since there is no optimizer whose rate it sets"
    ]
    engine.destroy()


def test_train_batch_runs_all_micro_batches_and_restarts_the_loader() -> None:
    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

        def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return (inputs @ self.weight - targets).square().mean()

    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    targets = inputs @ torch.tensor([1.0, -2.0, 0.5])
    module = Regression()
    engine, _, loader, _ = drivetrain.initialize(
        model=module,
        model_parameters=module.parameters(),
        training_data=torch.utils.data.TensorDataset(inputs, targets),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        },
    )
    assert loader is not None
    losses = [engine.train_batch().item() for _ in range(80)]
    assert engine.global_steps == 80
    assert losses[-1] < 1e-3 < losses[0]
    assert engine.eval_batch(iter([(inputs, targets)])).item() < 1e-3
    with pytest.raises(TrainingError, match="data ended at micro-batch 2 of 2"):
        engine.train_batch(iter([(inputs[:2], targets[:2])]))
    with pytest.raises(TrainingError, match=r"from an iterator.*not from a list.*make iter"):
        engine.train_batch([(inputs[:2], targets[:2])] * 2)
    engine.destroy()


def test_unknown_attributes_are_the_modules_and_train_returns_the_engine() -> None:
    with engine_of() as engine:
        assert engine.in_features == 3
        assert engine.eval() is engine
        assert not engine.module.training
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = engine.no_such_thing


def test_compile_keeps_training_equal() -> None:
    with engine_of() as engine, engine_of() as compiled:
        compiled.compile(backend="eager")
        for one in (engine, compiled):
            one.backward(one(batch()).square().mean())
            one.step()
        assert torch.equal(weight(engine), weight(compiled))

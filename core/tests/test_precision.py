"""dtypes of parameters, masters, gradients and states, and what fp16 does about overflows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.contracts import Purpose
from drivetrain.engine.engine import Engine
from drivetrain.errors import TrainingError
from drivetrain.testing import run_distributed


@contextmanager
def engine_of(module: nn.Module, **changes: Any) -> Iterator[Engine]:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        **changes,
    }
    engine, *_ = drivetrain.initialize(
        model=module, model_parameters=module.parameters(), config=config
    )
    try:
        yield engine
    finally:
        engine.destroy()


def states(engine: Engine) -> dict[tuple[str, str], torch.Tensor]:
    return {(f.name, f.kind): f.read() for f in engine.states.fragments()}


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 4)


@pytest.mark.parametrize(("mode", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_masters_are_made_from_the_original_values(mode: str, dtype: torch.dtype) -> None:
    module = linear()
    original = module.weight.detach().clone()
    with engine_of(module, **{mode: {"enabled": True}}) as engine:
        assert module.weight.dtype == dtype
        assert torch.equal(module.weight, original.to(dtype))
        assert torch.equal(states(engine)["weight", "master"], original.flatten())
        assert states(engine)["weight", "exp_avg"].dtype == torch.float32


def test_small_updates_are_not_lost_in_bf16() -> None:
    """Steps of 1e-4 vanish next to 1.0 in bf16, whose neighbours are 2^-7 apart, unless masters
    keep them."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    sgd = {"type": "SGD", "params": {"lr": 1e-4}}
    with engine_of(module, bf16={"enabled": True}, optimizer=sgd) as engine:
        for _ in range(100):
            engine.backward(engine(torch.ones(1, 1, dtype=torch.bfloat16)).float().sum())
            engine.step()
        master = states(engine)["weight", "master"].item()
        assert master == pytest.approx(0.99, rel=1e-5)
        assert module.weight.item() == torch.tensor(master).bfloat16().item()


def test_without_masters_states_are_fp32_unless_asked_for() -> None:
    for flag, expected in ((False, torch.float32), (True, torch.bfloat16)):
        section = {
            "enabled": True,
            "bf16_master_weights_and_grads": True,
            "bf16_optimizer_states": flag,
        }
        with engine_of(linear(), bf16=section) as engine:
            assert ("weight", "master") not in states(engine)
            assert states(engine)["weight", "exp_avg"].dtype == expected
            engine.backward(engine(torch.ones(2, 64, dtype=torch.bfloat16)).float().sum())
            engine.step()
            assert states(engine)["weight", "exp_avg"].dtype == expected


@pytest.mark.parametrize(
    ("accumulation", "types", "expected"),
    [
        (1, {}, torch.bfloat16),
        (2, {}, torch.float32),
        (2, {"grad_accum_dtype": "bf16"}, torch.bfloat16),
        (1, {"grad_accum_dtype": "fp32"}, torch.float32),
    ],
)
def test_gradients_accumulate_in_the_stated_dtype(
    accumulation: int, types: dict[str, str], expected: torch.dtype
) -> None:
    with engine_of(
        linear(),
        bf16={"enabled": True},
        data_types=types,
        gradient_accumulation_steps=accumulation,
    ) as engine:
        assert states(engine)["weight", "gradient"].dtype == expected


def test_fp32_accumulation_keeps_what_bf16_would_round_away() -> None:
    """256 + 1 is 256 in bf16; the sum of many micro-batches must not stop growing."""
    module = nn.Linear(1, 1, bias=False)
    sgd = {"type": "SGD", "params": {"lr": 1.0}}
    steps = 16
    with engine_of(
        module, bf16={"enabled": True}, optimizer=sgd, gradient_accumulation_steps=steps
    ) as engine:
        before = states(engine)["weight", "master"].clone()
        for micro in range(steps):
            x = torch.full((1, 1), 256.0 if micro == 0 else 1.0, dtype=torch.bfloat16)
            engine.backward(engine(x).float().sum())
            engine.step()
        moved = before - states(engine)["weight", "master"]
        assert moved.item() == pytest.approx((256 + steps - 1) / steps, rel=1e-6)


def test_buffers_keep_their_dtype_unless_told() -> None:
    with engine_of(nn.BatchNorm1d(4), bf16={"enabled": True}) as engine:
        assert engine.module.running_mean.dtype == torch.float32
    with engine_of(
        nn.BatchNorm1d(4), bf16={"enabled": True}, data_types={"buffer_dtype": "bf16"}
    ) as engine:
        assert engine.module.running_mean.dtype == torch.bfloat16
        assert engine.module.num_batches_tracked.dtype == torch.int64


def test_auto_cast_casts_floating_inputs_only() -> None:
    class Look(nn.Linear):
        def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            assert (x.dtype, index.dtype) == (torch.float16, torch.int64)
            return super().forward(x)

    section = {"enabled": True, "auto_cast": True}
    with engine_of(Look(4, 1), fp16=section) as engine:
        engine(torch.ones(2, 4), index=torch.ones(2, dtype=torch.int64))


def test_autocast_computes_low_and_keeps_fp32_parameters() -> None:
    module = linear()
    with engine_of(module, torch_autocast={"enabled": True, "dtype": "bf16"}) as engine:
        output = engine(torch.ones(2, 64))
        assert output.dtype == torch.bfloat16
        assert module.weight.dtype == torch.float32
        engine.backward(output.float().sum())
        engine.step()
        assert engine.was_step_applied()


# -- fp16 -----------------------------------------------------------------------------------------


def overflow(engine: Engine) -> None:
    engine.backward(engine(torch.full((2, 64), 6e4, dtype=torch.float16)).float().sum() * 1e4)


def test_an_overflow_skips_the_update_and_the_schedule_and_halves_the_scale() -> None:
    module = linear()
    fp16 = {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}
    with engine_of(module, fp16=fp16, scheduler=schedule) as engine:
        before = module.weight.detach().clone()
        overflow(engine)
        engine.step()
        assert engine.overflowed()
        assert engine.skipped_steps == engine.global_steps == 1
        assert torch.equal(module.weight, before)
        # Not the rate, which a warm-up leaves as it is in its first iteration anyway.
        assert engine.lr_scheduler is not None
        assert engine.lr_scheduler.last_batch_iteration == -1
        assert engine.loss_scaler.scale_value == 8.0
        engine.backward(engine(torch.ones(2, 64, dtype=torch.float16)).float().mean())
        engine.step()
        assert engine.was_step_applied()
        assert engine.lr_scheduler.last_batch_iteration == 0


def test_at_the_smallest_scale_the_error_names_the_parameter() -> None:
    fp16 = {"enabled": True, "initial_scale_power": 0, "hysteresis": 1}
    with engine_of(linear(), fp16=fp16) as engine:
        overflow(engine)
        with pytest.raises(TrainingError, match=r"gradient of weight \(\d+ of 256 elements"):
            engine.step()


def test_plain_backward_without_scale_is_refused_and_with_scale_works() -> None:
    module = linear()
    with engine_of(module, fp16={"enabled": True, "loss_scale": 128.0}) as engine:
        x = torch.ones(2, 64, dtype=torch.float16)
        with pytest.raises(TrainingError, match=r"engine.scale\(loss\)"):
            engine(x).float().mean().backward()
        engine.zero_grad()
        before = module.weight.detach().clone()
        engine.scale(engine(x).float().mean()).backward()
        engine.step()
        assert not torch.equal(module.weight, before)


# -- on the wire ----------------------------------------------------------------------------------


def gradient_bytes(changes: dict[str, Any]) -> int:
    module = linear()
    with engine_of(module, **changes) as engine:
        x = torch.ones(2, 64, dtype=module.weight.dtype)
        for _ in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(x).float().sum())
            engine.step()
        return engine.job.byte_log.total(purpose=Purpose.GRADIENT).payload_bytes


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({}, 4),
        ({"bf16": {"enabled": True}}, 2),
        ({"bf16": {"enabled": True}, "gradient_accumulation_steps": 2}, 2),
        ({"bf16": {"enabled": True}, "communication_data_type": "fp32"}, 4),
        ({"communication_data_type": "bf16"}, 2),
    ],
)
def test_gradients_travel_in_the_stated_dtype(changes: dict[str, Any], width: int) -> None:
    assert run_distributed(gradient_bytes, 2, changes) == [(64 * 4 + 4) * width] * 2

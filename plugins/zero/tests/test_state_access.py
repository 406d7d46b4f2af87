"""``safe_get_*`` and ``safe_set_*`` against plain torch, at every stage."""

from __future__ import annotations

from collections.abc import Iterator

import drivetrain_zero as zero
import pytest
import torch
import torch.distributed as dist
from torch import nn

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.errors import TrainingError
from drivetrain.states.whole import whole
from drivetrain.testing import data, models, run_distributed

RATE = 1e-2
EPSILON = 1e-3  # so large that gradients near zero are not told from their sign alone
RANKS = 2


def config(stage: int, **keys: object) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": RATE, "eps": EPSILON, "weight_decay": 0.01},
        },
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **keys,
    }


def engine_of(module: nn.Module, settings: dict) -> Engine:
    return drivetrain.initialize(model=module, config=settings)[0]


def frozen_gpt() -> nn.Module:
    module = models.tiny_gpt()
    module.norm.requires_grad_(False)
    return module


class Reference:
    """Plain torch on the batches of all ranks."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.module = frozen_gpt()
        self.work = frozen_gpt().to(dtype)
        self.named = dict(self.module.named_parameters())
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=RATE, eps=EPSILON)

    def backward(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for name, parameter in self.module.named_parameters():
            self.work.get_parameter(name).data.copy_(parameter.data)
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        for inputs, targets in batches:
            self.work.zero_grad()
            self.work(inputs, targets).backward()
            for name, parameter in self.module.named_parameters():
                work = self.work.get_parameter(name)
                if parameter.grad is not None and work.grad is not None:
                    parameter.grad += work.grad.float() / len(batches)

    def step(self) -> None:
        self.optimizer.step()

    def state(self, name: str, key: str) -> torch.Tensor:
        return self.optimizer.state[self.named[name]][key]


def batches(count: int, start: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    inputs, targets = data.tokens(start + 2 * count)
    return [(inputs[i : i + 2], targets[i : i + 2]) for i in range(start, start + 2 * count, 2)]


def mine(all_batches: list) -> Iterator:
    return iter(all_batches[dist.get_rank() :: dist.get_world_size()])


def close(ours: torch.Tensor | None, theirs: torch.Tensor, rtol: float = 1e-3) -> None:
    assert ours is not None
    torch.testing.assert_close(
        ours, theirs.detach(), rtol=rtol, atol=rtol * float(theirs.detach().abs().max())
    )


def trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def check_reads(settings: dict, accumulation: int, dtype: torch.dtype) -> None:
    rtol = 1e-3 if dtype == torch.float32 else 3e-2
    engine, reference = engine_of(frozen_gpt(), settings), Reference(dtype)
    for step in range(2):
        every = batches(accumulation * RANKS, 12 * step)
        reference.backward(every)
        for number, (inputs, targets) in enumerate(mine(every)):
            engine.backward(engine(inputs, targets))
            if number < accumulation - 1:
                with pytest.raises(TrainingError, match="in the last micro-batch of a window"):
                    zero.safe_get_full_grad(engine.module.head.weight)
                engine.step()
        for name, parameter in trained(engine.module):
            gradient = zero.safe_get_full_grad(parameter)
            close(gradient, reference.named[name].grad, rtol)
        engine.step()
        reference.step()
        for name, parameter in trained(engine.module):
            close(zero.safe_get_full_fp32_param(parameter), reference.named[name], rtol)
            if dtype == torch.float32:
                for key in ("exp_avg", "exp_avg_sq"):
                    got = zero.safe_get_full_optimizer_state(parameter, key)
                    close(got, reference.state(name, key), rtol)
            assert accumulation > 1 or zero.safe_get_full_grad(parameter) is None
    assert zero.safe_get_full_fp32_param(engine.module.norm.weight) is None
    with pytest.raises(
        TrainingError, match=r"head.weight has no momentum; its engine keeps exp_avg, exp_avg_sq"
    ):
        zero.safe_get_full_optimizer_state(engine.module.head.weight, "momentum")


@pytest.mark.parametrize(
    ("stage", "keys"),
    [
        (0, {}),
        (1, {}),
        (2, {}),
        (3, {}),
        (0, {"prescale_gradients": True}),
        (3, {"prescale_gradients": True}),
    ],
)
def test_states_are_those_of_plain_torch(stage: int, keys: dict) -> None:
    run_distributed(check_reads, RANKS, config(stage, **keys), 1, torch.float32)


def check_unclipped(settings: dict) -> None:
    engine, reference = engine_of(frozen_gpt(), settings), Reference()
    every = batches(RANKS, 0)
    reference.backward(every)
    engine.backward(engine(*next(mine(every))))
    for name, parameter in trained(engine.module):
        close(zero.safe_get_full_grad(parameter), reference.named[name].grad)


def test_gradients_are_those_before_clipping() -> None:
    run_distributed(check_unclipped, RANKS, config(3, gradient_clipping=0.01))


@pytest.mark.parametrize(
    "section", [{"stage": 0}, {"stage": 1}, {"stage": 3, "mics_shard_size": 1}]
)
def test_gradients_of_several_micro_batches_are_their_mean(section: dict) -> None:
    settings = config(0, gradient_accumulation_steps=2) | {"zero_optimization": section}
    run_distributed(check_reads, RANKS, settings, 2, torch.float32)


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (3, "bf16"), (2, "fp16")])
def test_masters_and_gradients_are_unscaled_in_low_precision(stage: int, precision: str) -> None:
    scale = {"loss_scale": 1024} if precision == "fp16" else {}
    settings = config(stage, **{precision: {"enabled": True, **scale}})
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    run_distributed(check_reads, RANKS, settings, 1, dtype)


def double(gradient: torch.Tensor, _parameter: nn.Parameter) -> None:
    gradient.mul_(2)


def check_writes(settings: dict) -> None:
    engine, reference = engine_of(frozen_gpt(), settings), Reference()
    dtype = engine.module.head.weight.dtype
    low = dtype != torch.float32
    reference.work.to(dtype)
    torch.manual_seed(40 + dist.get_rank())  # the first rank's values count
    for step in range(2):
        every = batches(RANKS, 6 * step)
        for name, parameter in trained(engine.module):
            value = torch.randn(parameter.shape) / 8
            zero.safe_set_full_fp32_param(parameter, value)
            dist.broadcast(value, 0)
            reference.named[name].data.copy_(value)
        with whole(engine.module):
            for name, parameter in trained(engine.module):
                assert torch.equal(parameter, reference.named[name].to(dtype))
        reference.backward(every)
        engine.backward(engine(*next(mine(every))))
        for name, parameter in trained(engine.module):
            if step:
                value = torch.rand(parameter.shape)
                zero.safe_set_full_optimizer_state(parameter, value, "exp_avg_sq")
                dist.broadcast(value, 0)
                reference.state(name, "exp_avg_sq").copy_(value)
            gradient = zero.safe_get_full_grad(parameter)
            zero.safe_set_full_grad(parameter, gradient * 3 + 0.5)
            reference.named[name].grad.mul_(3).add_(0.5)
        parameters = [p for _, p in trained(engine.module)]
        zero.safe_update_full_grad_vectorized(parameters, lambda gradient, _p: gradient - 0.25)
        zero.safe_update_full_grad_vectorized(
            parameters, lambda gradient, _p: gradient.mul_(2).sum() and None
        )
        for _, parameter in trained(reference.module):
            parameter.grad.sub_(0.25).mul_(2)
        engine.step()
        reference.step()
        for name, parameter in trained(engine.module):
            close(
                zero.safe_get_full_fp32_param(parameter),
                reference.named[name],
                3e-2 if low else 1e-3,
            )


@pytest.mark.parametrize(
    ("stage", "keys"),
    [
        (0, {}),
        (1, {}),
        (2, {}),
        (3, {}),
        (0, {"bf16": {"enabled": True}}),
        (3, {"bf16": {"enabled": True}}),
    ],
)
def test_what_is_written_is_what_the_next_update_uses(stage: int, keys: dict) -> None:
    run_distributed(check_writes, RANKS, config(stage, **keys))


def check_local(settings: dict) -> list[int]:
    engine, reference = engine_of(frozen_gpt(), settings), Reference()
    parameter = engine.module.head.weight
    every = batches(RANKS, 0)
    reference.backward(every)
    engine.backward(engine(*next(mine(every))))
    part = zero.safe_get_local_fp32_param(parameter)
    parts = [None] * RANKS
    dist.all_gather_object(parts, part)
    close(torch.cat(parts).view_as(parameter), reference.named["head.weight"])
    dist.all_gather_object(parts, zero.safe_get_local_grad(parameter))
    close(torch.cat(parts).view_as(parameter), reference.named["head.weight"].grad)
    rank = dist.get_rank()
    zero.safe_set_local_fp32_param(parameter, torch.full_like(part, rank))
    expected = torch.cat([torch.full((p.numel(),), float(i)) for i, p in enumerate(parts)])
    assert torch.equal(zero.safe_get_full_fp32_param(parameter).flatten(), expected)
    with whole([parameter]):
        assert torch.equal(parameter.flatten(), expected)
    zero.safe_set_local_optimizer_state(parameter, torch.full_like(part, rank + 1), "exp_avg")
    assert torch.equal(
        zero.safe_get_local_optimizer_state(parameter, "exp_avg"), torch.full_like(part, rank + 1)
    )
    zero.safe_set_local_grad(parameter, torch.full_like(part, rank + 2))
    torch.testing.assert_close(zero.safe_get_full_grad(parameter).flatten(), expected + 2)
    with pytest.raises(TrainingError, match=f"this rank keeps {part.numel()} elements"):
        zero.safe_set_local_fp32_param(parameter, torch.zeros(1))
    return [p.numel() for p in parts]


def test_local_parts_are_what_a_rank_keeps() -> None:
    sizes = run_distributed(check_local, RANKS, config(3))
    assert sum(sizes[0]) == 64 * 32
    assert sizes[0] == sizes[1]


def check_refusals() -> None:
    engine = engine_of(frozen_gpt(), config(3))
    weight, frozen = engine.module.head.weight, engine.module.norm.weight
    assert zero.safe_get_full_grad(weight) is None
    assert zero.safe_get_full_grad(frozen) is None
    assert zero.safe_get_full_fp32_param(nn.Parameter(torch.ones(2))) is None
    with pytest.raises(TrainingError, match="no open engine trains it"):
        zero.safe_set_full_fp32_param(frozen, torch.ones(32))
    with pytest.raises(TrainingError, match="no gradient yet"):
        zero.safe_set_full_grad(weight, torch.zeros(64, 32))
    with pytest.raises(
        TrainingError, match=r"head.weight has shape \(64, 32\), got a value of shape \(2,\)"
    ):
        zero.safe_set_full_fp32_param(weight, torch.zeros(2))
    engine.destroy()
    assert zero.safe_get_full_fp32_param(weight) is None


def test_wrong_uses_are_errors() -> None:
    run_distributed(check_refusals, 2)


def check_late() -> None:
    """A backward after gradients were read is added, once."""
    for stage in (0, 2, 3):
        engine, reference = engine_of(frozen_gpt(), config(stage)), Reference()
        first, second = batches(2, 0), batches(2, 4)
        reference.backward(first + second)
        engine.backward(engine(*next(mine(first))))
        zero.safe_get_full_grad(engine.module.head.weight)
        zero.safe_get_full_grad(engine.module.head.weight)
        engine.backward(engine(*next(mine(second))))
        for name, parameter in trained(engine.module):
            close(zero.safe_get_full_grad(parameter), reference.named[name].grad * 2)
        engine.step()
        reference.optimizer.param_groups[0]["lr"] = RATE
        for _, parameter in trained(reference.module):
            parameter.grad.mul_(2)
        reference.step()
        for name, parameter in trained(engine.module):
            close(zero.safe_get_full_fp32_param(parameter), reference.named[name])
        engine.destroy()


def test_reading_gradients_loses_no_later_backward() -> None:
    run_distributed(check_late, 2)


def check_values_that_are_no_numbers() -> None:
    engine = engine_of(frozen_gpt(), config(3))
    weight = engine.module.head.weight
    value = torch.zeros(64, 32)
    value[::3], value[1::3] = float("nan"), -0.0
    zero.safe_set_full_optimizer_state(weight, value, "exp_avg")
    got = zero.safe_get_full_optimizer_state(weight, "exp_avg")
    assert torch.equal(got.view(torch.int32), value.view(torch.int32))


def test_nan_and_signed_zero_are_read_as_they_are() -> None:
    run_distributed(check_values_that_are_no_numbers, 2)

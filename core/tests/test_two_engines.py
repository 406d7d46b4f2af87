"""Several engines share one process, one job and even one loss; an engine may only run forward."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.engine.engine import Engine
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.testing import run_distributed

STEPS = 10
RATES = {"first": 1e-2, "second": 3e-3}
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 0.2,
    "data_parallel": {"bucket_bytes": 64, "first_bucket_bytes": 64},
}


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def modules() -> dict[str, nn.Module]:
    return {name: network(seed) for seed, name in enumerate(RATES)}


def inputs(step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 4, generator=generator)


def adamw(name: str, module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=RATES[name])


def of_both(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """A loss to which the modules contribute in ways that depend on each other."""
    return (first + second - 1.0).square().mean()


@contextmanager
def opened(config: dict[str, Any], *, batch_required: bool = True) -> Iterator[Job]:
    world = Ranks.current().world_size
    with Job.open(Plan.build(config, world_size=world, batch_required=batch_required)) as job:
        yield job


@contextmanager
def engines_of_one_job() -> Iterator[dict[str, Engine]]:
    with opened(CONFIG) as job:
        engines = {
            name: job.engine(module, adamw(name, module)) for name, module in modules().items()
        }
        assert job.engines == list(engines.values())
        yield engines
        for engine in engines.values():
            engine.destroy()


def apart(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
    """Every module has a loss of its own."""
    return [(first - 1.0).square().mean(), (second + 1.0).square().mean()]


def together(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
    return [of_both(first, second)]


LOSSES = {"apart": apart, "together": together}


def reference(kind: str, world: int) -> dict[str, list[torch.Tensor]]:
    """Parameters after training with nothing but torch, on the mean of all ranks' losses."""
    trained = modules()
    optimizers = {name: adamw(name, module) for name, module in trained.items()}
    for step in range(STEPS):
        for rank in range(world):
            x = inputs(step, rank)
            losses = LOSSES[kind](trained["first"](x), trained["second"](x))
            (torch.stack(losses).sum() / world).backward()
        for name, optimizer in optimizers.items():
            nn.utils.clip_grad_norm_(trained[name].parameters(), CONFIG["gradient_clipping"])
            optimizer.step()
            optimizer.zero_grad()
    return {name: [p.detach() for p in module.parameters()] for name, module in trained.items()}


def parameters_of(engines: dict[str, Engine]) -> dict[str, list[torch.Tensor]]:
    return {
        name: [p.detach().clone() for p in engine.module.parameters()]
        for name, engine in engines.items()
    }


# -- functions that run on every rank --------------------------------------------------------------


def train(kind: str, backward: str) -> dict[str, list[torch.Tensor]]:
    with engines_of_one_job() as engines:
        first, second = engines.values()
        for step in range(STEPS):
            x = inputs(step, first.job.rank)
            losses = LOSSES[kind](first(x), second(x))
            if backward == "torch":
                torch.stack(losses).sum().backward()
            else:
                for engine, loss in zip(engines.values(), losses, strict=False):
                    engine.backward(loss)
            for engine in engines.values():
                engine.step()
        assert [engine.global_steps for engine in engines.values()] == [STEPS, STEPS]
        return parameters_of(engines)


def two_initialized_engines() -> dict[str, list[torch.Tensor]]:
    """Each with a job of its own, as scripts for generators and discriminators do."""
    engines = {
        name: drivetrain.initialize(model=m, optimizer=adamw(name, m), config=CONFIG)[0]
        for name, m in modules().items()
    }
    first, second = engines.values()
    for step in range(STEPS):
        x = inputs(step, first.job.rank)
        first.backward(of_both(first(x), second(x)))
        second.step()
        first.step()
    trained = parameters_of(engines)
    first.destroy()
    loss = apart(second(x), second(x))[0]  # the other job goes on
    second.backward(loss)
    second.step()
    second.destroy()
    return trained


def a_frozen_teacher_beside_a_trained_student() -> None:
    """The second engine of a job may have no optimizer; what it gives is not trained."""
    with opened(CONFIG) as job:
        student, teacher = modules().values()
        before = [p.detach().clone() for p in teacher.parameters()]
        learning, frozen = job.engine(student, adamw("first", student)), job.engine(teacher)
        losses = []
        for _ in range(STEPS):
            x = inputs(0, job.rank)
            with torch.no_grad():
                target = frozen(x)
            loss = (learning(x) - target).square().mean()
            learning.backward(loss)
            learning.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        for old, new in zip(before, teacher.parameters(), strict=True):
            assert torch.equal(old, new)
        assert (learning.global_steps, frozen.global_steps) == (STEPS, 0)


def serve(bf16: bool) -> torch.Tensor:
    with opened({"bf16": {"enabled": bf16}}, batch_required=False) as job:
        engine = job.engine(network(job.rank))  # rank 0's values count
        assert engine.optimizer is None
        assert engine.lr_scheduler is None
        dtype = torch.bfloat16 if bf16 else torch.float32
        assert {p.dtype for p in engine.module.parameters()} == {dtype}
        outputs = engine(inputs(0, 0).to(dtype))
        with pytest.raises(TrainingError, match="no optimizer, so it cannot run backward"):
            engine.backward(outputs.sum())
        with pytest.raises(TrainingError, match="no optimizer, so it cannot step"):
            engine.step()
        with pytest.raises(ConfigError, match="opened without a batch size"):
            engine.train_batch_size()
        engine.eval()
        with torch.no_grad():
            outputs = engine(inputs(0, 0).to(dtype))
        engine.destroy()
        return outputs


# -- claims ----------------------------------------------------------------------------------------


def assert_trained_like(
    answers: list[dict[str, list[torch.Tensor]]], expected: dict[str, list[torch.Tensor]]
) -> None:
    for answer in answers:
        for name, values in expected.items():
            torch.testing.assert_close(answer[name], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("backward", ["torch", "engine"])
@pytest.mark.parametrize("kind", ["apart", "together"])
def test_two_engines_of_one_job_train_like_plain_torch(
    kind: str, backward: str, world: int
) -> None:
    assert_trained_like(run_distributed(train, world, kind, backward), reference(kind, world))


@pytest.mark.parametrize("world", [1, 2])
def test_two_jobs_in_one_process_train_on_one_loss(world: int) -> None:
    answers = run_distributed(two_initialized_engines, world)
    assert_trained_like(answers, reference("together", world))


@pytest.mark.parametrize("world", [1, 2])
def test_an_engine_without_optimizer_teaches_another_and_stays_as_it_is(world: int) -> None:
    run_distributed(a_frozen_teacher_beside_a_trained_student, world)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_job_without_batch_size_and_optimizer_runs_forward(world: int, bf16: bool) -> None:
    dtype = torch.bfloat16 if bf16 else torch.float32
    with torch.no_grad():
        expected = network(0).to(dtype)(inputs(0, 0).to(dtype))
    for outputs in run_distributed(serve, world, bf16):
        torch.testing.assert_close(outputs, expected)


def test_a_parameter_that_another_engine_trains_is_refused_by_name() -> None:
    module = network(0)
    first, *_ = drivetrain.initialize(model=module, optimizer=adamw("first", module), config=CONFIG)
    shared = nn.Sequential(nn.Linear(4, 4), module[2])
    message = (
        r"parameter 1\.\w+ is kept by another engine \(number 0 of another job, over Sequential\).*"
        r"call destroy\(\) on that engine first"
    )
    with pytest.raises(ConfigError, match=message):
        drivetrain.initialize(model=shared, optimizer=adamw("first", shared), config=CONFIG)
    first.destroy()
    second, *_ = drivetrain.initialize(
        model=shared, optimizer=adamw("first", shared), config=CONFIG
    )
    first.destroy()  # once more, which frees nothing that is the second engine's now
    with pytest.raises(ConfigError, match="kept by another engine"):
        drivetrain.initialize(model=module, optimizer=adamw("first", module), config=CONFIG)
    second.destroy()


def train_what_another_engine_trains() -> str:
    with opened(CONFIG) as job:
        trunk = network(0)
        first = job.engine(trunk, adamw("first", trunk))
        outer = nn.Sequential(trunk, nn.Linear(1, 1))
        with pytest.raises(ConfigError) as refused:
            job.engine(outer, adamw("second", outer))
        trunk.requires_grad_(False)  # what is frozen is not trained
        second = job.engine(outer, adamw("second", outer))
        trunk.requires_grad_(True)
        with pytest.raises(ConfigError, match=r"parameter 0\.weight is kept by another engine"):
            second.rebuild()
        second.destroy()
        first.destroy()
        return str(refused.value)


def test_each_rank_is_told_which_parameter_another_engine_of_the_job_trains() -> None:
    for message in run_distributed(train_what_another_engine_trains, 2):
        assert "parameter 0.weight is kept by another engine (number 0 of this job" in message


def test_a_parameter_is_free_once_the_engine_that_kept_it_is_gone() -> None:
    module = network(0)
    with opened(CONFIG) as job:
        job.engine(module, adamw("first", module))
    del job
    gc.collect()
    again, *_ = drivetrain.initialize(model=module, optimizer=adamw("first", module), config=CONFIG)
    again.destroy()
    again.job.close()


@pytest.mark.parametrize(
    "mistake",
    [
        {"config": {**CONFIG, "scheduler": {"type": "WarmupLR", "params": {"steps": 3}}}},
        {"training_data": torch.utils.data.TensorDataset(torch.zeros(0, 4))},
    ],
    ids=["scheduler", "data"],
)
def test_a_module_trains_in_the_engine_that_is_built_after_one_that_could_not_be(
    mistake: dict[str, Any],
) -> None:
    module = network(0)
    with pytest.raises(ConfigError):
        drivetrain.initialize(
            model=module, **{"optimizer": adamw("first", module), "config": CONFIG, **mistake}
        )
    engine, *_ = drivetrain.initialize(
        model=module, optimizer=adamw("first", module), config=CONFIG
    )
    before = [p.detach().clone() for p in module.parameters()]
    engine.backward(engine(inputs(0, 0)).sum())
    engine.step()
    assert not any(torch.equal(old, p) for old, p in zip(before, module.parameters(), strict=True))
    engine.destroy()

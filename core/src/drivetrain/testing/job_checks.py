"""What a job must do on a device, against plain torch on the host; each runs on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drivetrain.contracts.state.bucket import BucketSpec, Segment
from drivetrain.contracts.world.collective import Op, Purpose, Tag
from drivetrain.optimization.factory import make_rule
from drivetrain.states.device_home import DeviceHome
from drivetrain.testing import data, models
from drivetrain.testing.check import expect
from drivetrain.testing.device_checks import random_states

if TYPE_CHECKING:
    from drivetrain.contracts.state.bucket import UpdateRule
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job

TAG = Tag(Purpose.CONTROL, site="conformance")

OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {
    "AdamW": {"lr": 0.02, "weight_decay": 0.1},
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "Adagrad": {"lr": 0.1},
}
"""``optimizer.type`` -> parameters; torch has a class of the same name and arguments."""

BATCH = 8


def collectives_are_right(job: Job) -> None:
    """Every collective moves and combines numbers as it should, in every dtype that travels."""
    low = [d for d in job.accelerator.supported_dtypes() if d.itemsize == 2]
    for dtype in (torch.float32, torch.int64, *low):
        for name, found, wanted in _collectives(job, dtype):
            job.accelerator.synchronize()
            expect(
                torch.equal(found.cpu(), wanted),
                f"{name} of {dtype} over {job.world_size} ranks to give {wanted.tolist()}",
                f"{found.tolist()} on rank {job.rank}",
                f"check communication_backend(), which says "
                f"{job.accelerator.communication_backend()!r}",
            )


def random_streams_go_on(job: Job) -> None:
    """A saved random stream goes on where it was, and leaves the default generator alone."""

    def draw() -> torch.Tensor:
        with job.random.fork("dropout"):
            return torch.rand(8, device=job.device).cpu()

    before = random_states(job.device)
    first, saved = draw(), job.random.state_dict()
    second = draw()
    job.random.load_state_dict(saved)
    again = draw()
    advice = "check get_rng_state and set_rng_state of torch's module for the device"
    expect(not torch.equal(first, second), "a stream to go on", "the same numbers twice", advice)
    expect(torch.equal(second, again), f"a restored stream to give {second}", again, advice)
    kept = all(map(torch.equal, before, random_states(job.device)))
    expect(kept, "the default generator to be as before", "another state", advice)


def update_rules_are_right(job: Job) -> None:
    """Weights after five updates on the device are those that torch computes in float64."""
    for reference, params in OPTIMIZERS.items():
        for name in (reference, f"Fused{reference}"):
            if name != reference and job.plan.registry.find("optimizers", name) is None:
                continue
            rule = make_rule(name, params, job.plan.registry, job)
            found, wanted = _updated(rule, job), _updated_by_torch(reference, params)
            off = float(((found.cpu().double() - wanted).abs() / wanted.abs().clamp(min=1)).max())
            expect(
                off <= 1e-5,
                f"weights updated by {name} to be within 1e-5 of those in float64",
                f"{off:.3g}",
                "check elementwise arithmetic, and the kernels that the package brings",
            )


def train(engine: Engine, first: int, steps: int) -> list[float]:
    """This rank's losses over its part of the global batches ``first``, ``first + 1``, ..."""
    job, losses = engine.job, []
    rank, share = job.rank, BATCH // job.world_size
    inputs, targets = data.vectors((first + steps) * BATCH)
    for step in range(first, first + steps):
        start = step * BATCH + rank * share
        rows = slice(start, start + share)
        loss = engine(inputs[rows].to(engine.device), targets[rows].to(engine.device))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def build(job: Job, module: nn.Module | None = None) -> Engine:
    """An engine for the small model that all checks train."""
    return job.engine(module or models.mlp())


def trains(job: Job, steps: int) -> list[float]:
    """Losses of a training from the beginning."""
    return train(build(job), 0, steps)


def autocasts(job: Job, steps: int) -> tuple[list[float], str]:
    """Losses of a training under autocast, and the dtype that a linear layer computes in."""
    module, seen = models.mlp(), []
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(lambda _, __, output: seen.append(str(output.dtype)))
    return train(build(job, module), 0, steps), seen[0]


def continues(job: Job, folder: str, steps: int) -> tuple[list[float], list[float]]:
    """Losses after a checkpoint: of the job that wrote it, and of another that loaded it."""
    engine = build(job)
    train(engine, 0, steps)
    engine.save_checkpoint(folder)
    expected = train(engine, steps, steps)
    other = build(job)
    other.load_checkpoint(folder)
    return expected, train(other, steps, steps)


def _collectives(job: Job, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, result, what it should be); small integers, which every dtype holds exactly."""
    communicator, size, rank, device = job.communicator, job.world_size, job.rank, job.device

    def of(rank: int) -> torch.Tensor:
        return torch.arange(3 * size, dtype=dtype) + 10 * rank

    def empty(numel: int) -> torch.Tensor:
        return torch.full((numel,), -1, dtype=dtype, device=device)

    mine, everybody = slice(3 * rank, 3 * rank + 3), torch.stack([of(r) for r in range(size)])
    for operator, combined in ((Op.SUM, everybody.sum(0).to(dtype)), (Op.MAX, of(size - 1))):
        values = of(rank).to(device)
        communicator.all_reduce(values, "world", TAG, op=operator, asynchronous=True).wait()
        yield f"all_reduce ({operator.value})", values, combined
        part = empty(3)
        communicator.reduce_scatter(part, of(rank).to(device), "world", TAG, op=operator)
        yield f"reduce_scatter ({operator.value})", part, combined[mine]
    whole = empty(3 * size)
    communicator.all_gather(whole, of(rank)[:3].to(device), "world", TAG)
    yield "all_gather", whole, everybody[:, :3].flatten()
    values = of(rank).to(device)
    communicator.broadcast(values, "world", TAG, source=size - 1)
    yield "broadcast", values, of(size - 1)
    whole = empty(3 * size)
    communicator.all_to_all(whole, of(rank).to(device), "world", TAG)
    yield "all_to_all", whole, everybody[:, mine].flatten()
    communicator.barrier("world", TAG)


def _steps() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    return (torch.randn(1000, generator=generator) for _ in range(5))


def _weights() -> torch.Tensor:
    return torch.randn(1000, generator=torch.Generator().manual_seed(7))


def _updated(rule: UpdateRule, job: Job) -> torch.Tensor:
    originals = _weights().to(job.device)
    spec = BucketSpec(
        key="conformance",
        numel=1000,
        segments=(Segment("weights", (1000,), 0, 1000, 0),),
        parameter_dtype=torch.float32,
        gradient_dtype=torch.float32,
        master_dtype=torch.float32,
        state_dtype=torch.float32,
        reduction=("dp",),
        rule=rule,
        group=0,
        device=job.device,
    )
    home, weights = DeviceHome(spec), originals.clone()
    home.adopt(weights, originals)
    for gradient in _steps():
        there = (4 * gradient).to(job.device)
        home.gradient_ready(there)
        home.update(there, rule.defaults, 0.25)
        home.publish()
    return weights


def _updated_by_torch(name: str, params: Mapping[str, Any]) -> torch.Tensor:
    weights = nn.Parameter(_weights().double())
    construct: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, name)
    optimizer = construct([weights], **params)
    for gradient in _steps():
        weights.grad = gradient.double()
        optimizer.step()
    return weights.detach()

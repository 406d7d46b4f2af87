"""Trains on ranks with ZeRO and in one process with plain torch, and compares both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import drivetrain
from drivetrain.contracts import Plugin
from drivetrain.engine.engine import Engine
from drivetrain.plan.registry import Registry
from drivetrain.states.whole import whole
from drivetrain.testing import reference_losses, run_distributed
from drivetrain.testing.data import Samples
from drivetrain.testing.reference import Case

Parameters = Mapping[str, torch.Tensor]
Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

MICRO_BATCH = 2

PRECISIONS: Mapping[str, tuple[dict[str, Any], torch.dtype, float]] = {
    "fp32": ({}, torch.float32, 1e-6),
    "bf16": ({"bf16": {"enabled": True}}, torch.bfloat16, 2e-2),
    "fp16": ({"fp16": {"enabled": True, "loss_scale": 128.0}}, torch.float16, 2e-3),
}
"""Name -> config, dtype, bound of a loss's relative difference: for 16 bits about two units of
rounding (2^-8, 2^-11), since only the order differs in which gradients are rounded and added."""


Stage = int | str

IN_FORWARD: Stage = "2, gathered in forward"
"""Stage 2 with ``overlap_param_gather``, ahead of use."""


def config(stage: Stage, **changes: Any) -> dict[str, Any]:
    """A small job with AdamW; keys of ``zero`` go to its section, and nothing stays gathered."""
    zero = changes.pop("zero", {})
    if stage == IN_FORWARD:
        stage, zero = 2, {"overlap_param_gather": True, "overlap_comm": True, **zero}
    return {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": changes.pop("accumulation", 1),
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
        **changes,
    }


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """What :func:`config` asks for."""
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


SGD: dict[str, Any] = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """What :data:`SGD` asks for."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def run_engine(engine: Engine, micro_batches: Sequence[Samples], step: int) -> float:
    """The usual loop over one step's micro-batches of this rank; their mean loss."""
    total = 0.0
    for inputs, targets in micro_batches:
        loss = engine(inputs, targets)
        engine.backward(loss)
        engine.step()
        total += loss.item()
    return total / len(micro_batches)


@dataclass(frozen=True)
class Run:
    """One training on ranks; everything in it can be pickled.

    Args:
        config: of the job.
        case: model and data.
        steps: optimizer steps.
        loop: runs one step.
        optimizer: the client's: a callable over parameters; ``None`` for the config's.
        groups: makes parameter groups of the model; ``None`` for one group.
        plugins: beside those installed.
        shards: data shards for a world; all ranks by default.
    """

    config: dict[str, Any]
    case: Case
    steps: int = 4
    loop: Callable[[Engine, Sequence[Samples], int], float] = run_engine
    optimizer: Callable[..., Any] | None = None
    groups: Callable[[nn.Module], list[Any]] | None = None
    plugins: Sequence[type[Plugin]] = field(default=())

    def engine(self) -> Engine:
        """This rank's engine."""
        module = self.case.model()
        trained = None if self.groups is None else self.groups(module)
        client = self.optimizer
        if client is not None and self.groups is not None:
            client = client(trained)
        engine, *_ = drivetrain.initialize(
            model=module,
            model_parameters=trained,
            optimizer=client,
            config=self.config,
            registry=Registry.installed().with_plugins(*self.plugins),
        )
        return engine


def batches(run: Run, shards: int, steps: int | None = None) -> list[list[list[Samples]]]:
    """Samples by step, micro-batch and data shard."""
    steps = run.steps if steps is None else steps
    accumulation = run.config["gradient_accumulation_steps"]
    inputs, targets = run.case.data(steps * accumulation * shards * MICRO_BATCH)
    pairs = zip(inputs.split(MICRO_BATCH), targets.split(MICRO_BATCH), strict=True)
    flat = iter(list(pairs))
    return [
        [[next(flat) for _ in range(shards)] for _ in range(accumulation)] for _ in range(steps)
    ]


def train(run: Run) -> tuple[list[float], Parameters]:
    """One rank: its losses by step, and all parameters whole at the end."""
    engine = run.engine()
    losses = train_steps(run, engine, range(run.steps))
    parameters = whole_parameters(engine)
    engine.destroy()
    return losses, parameters


def train_steps(run: Run, engine: Engine, steps: range) -> list[float]:
    """Losses of some of the run's steps."""
    mesh = engine.job.mesh
    shard, dtype = mesh.coordinate("dp"), compute_dtype(run.config)
    every = batches(run, mesh.size("dp"), steps.stop)
    losses = []
    for step in steps:
        own = [(_cast(x[shard][0], dtype), x[shard][1]) for x in every[step]]
        losses.append(run.loop(engine, own, step))
    return losses


def whole_parameters(engine: Engine) -> Parameters:
    """Every parameter by the client's name, in fp32 where it is a number."""
    table = engine.job.parameters
    with whole(engine.module):
        return {table.info(p).name: p.detach().float().clone() for p in engine.module.parameters()}


def compute_dtype(settings: Mapping[str, Any]) -> torch.dtype:
    """Dtype of parameters and inputs."""
    for section, dtype, _ in PRECISIONS.values():
        if section and all(settings.get(key) for key in section):
            return dtype
    return torch.float32


def plain(
    run: Run, shards: int, optimizer: Optimizer = adamw, **options: Any
) -> tuple[list[float], Parameters]:
    """The same training in one process with nothing but torch."""
    model = run.case.model()
    steps = [[pair for micro in step for pair in micro] for step in batches(run, shards)]
    fp16 = run.config.get("fp16", {})
    losses = reference_losses(
        model,
        steps,
        optimizer,
        clipping=run.config["gradient_clipping"],
        compute_dtype=compute_dtype(run.config),
        loss_scale=fp16.get("loss_scale", 1.0),
        **options,
    )
    return losses, {name: p.detach().float() for name, p in model.named_parameters()}


def assert_equal_to_plain(
    run: Run,
    world: int,
    *,
    shards: int | None = None,
    optimizer: Optimizer = adamw,
    rtol: float = 1e-6,
    expected: tuple[list[float], Parameters] | None = None,
    compare_parameters: bool = True,
    **options: Any,
) -> None:
    """Train on ``world`` ranks; losses and, in fp32, all parameters must be those of plain torch.

    Args:
        run: what the ranks do.
        world: number of ranks.
        shards: data shards, if not every rank is one.
        optimizer: of the reference.
        rtol: relative difference of any loss.
        expected: the reference, if it is not the usual loop.
        compare_parameters: whether parameters are compared too, in fp32.
        options: of ``reference_losses``.
    """
    shards = world if shards is None else shards
    answers = run_distributed(train, world, run)
    losses, parameters = expected or plain(run, shards, optimizer, **options)
    means = [math.fsum(step) / world for step in zip(*(a[0] for a in answers), strict=True)]
    for step, (ours, theirs) in enumerate(zip(means, losses, strict=True)):
        difference = abs(ours - theirs) / abs(theirs)
        assert difference <= rtol, f"step {step}: {ours!r}, plain {theirs!r}: {difference:.1e}"
    if not compare_parameters or compute_dtype(run.config) is not torch.float32:
        return
    for _, found in answers:
        assert_parameters_equal(found, parameters)
    assert set().union(*(found for _, found in answers)) == set(parameters)


def assert_parameters_equal(found: Parameters, expected: Parameters) -> None:
    """Within the rounding of a few fp32 additions in another order, by Adam magnified."""
    for name, values in found.items():
        torch.testing.assert_close(
            values,
            expected[name],
            rtol=1e-4,
            atol=3e-6,
            msg=lambda text, name=name: f"parameter {name}: {text}",
        )


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor

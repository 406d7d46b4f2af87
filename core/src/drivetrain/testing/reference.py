"""Plain torch training loops, which jobs of any shape are held against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from drivetrain.testing import data, models
from drivetrain.testing.data import Samples
from drivetrain.testing.distributed import run_distributed


@dataclass(frozen=True)
class Case:
    """A model with data to train it on; functions at the level of a module, so that ranks can be
    told of them.

    Args:
        model: builds the module, the same every time; ``module(inputs, targets)`` is its loss, a
            mean over samples.
        data: returns that many samples.
    """

    model: Callable[[], nn.Module]
    data: Callable[[int], Samples]


CASES: Mapping[str, Case] = {
    "mlp": Case(models.mlp, data.vectors),
    "gpt": Case(models.tiny_gpt, data.tokens),
    "tied": Case(models.tied_gpt, data.tokens),
    "conv": Case(models.conv_net, data.images),
}
"""The cases that can be named. ``conv`` has batch statistics, so it is equal to the reference only
when that sees the same micro-batches."""


def reference_losses(
    model: nn.Module,
    steps: Iterable[Sequence[Samples]],
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    *,
    clipping: float = 0.0,
    learning_rate: Callable[[int], float] | None = None,
    compute_dtype: torch.dtype = torch.float32,
    loss_scale: float = 1.0,
) -> list[float]:
    """Train one process's copy of ``model`` with nothing but torch.

    Args:
        model: trained in place; its dtype is that of the master weights.
        steps: for each step its micro-batches, those of all data shards.
        optimizer: builds the optimizer from the parameters.
        clipping: largest norm of the whole gradient; 0 for none.
        learning_rate: of a step, counted from 0; the optimizer's own if not given.
        compute_dtype: of parameters, floating inputs and gradients within a micro-batch. When it
            is not the model's, gradients are added up in the model's.
        loss_scale: factor on the loss during backward, for float16.

    Returns:
        Each step's mean loss over its micro-batches, before the update.
    """
    worker = copy.deepcopy(model).to(compute_dtype)
    parameters = [p for p in model.parameters() if p.requires_grad]
    work_parameters = [p for p in worker.parameters() if p.requires_grad]
    update = optimizer(parameters)
    losses = []
    for step, micro_batches in enumerate(steps):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        total = 0.0
        for inputs, targets in micro_batches:
            worker.zero_grad()
            loss = worker(_cast(inputs, compute_dtype), targets)
            (loss * loss_scale).backward()
            total += loss.item()
            for parameter, work in zip(parameters, work_parameters, strict=True):
                if work.grad is not None and parameter.grad is not None:
                    share = work.grad.to(parameter.dtype) / loss_scale / len(micro_batches)
                    parameter.grad += share
        losses.append(total / len(micro_batches))
        if clipping > 0:
            torch.nn.utils.clip_grad_norm_(parameters, clipping)
        if learning_rate is not None:
            for group in update.param_groups:
                group["lr"] = learning_rate(step)
        update.step()
        with torch.no_grad():
            for parameter, work in zip(parameters, work_parameters, strict=True):
                work.copy_(parameter)
    return losses


def assert_trains_like_reference(
    config: Mapping[str, Any],
    world_size: int,
    *,
    model: str | Case = "mlp",
    steps: int = 20,
    rtol: float = 1e-6,
    learning_rate: Callable[[int], float] | None = None,
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext,
    timeout: float = 300.0,
) -> list[float]:
    """Train with ``config`` on ``world_size`` ranks and compare every loss with plain torch.

    The batch sizes, ``gradient_clipping``, ``optimizer`` (Adam, AdamW, SGD, or a class of
    ``torch.optim``), ``bf16`` and ``fp16`` of the config decide what the reference does; other
    keys, such as a plugin's, must not change what is learned.

    Args:
        config: with ``train_batch_size`` and, where micro-batches matter, the other two sizes.
        world_size: number of ranks.
        model: a name in :data:`CASES`, or a case.
        steps: optimizer steps.
        rtol: largest relative difference of any loss.
        learning_rate: of a step, counted from 0, when the config has a scheduler.
        inside: makes a context that every rank trains in, e.g. one that plants a bug.
        timeout: seconds that the ranks may take.

    Returns:
        The losses of the ranks, mean over data shards, by step.

    Raises:
        AssertionError: naming the first step that differs, with both losses.
        RanksFailedError: a rank raised.
    """
    case = CASES[model] if isinstance(model, str) else model
    answers = run_distributed(
        _train_inside, world_size, inside, dict(config), case, steps, timeout=timeout
    )
    by_shard: dict[int, list[float]] = {answer["shard"]: answer["losses"] for answer in answers}
    losses = [sum(step) / len(by_shard) for step in zip(*by_shard.values(), strict=True)]
    micro_batch = answers[0]["micro_batch"]
    batch = answers[0]["batch"]
    inputs, targets = case.data(steps * batch)
    batches = [
        [
            (inputs[at : at + micro_batch], targets[at : at + micro_batch])
            for at in range(step * batch, (step + 1) * batch, micro_batch)
        ]
        for step in range(steps)
    ]
    dtype, scale = _precision(config)
    expected = reference_losses(
        case.model(),
        batches,
        lambda parameters: _optimizer(config, parameters),
        clipping=float(config.get("gradient_clipping", 1.0)),
        learning_rate=learning_rate,
        compute_dtype=dtype,
        loss_scale=scale,
    )
    for step, (ours, plain) in enumerate(zip(losses, expected, strict=True)):
        if not abs(ours - plain) <= rtol * abs(plain):
            raise AssertionError(
                f"step {step} of {steps} on {world_size} ranks: loss {ours!r}, plain torch has "
                f"{plain!r}, relative difference {abs(ours - plain) / abs(plain):.2e} > {rtol:g}"
            )
    return losses


def _train_inside(
    inside: Callable[[], AbstractContextManager[Any]],
    config: dict[str, Any],
    case: Case,
    steps: int,
) -> dict[str, Any]:
    with inside():
        return _train(config, case, steps)


def _train(config: dict[str, Any], case: Case, steps: int) -> dict[str, Any]:
    """One rank's training; its micro-batches are every ``shards``-th of the step's."""
    import drivetrain

    module = case.model()
    engine, _, _, _ = drivetrain.initialize(
        model=module, model_parameters=list(module.parameters()), config=config
    )
    mesh = engine.job.mesh
    shard, shards = mesh.coordinate("dp"), mesh.size("dp")
    batch, micro_batch = engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()
    inputs, targets = case.data(steps * batch)
    dtype, _ = _precision(config)
    losses = []
    for step in range(steps):
        total = 0.0
        starts = range(step * batch + shard * micro_batch, (step + 1) * batch, shards * micro_batch)
        for at in starts:
            rows = slice(at, at + micro_batch)
            device = engine.device
            loss = engine(_cast(inputs[rows], dtype).to(device), targets[rows].to(device))
            engine.backward(loss)
            engine.step()
            total += loss.item()
        losses.append(total / len(starts))
    engine.job.close()
    return {"shard": shard, "losses": losses, "batch": batch, "micro_batch": micro_batch}


def _precision(config: Mapping[str, Any]) -> tuple[torch.dtype, float]:
    """What the ranks compute in, and the scale of the loss."""
    if config.get("bf16", {}).get("enabled"):
        return torch.bfloat16, 1.0
    fp16 = config.get("fp16", {})
    if fp16.get("enabled"):
        return torch.float16, fp16.get("loss_scale") or 2.0 ** fp16.get("initial_scale_power", 16)
    return torch.float32, 1.0


def _optimizer(config: Mapping[str, Any], parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    section = config["optimizer"]
    options = dict(section.get("params", {}))
    name = section["type"]
    # DeepSpeed's Adam decays weights as AdamW does unless it is told otherwise, and its default
    # is no decay, where torch's AdamW has 0.01.
    if name.lower() in ("adam", "adamw"):
        decoupled = options.pop("adam_w_mode", True) or name.lower() == "adamw"
        options.setdefault("weight_decay", 0.0)
        name = "AdamW" if decoupled else "Adam"
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(parameters, **options)
    return optimizer


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor

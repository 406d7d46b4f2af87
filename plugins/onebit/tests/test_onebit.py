"""1-bit Adam: exact while it warms up, the same on all ranks, and one bit per element after."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drivetrain_onebit.compression import average_, chunk_size, message_bytes
from torch import nn

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.contracts import Purpose, Tag
from drivetrain.engine.engine import Engine
from drivetrain.errors import CommunicationError, ConfigError
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.testing import run_distributed
from drivetrain.testing.models import mlp

BETAS, EPS, RATE, DECAY = (0.9, 0.95), 1e-8, 1e-3, 0.1
BATCH = 4

WARM_UP = 40
"""Twice the memory of the second moment: frozen earlier, it is too small and steps too long."""


def make(freeze_step: int) -> Engine:
    module = mlp()
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0.0,
        "optimizer": {
            "type": "OneBitAdam",
            "params": {
                "lr": RATE,
                "betas": list(BETAS),
                "eps": EPS,
                "weight_decay": DECAY,
                "freeze_step": freeze_step,
            },
        },
    }
    engine, *_ = drivetrain.initialize(
        model=module, model_parameters=module.parameters(), config=config
    )
    return engine


def samples(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(1000 * step + rank))
    return inputs, inputs.roll(1, dims=1)


def train(engine: Engine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = engine(*samples(step, Ranks.current().rank))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def weights(engine: Engine) -> list[float]:
    return nn.utils.parameters_to_vector(engine.module.parameters()).tolist()


# -- functions that run on every rank ---------------------------------------------------------


def warm_up() -> list[float]:
    engine = make(freeze_step=100)
    train(engine, range(10))
    answer = weights(engine)
    engine.destroy()
    return answer


def compressed(steps: int) -> tuple[list[float], list[float], dict[str, int]]:
    engine = make(WARM_UP)
    losses = train(engine, range(WARM_UP))
    log = engine.job.byte_log
    log.reset()
    losses += train(engine, range(WARM_UP, WARM_UP + steps))
    sent = {purpose.value: log.total(purpose).sent_bytes for purpose in Purpose}
    answer = weights(engine)
    engine.destroy()
    return losses, answer, sent


def average_twice(numel: int, vectors: list[list[list[float]]]) -> list[list[float]]:
    """Two rounds, so that the second sees the errors of the first."""
    plan = Plan.build({"train_micro_batch_size_per_gpu": 1}, world_size=Ranks.current().world_size)
    with Job.open(plan) as job:
        worker_error = torch.zeros(numel)
        server_error = torch.zeros(chunk_size(numel, job.world_size))
        answers = []
        for vector in vectors:
            tensor = torch.tensor(vector[job.rank])
            tag = Tag(Purpose.STATE, "test")
            average_(tensor, worker_error, server_error, job.communicator, "data", tag)
            answers.append(tensor.tolist())
    return answers


def resume(folder: str, stop: int | None) -> list[float]:
    engine = make(freeze_step=3)
    if stop is None:
        train(engine, range(12))
    else:
        train(engine, range(stop))
        engine.save_checkpoint(folder)
        engine.destroy()
        engine = make(freeze_step=3)
        engine.load_checkpoint(folder)
        train(engine, range(stop, 12))
    answer = weights(engine)
    engine.destroy()
    return answer


def as_deepspeed_calls_it(vectors: list[list[list[float]]]) -> tuple[list[list[float]], str]:
    """Buffers are padded to whole chunks there, and shaped."""
    from drivetrain_onebit.drop_in import CompressedBackend

    world = Ranks.current().world_size
    backend = CompressedBackend()
    try:
        backend.compressed_allreduce(torch.ones(8), torch.zeros(8), torch.zeros(8))
        problem = ""
    except CommunicationError as error:
        problem = str(error)
    plan = Plan.build({"train_micro_batch_size_per_gpu": 1}, world_size=world)
    with Job.open(plan) as job:
        numel = len(vectors[0][0])
        worker_error, server_error = torch.zeros(numel), torch.zeros(numel // world)
        found = []
        for vector in vectors:
            tensor = torch.tensor(vector[job.rank]).view(2, -1)
            errors = worker_error, server_error
            returned = backend.compressed_allreduce(tensor, *errors, job.rank)
            assert returned is tensor
            found.append(tensor.flatten().tolist())
        with pytest.raises(CommunicationError, match="worker_error has 1 elements"):
            backend.compressed_allreduce(tensor, torch.zeros(1), server_error)
    return found, problem


# -- references -------------------------------------------------------------------------------


def plain_adam(world: int, steps: int) -> list[float]:
    """Adam without bias correction in float64, from its formula."""
    module = mlp().double()
    parameters = list(module.parameters())
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    for step in range(steps):
        batches = [samples(step, rank) for rank in range(world)]
        losses = [nn.functional.mse_loss(module.layers(x.double()), y.double()) for x, y in batches]
        gradients = torch.autograd.grad(sum(losses[1:], losses[0]) / world, parameters)
        with torch.no_grad():
            for p, g, (m, v) in zip(parameters, gradients, moments, strict=True):
                m.mul_(BETAS[0]).add_(g, alpha=1 - BETAS[0])
                v.mul_(BETAS[1]).add_(g * g, alpha=1 - BETAS[1])
                p.sub_(RATE * (m / (v.sqrt() + EPS) + DECAY * p))
    return nn.utils.parameters_to_vector(parameters).tolist()


def direct_average(numel: int, vectors: list[list[list[float]]]) -> list[np.ndarray]:
    """The three steps of the primitive, written out for all ranks at once."""
    world = len(vectors[0])
    chunk = chunk_size(numel, world)
    worker_errors = np.zeros((world, numel))
    server_errors = np.zeros((world, chunk))
    answers = []
    for vector in vectors:
        values = np.array(vector) + worker_errors
        scales = np.linalg.norm(values, axis=1, keepdims=True) / np.sqrt(numel)
        sent = np.where(values >= 0, scales, -scales)
        worker_errors = values - sent
        mean = sent.mean(axis=0)
        answer = np.empty(numel)
        for server in range(world):
            part = slice(server * chunk, min((server + 1) * chunk, numel))
            held = len(mean[part])
            if held:
                value = mean[part] + server_errors[server, :held]
                scale = np.linalg.norm(value) / np.sqrt(held)
                answer[part] = np.where(value >= 0, scale, -scale)
                server_errors[server, :held] = value - answer[part]
        answers.append(answer)
    return answers


# -- claims -----------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_warm_up_is_adam_without_bias_correction(world: int) -> None:
    expected = plain_adam(world, 10)
    for answer in run_distributed(warm_up, world):
        assert answer == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("world", "numel"), [(2, 64), (2, 13), (3, 100), (4, 5)])
def test_the_average_follows_the_three_steps_of_the_paper(world: int, numel: int) -> None:
    random = np.random.default_rng(world * numel)
    vectors = random.normal(size=(2, world, numel)).astype(np.float32).tolist()
    expected = direct_average(numel, vectors)
    answers = run_distributed(average_twice, world, numel, vectors)
    assert all(answer == answers[0] for answer in answers)
    for answer, reference in zip(answers[0], expected, strict=True):
        assert answer == pytest.approx(reference.tolist(), rel=1e-5)


def test_compressed_allreduce_is_there_as_scripts_call_it() -> None:
    world, numel = 2, 32
    vectors = np.random.default_rng(5).normal(size=(2, world, numel)).astype(np.float32).tolist()
    expected = direct_average(numel, vectors)
    for answers, problem in run_distributed(as_deepspeed_calls_it, world, vectors):
        assert "needs an open job" in problem
        for answer, reference in zip(answers, expected, strict=True):
            assert answer == pytest.approx(reference.tolist(), rel=1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_after_the_warm_up_ranks_agree_and_go_on_learning(world: int) -> None:
    answers = run_distributed(compressed, world, 100)
    losses = np.mean([losses for losses, _, _ in answers], axis=0)
    assert all(weights == answers[0][1] for _, weights, _ in answers)
    assert losses[-10:].mean() < 0.9 * losses[WARM_UP - 10 : WARM_UP].mean()


def test_after_the_warm_up_bytes_are_those_of_the_formula() -> None:
    steps = 10
    numel = sum(p.numel() for p in mlp().parameters())
    for _, _, sent in run_distributed(compressed, 2, steps):
        assert sent["gradient"] == 0
        # Signs and a scale to the other rank, twice; a dense all-reduce sends 4 bytes per element.
        assert sent["state"] == steps * message_bytes(numel, 2)
        assert message_bytes(numel, 2) == 2 * (4 + -(-numel // 16))


@pytest.mark.parametrize("stop", [2, 7])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path: Path, stop: int) -> None:
    unbroken = run_distributed(resume, 2, str(tmp_path), None)
    assert run_distributed(resume, 2, str(tmp_path), stop) == unbroken


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"freze_step": 3}, r"freze_step.*freeze_step"),
        ({"bias_correction": True}, "bias_correction: must be false"),
        ({"freeze_step": -1}, "freeze_step"),
    ],
)
def test_wrong_parameters_are_refused(params: dict[str, Any], message: str) -> None:
    module = mlp()
    config = {"train_batch_size": 1, "optimizer": {"type": "OneBitAdam", "params": params}}
    with pytest.raises(ConfigError, match=message):
        drivetrain.initialize(model=module, model_parameters=module.parameters(), config=config)


def of_another_world(folder: str) -> tuple[list[str], list[float]]:
    """What loading says, and the weights after some more steps."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("drivetrain")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    engine = make(freeze_step=3)
    try:
        engine.load_checkpoint(folder)
        train(engine, range(7, 10))
        return said, weights(engine)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        engine.destroy()


def test_on_another_number_of_ranks_errors_start_from_zero_and_loading_says_so(
    tmp_path: Path,
) -> None:
    run_distributed(resume, 2, str(tmp_path), 7)
    answers = run_distributed(of_another_world, 3, str(tmp_path))
    said = " ".join(answers[0][0])
    assert "worker_error belongs to a rank and starts afresh" in said
    assert all(found == answers[0][1] for _, found in answers)
    assert all(math.isfinite(weight) for weight in answers[0][1])


def test_a_warm_up_longer_than_training_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    config = {
        "train_batch_size": 1,
        "optimizer": {"type": "OneBitAdam", "params": {"freeze_step": 1000}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 1000}},
    }
    with caplog.at_level(logging.WARNING, logger="drivetrain"):
        engine, *_ = drivetrain.initialize(model=mlp(), config=config)
    engine.destroy()
    assert "freeze_step is 1000, and scheduler.params.total_num_steps is 1000" in caplog.text
    assert "training ends before anything is compressed" in caplog.text


@pytest.mark.parametrize("kind", ["OneBitAdam", "OneBitLamb", "ZeroOneAdam"])
def test_sparse_gradients_are_refused_by_name(kind: str) -> None:
    module = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 1))
    config = {
        "train_batch_size": 1,
        "sparse_gradients": True,
        "optimizer": {"type": kind, "params": {}},
    }
    with pytest.raises(ConfigError, match=r"gradient of parameter 0\.weight is sparse"):
        drivetrain.initialize(model=module, config=config)

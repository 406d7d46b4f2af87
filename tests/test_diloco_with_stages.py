"""Replicas whose model is split between stages, or whose tensors are split, go the paper's way."""

from __future__ import annotations

import asyncio
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from drivetrain_communication.diloco.calendar import Calendar
from drivetrain_communication.diloco.meeting_point import MeetingPoint
from pipeline_models import TiedModel
from pipeline_models import data as stage_data
from tensor_decoder import Decoder
from tensor_decoder import data as decoder_data
from torch import nn

import drivetrain
from drivetrain.states.whole import whole
from drivetrain.testing import run_distributed

RATE, STEPS, MICRO_BATCHES, INNER, RANKS = 0.2, 5, 2, 2, 2

CASES: dict[str, dict[str, Any]] = {
    "two stages": {"pipeline": {"stages": 2}},
    "two stages, fragments, ZeRO": {
        "pipeline": {"stages": 2},
        "zero_optimization": {"stage": 1},
        "diloco": {"replicas": 2, "inner_steps": INNER, "fragments": 2},
    },
    "two parts of tensors": {"tensor_parallel": {"autotp_size": 2}},
}


def model_of(case: str) -> nn.Module:
    return TiedModel() if "stages" in case else Decoder()


def micro_batches(case: str, replica: int, step: int) -> list[tuple[torch.Tensor, ...]]:
    """Those of one step; replicas have different ones."""
    number = 2 * step + replica
    if "stages" in case:
        found = stage_data(number + 1, MICRO_BATCHES, 1)[number]
        return [(micro[0],) for micro in found]
    return [decoder_data(MICRO_BATCHES * number + micro) for micro in range(MICRO_BATCHES)]


def trained(replica: int, cases: list[str]) -> list[dict[str, torch.Tensor]]:
    """The whole weights that this rank has parts of, by case."""
    found = []
    for case in cases:
        engine, *_ = drivetrain.initialize(
            model=model_of(case),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "gradient_accumulation_steps": MICRO_BATCHES,
                "gradient_clipping": 0.0,
                "optimizer": {"type": "SGD", "params": {"lr": RATE}},
                "diloco": {"replicas": 2, "inner_steps": INNER},
                **CASES[case],
            },
        )
        for step in range(STEPS):
            batches = micro_batches(case, replica, step)
            if "stages" in case:
                engine.train_batch(iter([tokens for (tokens,) in batches]))
                continue
            for batch in batches:
                engine.backward(engine(*batch))
                engine.step()
        with whole(engine.module):
            info = engine.job.parameters.info
            found.append({info(p).name: p.detach().clone() for p in engine.module.parameters()})
        engine.destroy()
        engine.job.close()
    return found


def reference(case: str) -> list[dict[str, torch.Tensor]]:
    """Weights of both replicas, in one process and float64."""
    settings = {"fragments": 1, **CASES[case].get("diloco", {})}
    calendar = Calendar(INNER, settings["fragments"], 0)
    start = model_of(case).double()
    replicas = [copy.deepcopy(start) for _ in range(2)]
    anchor = {name: p.detach().clone() for name, p in start.named_parameters()}
    momentum = {name: torch.zeros_like(p) for name, p in anchor.items()}
    for step in range(STEPS):
        for number, replica in enumerate(replicas):
            losses = [replica(*batch) for batch in micro_batches(case, number, step)]
            parameters = list(replica.parameters())
            gradients = torch.autograd.grad(torch.stack(losses).mean(), parameters)
            for p, gradient in zip(parameters, gradients, strict=True):
                p.data -= RATE * gradient
        here = [dict(replica.named_parameters()) for replica in replicas]
        due = calendar.due(step + 1)
        for name in anchor:
            if due is None or calendar.fragment_of(name) != due:
                continue
            mean = anchor[name] - (here[0][name].data + here[1][name].data) / 2
            momentum[name] = 0.9 * momentum[name] + mean
            anchor[name] = anchor[name] - 0.7 * (mean + 0.9 * momentum[name])
            for parameters_here in here:
                parameters_here[name].data.copy_(anchor[name])
    return [{n: p.detach() for n, p in r.named_parameters()} for r in replicas]


@pytest.fixture(scope="module")
def found() -> list[list[list[dict[str, torch.Tensor]]]]:
    """By replica, rank and case."""
    point = MeetingPoint("127.0.0.1", 0, [].append)
    loop = asyncio.new_event_loop()
    task = loop.create_task(point.serve())

    def serve() -> None:
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(task)

    server = threading.Thread(target=serve)
    server.start()

    def one(replica: int) -> list[Any]:
        variables = {
            "DRIVETRAIN_REPLICA": str(replica),
            "DRIVETRAIN_MEETING_POINT": f"{point.host}:{point.port}",
        }
        return run_distributed(trained, RANKS, replica, list(CASES), env=variables)

    try:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, range(2)))
    finally:
        loop.call_soon_threadsafe(task.cancel)
        server.join()


@pytest.mark.parametrize("case", CASES)
def test_replicas_with_stages_or_parts_of_tensors_go_the_way_of_the_paper(
    found: list[list[list[dict[str, torch.Tensor]]]], case: str
) -> None:
    expected = reference(case)
    number = list(CASES).index(case)
    for replica in range(2):
        seen: set[str] = set()
        for rank in found[replica]:
            for name, value in rank[number].items():
                wanted = expected[replica][name].float()
                torch.testing.assert_close(value, wanted, rtol=0, atol=5e-6, msg=f"{case} {name}")
                seen.add(name)
        assert seen == set(expected[replica])

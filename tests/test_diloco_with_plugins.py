"""Replicas that average now and then go the same way at every ZeRO stage and where states are away.

Each replica is two ranks; what is compared is the same recipe in one process and float64.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from drivetrain_communication.diloco.meeting_point import MeetingPoint
from torch import nn

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.testing import run_distributed

RATE, STEPS, RANKS = 0.2, 8, 2

CASES: list[dict[str, Any]] = [
    {"zero_optimization": {"stage": 1}},
    {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    {"zero_optimization": {"stage": 3}},
    {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
    {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},
        "bf16": {"enabled": True},
    },
    {"gradient_accumulation_steps": 2, "zero_optimization": {"stage": 2}},
]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8, bias=False))


def batch(replica: int, rank: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10_000 * replica + 100 * rank + number)
    inputs = torch.randn(4, 8, generator=generator)
    return inputs, inputs.roll(1, dims=1)


def replica_of(replica: int, cases: list[dict[str, Any]]) -> list[torch.Tensor]:
    found = []
    for case in cases:
        engine, *_ = drivetrain.initialize(
            model=model(),
            config={
                "train_micro_batch_size_per_gpu": 4,
                "gradient_clipping": 0.0,
                "optimizer": {"type": "SGD", "params": {"lr": RATE}},
                "diloco": {"replicas": 2, "inner_steps": 4, "fragments": 2},
                **case,
            },
        )
        for number in range(STEPS * case.get("gradient_accumulation_steps", 1)):
            x, y = batch(replica, Ranks.current().rank, number)
            x, y = (x.bfloat16(), y.bfloat16()) if "bf16" in case else (x, y)
            engine.backward((engine(x) - y).float().square().mean())
            engine.step()
        with drivetrain.whole(engine.module):
            found.append(nn.utils.parameters_to_vector(engine.module.parameters()).detach().clone())
        engine.job.close()
    return found


def reference(accumulation: int) -> torch.Tensor:
    """Both replicas end with fragment 0 averaged; fragment 1 (the second layer) is their own."""
    replicas = [model().double() for _ in range(2)]
    anchor = copy.deepcopy(dict(replicas[0].named_parameters()))
    momentum = {name: torch.zeros_like(p.data) for name, p in anchor.items()}
    for step in range(STEPS):
        for number, replica in enumerate(replicas):
            data = [
                batch(number, rank, step * accumulation + micro)
                for rank in range(RANKS)
                for micro in range(accumulation)
            ]
            losses = [(replica(x.double()) - y.double()).square().mean() for x, y in data]
            torch.stack(losses).mean().backward()
            for p in replica.parameters():
                assert p.grad is not None
                p.data -= RATE * p.grad
                p.grad = None
        for name in anchor:
            if (step + 1) % 4 == 0:  # both layers have even numbers, so both are in fragment 0
                here = [dict(replica.named_parameters())[name].data for replica in replicas]
                mean = anchor[name].data - (here[0] + here[1]) / 2
                momentum[name] = 0.9 * momentum[name] + mean
                anchor[name].data -= 0.7 * (mean + 0.9 * momentum[name])
                for values in here:
                    values.copy_(anchor[name].data)
    return nn.utils.parameters_to_vector(anchor.values()).detach()


@pytest.fixture(scope="module")
def trained() -> list[list[list[torch.Tensor]]]:
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
        return run_distributed(replica_of, RANKS, replica, CASES, env=variables)

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(one, range(2)))
    loop.call_soon_threadsafe(task.cancel)
    server.join()
    return answers


@pytest.mark.parametrize("number", range(len(CASES)), ids=str)
def test_every_layout_goes_the_way_of_the_paper(
    trained: list[list[list[torch.Tensor]]], number: int
) -> None:
    case = CASES[number]
    expected = reference(case.get("gradient_accumulation_steps", 1))
    exact = "bf16" not in case
    ways = [rank[number] for replica in trained for rank in replica]
    for way in ways:
        assert torch.equal(way, ways[0])
        torch.testing.assert_close(
            way.double(), expected, rtol=0, atol=2e-6 if exact else 2e-2, msg=str(case)
        )

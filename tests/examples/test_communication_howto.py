"""Every config of the page on slow links trains, on ranks that end with the same weights."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_communication.diloco.meeting_point import MeetingPoint
from drivetrain_communication.routes.plugin import routers
from drivetrain_communication.routes.tune import tune
from torch import nn

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.testing import run_distributed
from drivetrain.testing.models import mlp

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "communication.md"
BLOCKS: list[dict[str, Any]] = [
    json.loads(block)
    for block in re.findall(r"^```json\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
]
STEPS = 4


def measured(path: str) -> None:
    config = {"train_batch_size": 2, "communication": {"routes": {}}}
    with Job.open(Plan.build(config, world_size=Ranks.current().world_size)) as job:
        table = tune(job, routers[job], ["world"], ["all_reduce"], [4096], 1e-4)
        if job.rank == 0:
            Path(path).write_text(table.dumps(), "utf-8")


def trained(blocks: list[dict[str, Any]], folder: str) -> list[tuple[float, torch.Tensor]]:
    table = f"{folder}/routes.json"
    if Ranks.current().world_size > 1:
        measured(table)
    found = []
    for block in blocks:
        routes = block.get("communication", {}).get("routes", {})
        if "table" in routes:
            routes["table"] = table
        engine, *_ = drivetrain.initialize(
            model=mlp(), config={"optimizer": {"type": "AdamW", "params": {}}, **block}
        )
        for step in range(STEPS):
            seed = 10 * step + Ranks.current().rank
            inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
            loss = engine(inputs, inputs.roll(1, dims=1))
            engine.backward(loss)
            engine.step()
        weights = nn.utils.parameters_to_vector(engine.module.parameters()).detach().clone()
        found.append((loss.item(), weights))
        engine.destroy()
        engine.job.close()
    return found


def check(answers: list[list[tuple[float, torch.Tensor]]]) -> None:
    for each in zip(*answers, strict=True):
        for loss, weights in each:
            assert loss == pytest.approx(loss)  # no NaN
            assert torch.equal(weights, each[0][1])


def test_the_blocks_of_the_page_train(tmp_path: Path) -> None:
    blocks = [block for block in BLOCKS if "diloco" not in block]
    assert len(blocks) == 4
    check(run_distributed(trained, 2, blocks, str(tmp_path)))


def test_the_replicas_of_the_page_train_and_average(tmp_path: Path) -> None:
    (block,) = (block for block in BLOCKS if "diloco" in block)
    # The last step ends with an average, so replicas end alike.
    block = {**block, "diloco": {**block["diloco"], "inner_steps": STEPS}}
    point = MeetingPoint("127.0.0.1", 0, [].append)
    loop = asyncio.new_event_loop()
    task = loop.create_task(point.serve())

    def serve() -> None:
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(task)

    server = threading.Thread(target=serve)
    server.start()

    def one(replica: int) -> Any:
        variables = {
            "DRIVETRAIN_REPLICA": str(replica),
            "DRIVETRAIN_MEETING_POINT": f"{point.host}:{point.port}",
        }
        return run_distributed(trained, 1, [block], str(tmp_path), env=variables)[0]

    try:
        with ThreadPoolExecutor(2) as pool:
            check(list(pool.map(one, range(2))))
    finally:
        loop.call_soon_threadsafe(task.cancel)
        server.join()

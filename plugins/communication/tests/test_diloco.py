"""DiLoCo: replicas that train apart follow the algorithm, come and go, and resume exactly."""

from __future__ import annotations

import asyncio
import copy
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from drivetrain_communication.diloco.command import replicas
from drivetrain_communication.diloco.exchange import Exchange
from drivetrain_communication.diloco.meeting_point import MeetingPoint, Visitor
from drivetrain_communication.diloco.plugin import trainings
from torch import nn

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.engine.engine import Engine
from drivetrain.errors import CheckpointError, CommunicationError, ConfigError
from drivetrain.plan.plan import Plan
from drivetrain.testing import RanksFailedError, run_distributed

RATE = 0.2
STEPS = 12


@pytest.fixture
def point() -> Iterator[MeetingPoint]:
    said: list[str] = []
    point = MeetingPoint("127.0.0.1", 0, said.append)
    point.said = said  # type: ignore[attr-defined]
    loop = asyncio.new_event_loop()

    def serve() -> None:
        asyncio.set_event_loop(loop)
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(task)

    task = loop.create_task(point.serve())
    thread = threading.Thread(target=serve)
    thread.start()
    yield point
    loop.call_soon_threadsafe(task.cancel)
    thread.join()


def together(
    point: MeetingPoint, replicas: int, ranks: int, function: Callable[..., Any], *arguments: Any
) -> list[list[Any]]:
    """What ``function(replica, *arguments)`` returns on each rank of each replica."""

    with ThreadPoolExecutor(replicas) as pool:
        calls = [
            pool.submit(alone, point, replica, ranks, function, *arguments)
            for replica in range(replicas)
        ]
        return [call.result() for call in calls]


def alone(
    point: MeetingPoint, replica: int, ranks: int, function: Callable[..., Any], *arguments: Any
) -> list[Any]:
    """What ``function(replica, *arguments)`` returns on each rank of one replica."""
    variables = {
        "DRIVETRAIN_REPLICA": str(replica),
        "DRIVETRAIN_MEETING_POINT": f"{point.host}:{point.port}",
    }
    return run_distributed(function, ranks, replica, *arguments, env=variables)


def model() -> nn.Module:
    last = nn.Sequential(nn.Tanh(), nn.Linear(16, 8, bias=False))
    return nn.Sequential(nn.Linear(8, 16), last)  # blocks 0 and 1


def loss_of(module: Callable[..., torch.Tensor], step: tuple[torch.Tensor, torch.Tensor]) -> Any:
    return (module(step[0]) - step[1]).square().mean()


def make(replica: int, **config: Any) -> Engine:
    torch.manual_seed(replica)  # replicas begin with different weights
    diloco = {"replicas": 2, "inner_steps": 4, **config.pop("diloco", {})}
    engine, *_ = drivetrain.initialize(
        model=model(),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
            "diloco": diloco,
            **config,
        },
    )
    return engine


def batch(replica: int, rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10_000 * replica + 100 * rank + step)
    inputs = torch.randn(4, 8, generator=generator)
    return inputs, inputs.roll(1, dims=1)


def train(engine: Engine, replica: int, steps: range) -> None:
    for step in steps:
        engine.backward(loss_of(engine, batch(replica, Ranks.current().rank, step)))
        engine.step()


def weights(engine: Engine) -> torch.Tensor:
    return nn.utils.parameters_to_vector(engine.module.parameters()).detach().clone()


def several_runs(replica: int, cases: list[dict[str, Any]]) -> list[tuple[torch.Tensor, int]]:
    found = []
    for case in cases:
        engine = make(replica, diloco=case)
        train(engine, replica, range(STEPS))
        trainings[engine].finish()
        found.append((weights(engine), trainings[engine].rounds.sent_bytes))
        engine.job.close()
    return found


def reference(case: dict[str, Any], ranks: int) -> list[torch.Tensor]:
    """Both replicas' weights by the papers' formulas, in one process and float64."""
    inner, parts = 4, case.get("fragments", 1)
    delay, mixing = case.get("delay", 0), case.get("mixing", 0.5) if case.get("delay") else 0.0
    rate, decay = case.get("outer_learning_rate", 0.7), case.get("outer_momentum", 0.9)
    torch.manual_seed(0)
    start = model().double()
    replicas = [copy.deepcopy(start) for _ in range(2)]
    names = [name for name, _ in start.named_parameters()]
    part_of = {name: int(name.split(".")[0]) % parts for name in names}
    anchor = {name: p.detach().clone() for name, p in start.named_parameters()}
    momentum = {name: torch.zeros_like(p) for name, p in anchor.items()}
    under_way: dict[str, tuple[int, torch.Tensor]] = {}
    for step in range(STEPS):
        for number, replica in enumerate(replicas):
            data = [batch(number, rank, step) for rank in range(ranks)]
            loss = sum(loss_of(replica, (x.double(), y.double())) for x, y in data) / ranks
            gradients = torch.autograd.grad(loss, list(replica.parameters()))
            with torch.no_grad():
                for p, gradient in zip(replica.parameters(), gradients, strict=True):
                    p -= RATE * gradient
        done = step + 1
        here = [dict(replica.named_parameters()) for replica in replicas]
        for name in names:
            if done % inner == inner * part_of[name] // parts and done >= 1:
                came = [anchor[name] - parameters[name].detach() for parameters in here]
                under_way[name] = (done + delay, (came[0] + came[1]) / 2)
            if under_way.get(name, (-1,))[0] == done:
                mean = under_way.pop(name)[1]
                momentum[name] = decay * momentum[name] + mean
                anchor[name] = anchor[name] - rate * (mean + decay * momentum[name])
                with torch.no_grad():
                    for parameters in here:
                        p = parameters[name]
                        p.copy_(mixing * p + (1 - mixing) * anchor[name])
    return [nn.utils.parameters_to_vector(r.parameters()).detach() for r in replicas]


CASES: list[dict[str, Any]] = [
    {},
    {"outer_momentum": 0.0, "outer_learning_rate": 1.0},  # averaging of weights
    {"fragments": 2},
    {"fragments": 2, "delay": 1},
    {"delay": 3, "mixing": 0.25},
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_replicas_go_the_way_of_the_papers(point: MeetingPoint, ranks: int) -> None:
    answers = together(point, 2, ranks, several_runs, CASES)
    for number, case in enumerate(CASES):
        expected = reference(case, ranks)
        for replica in range(2):
            for rank in range(ranks):
                found = answers[replica][rank][number][0].double()
                torch.testing.assert_close(
                    found, expected[replica], rtol=0, atol=2e-6, msg=f"{case} {replica}"
                )
        sent = sum(answers[0][rank][number][1] for rank in range(ranks))
        rounds = STEPS // 4
        numel = expected[0].numel()
        founding = numel * 2 * 4  # anchors and momenta, once, from replica 0
        # Two replicas: half of the numbers to the other one, and half of the means.
        assert sent == pytest.approx(founding + rounds * numel * 4, rel=0.02)


def few_bits(replica: int) -> list[tuple[torch.Tensor, int]]:
    formats = ["fp32", "bf16", "int8", "int4", "fp8_e4m3"]
    return several_runs(replica, [{"outer_gradients": name, "block": 16} for name in formats])


def test_few_bits_bring_all_to_the_same_place(point: MeetingPoint) -> None:
    answers = together(point, 2, 1, few_bits)
    exact = answers[0][0][0][0]
    founding = exact.numel() * 8
    sizes = []
    for number, error in enumerate([0.0, 2e-3, 2e-3, 4e-2, 2e-2]):
        here, there = answers[0][0][number], answers[1][0][number]
        assert torch.equal(here[0], there[0])  # the run ends with an average
        assert (here[0] - exact).norm() <= error * exact.norm()
        sizes.append((here[1] - founding) / exact.numel() / (STEPS // 4))
    assert sizes == pytest.approx([4, 2, 1.25, 0.75, 1.25], rel=0.08)  # a scale of 4 bytes for 16


def comes_and_goes(replica: int, folder: str) -> list[torch.Tensor]:
    """Replica 1 ends after 6 steps without a word and comes back as a new job after 12."""
    engine = make(replica)
    marker = Path(folder) / "again"
    if replica == 0:
        train(engine, 0, range(12))
        alone = weights(engine)
        marker.touch()
        while len(trainings[engine].rounds.members) < 2:
            train(engine, 0, range(4))
            time.sleep(0.05)
        answer = [alone, weights(engine)]
        engine.job.close()
        return answer
    train(engine, 1, range(6))
    trainings[engine].close()
    while not marker.exists():
        time.sleep(0.05)
    engine.job.close()
    engine = make(replica)
    engine(batch(1, 0, 0)[0])
    answer = [weights(engine)]
    engine.job.close()
    return answer


def test_the_others_go_on_without_a_replica_and_it_comes_back(
    point: MeetingPoint, tmp_path: Path
) -> None:
    answers = together(point, 2, 1, comes_and_goes, str(tmp_path))
    alone, after = answers[0][0]
    (back,) = answers[1][0]
    assert torch.equal(after, back)
    expected = reference_alone()
    torch.testing.assert_close(alone.double(), expected, rtol=0, atol=2e-6)


def killed(replica: int) -> torch.Tensor:
    """Replica 1 dies in the middle of its second exchange."""
    engine = make(replica)
    if replica == 1:
        mean = Exchange.mean

        def last_words(self: Exchange, *arguments: Any) -> torch.Tensor:
            if trainings[engine].steps == 8:
                os.kill(os.getpid(), signal.SIGKILL)
            return mean(self, *arguments)

        Exchange.mean = last_words  # type: ignore[method-assign]
    train(engine, replica, range(12))
    answer = weights(engine)
    engine.job.close()
    return answer


def test_a_replica_killed_in_an_exchange_is_left_out_of_it(point: MeetingPoint) -> None:
    def one(replica: int) -> list[Any]:
        try:
            return alone(point, replica, 1, killed)
        except RanksFailedError:
            return []

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(one, range(2)))
    assert answers[1] == []
    torch.testing.assert_close(answers[0][0].double(), reference_alone(), rtol=0, atol=2e-6)


def reference_alone() -> torch.Tensor:
    """Replica 0 after 12 steps: one average with replica 1, then two of its own."""
    torch.manual_seed(0)
    start = model().double()
    replicas = [copy.deepcopy(start) for _ in range(2)]
    anchor = nn.utils.parameters_to_vector(start.parameters()).detach()
    momentum = torch.zeros_like(anchor)
    for step in range(12):
        for number, replica in enumerate(replicas):
            x, y = batch(number, 0, step)
            loss = loss_of(replica, (x.double(), y.double()))
            for p, g in zip(
                replica.parameters(),
                torch.autograd.grad(loss, list(replica.parameters())),
                strict=True,
            ):
                p.data -= RATE * g
        if step % 4 == 3:
            here = replicas if step == 3 else replicas[:1]
            came = [anchor - nn.utils.parameters_to_vector(r.parameters()).detach() for r in here]
            mean = torch.stack(came).mean(0)
            momentum = 0.9 * momentum + mean
            anchor = anchor - 0.7 * (mean + 0.9 * momentum)
            for replica in here:
                nn.utils.vector_to_parameters(anchor.clone(), replica.parameters())
    return anchor


def resumed(replica: int, folder: str, case: dict[str, Any], stop: int) -> list[torch.Tensor]:
    found = []
    for stops in (False, True):
        engine = make(replica, diloco=case)
        if stops:
            train(engine, replica, range(stop))
            place = f"{folder}/{replica}"
            engine.save_checkpoint(place)
            engine.job.close()
            engine = make(replica, diloco=case)
            engine.load_checkpoint(place)
        train(engine, replica, range(stop if stops else 0, STEPS))
        found.append(weights(engine))
        engine.job.close()
    return found


def test_a_resumed_run_has_the_same_bits(point: MeetingPoint, tmp_path: Path) -> None:
    case = {"fragments": 2, "delay": 1}
    answers = together(point, 2, 1, resumed, str(tmp_path), case, 7)
    for ((unbroken, again),) in answers:
        assert torch.equal(unbroken, again)
    under_way = together(point, 2, 1, resumed, str(tmp_path / "u"), case, 6)
    for ((unbroken, again),) in under_way:
        assert torch.equal(unbroken, again)


def same_folder(replica: int, folder: str) -> str:
    engine = make(replica)
    train(engine, replica, range(1))
    error = ""
    try:
        while replica == 1 and not Path(folder, "ready").exists():
            time.sleep(0.02)
        engine.save_checkpoint(folder)
        Path(folder, "ready").touch()
    except CheckpointError as caught:
        error = str(caught)
    engine.job.close()
    return error


def test_two_replicas_cannot_save_into_one_folder(point: MeetingPoint, tmp_path: Path) -> None:
    first, second = together(point, 2, 2, same_folder, str(tmp_path))
    assert first == ["", ""]
    assert all("holds checkpoints of replica 0" in error for error in second)


def loaded(replica: int) -> tuple[list[int], int]:
    engine = make(replica)
    data = [(torch.full((8,), float(i)), torch.zeros(8)) for i in range(64)]
    loader = engine.deepspeed_io(data)
    seen = [int(x) for batch in loader for x in batch[0][:, 0]]
    engine.job.close()
    return seen, len(loader)


def test_replicas_share_the_data(point: MeetingPoint) -> None:
    answers = together(point, 2, 2, loaded)
    seen = [x for replica in answers for rank in replica for x in rank[0]]
    assert sorted(seen) == list(range(64))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"replicas": 2, "replica": 2}, "2 is none of 2 replicas"),
        ({"replicas": 2, "replica": 0, "meeting_point": "nowhere"}, "expected host:port"),
        ({"replicas": 2, "inner_steps": 4, "delay": 4}, "under way when the next one begins"),
        ({"replicas": 2, "inner_steps": 4, "fragments": 8}, "fragments cannot travel"),
    ],
)
def test_what_cannot_be_is_refused_by_name(section: dict[str, Any], words: str) -> None:
    config = {"train_batch_size": 4, "diloco": {"meeting_point": "127.0.0.1:1", **section}}
    with pytest.raises(ConfigError, match=words):
        Plan.build(config, world_size=1)


def test_a_job_that_does_not_know_which_replica_it_is_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DRIVETRAIN_REPLICA", raising=False)
    with pytest.raises(ConfigError, match="which replica is this job"):
        make(0)


def nobody_there() -> str:
    engine = make(0, diloco={"replica": 0, "meeting_point": "127.0.0.1:1", "patience_seconds": 0.5})
    with pytest.raises(CommunicationError) as caught:
        train(engine, 0, range(1))
    return str(caught.value)


def test_a_meeting_point_that_is_not_there_is_named() -> None:
    for message in run_distributed(nobody_there, 2):
        assert "no meeting point of replicas answers at 127.0.0.1:1" in message


def test_the_command_serves_until_it_is_told_to_end() -> None:
    command = [sys.executable, "-m", "drivetrain.cli", "replicas", "meet", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        visitor = Visitor(("127.0.0.1", int(said.rpartition(":")[2])), 5.0)
        visitor.come(0, 0, {"replicas": 1})
        assert visitor.record()["members"] == [0]
        assert "replica 0 came" in process.stdout.readline()
        process.terminate()
        assert process.wait(20) == 0
        assert "closed" in process.stdout.read()


def test_a_port_in_use_is_one_message() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(replicas, ["meet", "--port", port])
    assert result.exit_code == 1
    assert f"cannot listen at 127.0.0.1:{port}" in result.output

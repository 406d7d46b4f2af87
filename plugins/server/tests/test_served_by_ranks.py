"""One model that two ranks share answers as one process does, and is started again as one."""

from __future__ import annotations

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from drivetrain_server import Server
from served import ENGINE, HELLO, client_of, settings, wait_for

from drivetrain.errors import ConfigError

pytest.importorskip("drivetrain_tensor", reason="drivetrain-tensor shares layers out")

SHARED = {**ENGINE, "tensor_parallel": {"autotp_size": 2}}


def ask(client, **options):
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 24, "temperature": 0, **options}
    return client.chat.completions.create(**asked)


def children(process):
    return [
        int(each)
        for path in Path(f"/proc/{process}/task").glob("*/children")
        for each in path.read_text().split()
    ]


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks Linux for processes")
def test_two_ranks_answer_as_one_process_and_die_as_one(folder, client):
    options = [
        {}, {"temperature": 1.0, "seed": 5}, {"n": 2, "seed": 3, "temperature": 1.0},
        {"response_format": {"type": "json_object"}, "temperature": 1.0, "seed": 1},
        {"presence_penalty": 1.5}, {"max_tokens": 3},
    ]  # fmt: skip
    wanted = [[c.message.content for c in ask(client, **each).choices] for each in options]
    with (
        Server(settings(folder, config=SHARED, ranks=2)) as server,
        client_of(server) as shared,
        ThreadPoolExecutor(len(options)) as many,
    ):
        found = many.map(lambda each: ask(shared, **each), options)
        assert [[c.message.content for c in each.choices] for each in found] == wanted

        worker = server.router.replicas[0]
        (other,) = children(worker.facts["process"])
        late = ask(shared, max_tokens=480, stream=True, extra_body={"ignore_eos": True})
        next(iter(late))
        os.kill(other, signal.SIGKILL)
        with pytest.raises(openai.APIError, match=r"rank 1 \(process \d+\) has ended"):
            list(late)
        wait_for(lambda: worker.restarts == 1 and worker.ready)
        assert [c.message.content for c in ask(shared).choices] == wanted[0]

        (other,) = children(worker.facts["process"])
        os.kill(other, signal.SIGKILL)  # between two steps
        wait_for(lambda: worker.restarts == 2)
        assert re.search(rf"rank 1 \(process {other}\) has ended by signal 9", worker.trouble)
        wait_for(lambda: worker.ready)
        last = worker.facts["process"]
    wait_for(lambda: not Path(f"/proc/{last}").exists())


@pytest.mark.long
def test_a_request_that_takes_too_long_ends_on_all_ranks(folder):
    with (
        Server(settings(folder, config=SHARED, ranks=2, request_seconds=0.3)) as server,
        client_of(server) as shared,
    ):
        found = ask(shared, max_tokens=480, extra_body={"ignore_eos": True})
        assert found.choices[0].finish_reason == "length"
        assert found.usage.completion_tokens < 480
        assert ask(shared, max_tokens=2).usage.completion_tokens == 2


def test_ranks_without_a_config_are_refused(folder):
    with pytest.raises(ConfigError, match="no config says how ranks share the model"):
        settings(folder, config=None, ranks=2)

"""Workers die, clients vanish, queues fill up and servers stop: everybody is told, and in time."""

from __future__ import annotations

import os
import signal
import threading
import time

import httpx2
import openai
import pytest
import tiny_model
from drivetrain_server import Server
from served import ENGINE, client_of, settings, wait_for

from drivetrain.errors import ConfigError

LONG = {
    "model": "tiny", "prompt": "a", "max_tokens": 480, "stream": True,
    "extra_body": {"ignore_eos": True},
}  # fmt: skip


def slow(folder, **options):
    """A server whose model is deep enough that a request takes a while."""
    return Server(settings(folder, **options))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("deep"), layers=24)


def status(server):
    return httpx2.get(f"{server.url}/live/status").json()


def process_of(server, worker=0):
    return server.router.replicas[worker].facts["process"]


def test_a_worker_that_is_killed_is_named_and_started_again(deep):
    with slow(deep, silence_seconds=4.0) as server, client_of(server) as client:
        before = client.completions.create(model="tiny", prompt="b", max_tokens=5, seed=1)
        stream = client.completions.create(**LONG)
        next(iter(stream))
        process = process_of(server)
        began = time.monotonic()
        os.kill(process, signal.SIGKILL)
        with pytest.raises(openai.APIError, match=rf"process {process}\) was ended by SIGKILL"):
            list(stream)
        assert time.monotonic() - began < 5
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="tiny", prompt="b", max_tokens=5)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "1"
        wait_for(lambda: httpx2.get(f"{server.url}/health").status_code == 200)
        assert status(server)["workers"][0]["restarts"] == 1
        again = client.completions.create(model="tiny", prompt="b", max_tokens=5, seed=1)
        assert again.choices[0].text == before.choices[0].text

        # One that stands still is noticed, too.
        stream = client.completions.create(**LONG)
        next(iter(stream))
        os.kill(process_of(server), signal.SIGSTOP)
        with pytest.raises(openai.APIError, match="has said nothing for"):
            list(stream)
        wait_for(lambda: httpx2.get(f"{server.url}/health").status_code == 200)


def test_limits_hold_and_clients_that_vanish_make_room(deep):
    keys = ("secret-key-1", "secret-key-2")
    with slow(deep, max_open=3, api_keys=keys, cors=("http://a.example",)) as server:
        with pytest.raises(openai.AuthenticationError):
            client_of(server, "wrong-key-1").models.list()
        assert httpx2.get(f"{server.url}/metrics").status_code == 401
        assert httpx2.get(f"{server.url}/health").status_code == 200
        given = {"authorization": "Bearer secret-key-2", "origin": "http://a.example"}
        found = httpx2.get(f"{server.url}/v1/models", headers=given)
        assert found.headers["access-control-allow-origin"] == "http://a.example"

        client = client_of(server, "secret-key-2")
        streams = [client.completions.create(**LONG) for _ in range(3)]
        with pytest.raises(openai.RateLimitError, match="3 results wait or run") as caught:
            client.completions.create(**LONG)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        with pytest.raises(openai.BadRequestError, match="asks for 4 results"):
            client.completions.create(**{**LONG, "n": 4})
        for stream in streams:
            stream.close()  # the connection is gone
        replica = server.router.replicas[0]
        wait_for(lambda: server.router.load == 0, 10)
        wait_for(lambda: replica.status.get("running") == replica.status.get("waiting") == 0, 10)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).completions.create(**{**LONG, "stream": False})
        wait_for(lambda: server.router.load == 0, 10)


def test_a_server_that_stops_finishes_what_runs(deep):
    with slow(deep) as server, client_of(server) as client:
        stream = client.completions.create(**LONG)
        first = next(iter(stream)).choices[0].text
        stopping = threading.Thread(target=server.close)
        stopping.start()
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert len(first) + sum(len(chunk.choices[0].text) for chunk in chunks) > 100
        stopping.join(30)
        assert not stopping.is_alive()
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{server.url}/health")


def test_more_requests_than_memory_wait_and_all_end(folder):
    small = {"inference": {**ENGINE["inference"], "cache_blocks": 10}}
    with slow(folder, config=small) as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match="more than the 80"):
            client.completions.create(model="tiny", prompt="a" * 60, max_tokens=40)
        found = client.completions.create(
            model="tiny", prompt=[f"{n} " for n in range(12)], max_tokens=60, n=2
        )
        assert len(found.choices) == 24
        assert all(choice.finish_reason in ("stop", "length") for choice in found.choices)


def test_two_replicas_share_the_work_and_one_that_dies_does_not_stop_the_other(folder):
    with slow(folder, replicas=2, threads=1) as server, client_of(server) as client:
        beginning = "once upon a time " * 20
        for number in range(4):  # one replica knows the beginning
            client.completions.create(model="tiny", prompt=f"{beginning}{number}", max_tokens=2)
        found = client.completions.create(model="tiny", prompt=f"{beginning}9", max_tokens=2)
        assert found.usage.prompt_tokens_details.cached_tokens > 300
        os.kill(process_of(server, 0), signal.SIGKILL)
        wait_for(lambda: not status(server)["workers"][0]["ready"], 10)
        assert httpx2.get(f"{server.url}/health").json()["status"] == "degraded"
        assert client.completions.create(model="tiny", prompt="x", max_tokens=2).choices
        wait_for(lambda: httpx2.get(f"{server.url}/health").json()["status"] == "ok")


def test_code_in_a_models_folder_is_never_run(tmp_path):
    folder = tiny_model.write(tmp_path / "evil")
    trace = tiny_model.with_code(folder)
    with slow(folder) as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match="no tokenizer"):
            client.completions.create(model="tiny", prompt="text", max_tokens=2)
        found = client.completions.create(
            model="tiny", prompt=[5, 6, 7], max_tokens=2, extra_body={"ignore_eos": True}
        )
        assert found.usage.completion_tokens == 2
    assert not trace.exists()


def test_a_model_that_cannot_be_served_ends_the_start(tmp_path):
    with pytest.raises(ConfigError, match="neither a folder nor a GGUF file"):
        slow(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="without API keys"):
        settings(tmp_path, host="0.0.0.0")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        slow(tmp_path)

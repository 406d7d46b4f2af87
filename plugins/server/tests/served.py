"""How tests make servers of the tiny model, and clients of them."""

from __future__ import annotations

import time

import openai
from drivetrain_server import Settings

ENGINE = {"inference": {"block_size": 8, "max_batch_tokens": 64, "max_sequences": 16}}
HELLO = [{"role": "user", "content": "Hello"}]


def settings(folder, **options):
    given = {"model": str(folder), "name": "tiny", "port": 0, "config": ENGINE, **options}
    return Settings(**given)


def client_of(server, key="unused", kind=openai.OpenAI):
    return kind(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=120)


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.02)

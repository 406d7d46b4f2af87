"""What is wrong with a request is said in OpenAI's shape, with its status, and others go on."""

from __future__ import annotations

import http.client
import json
import threading
from urllib.parse import urlsplit

import httpx2
import pytest
import tiny_model
from served import HELLO

CHAT = {"model": "tiny", "messages": HELLO, "max_tokens": 4}
PLAIN = {"model": "tiny", "prompt": "a", "max_tokens": 4}
NEVER = {"type": "object", "properties": {"a": False}, "required": ["a"]}
NEVER_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": NEVER}}
PART = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]


def nested(depth):
    value = "end"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("body", "status", "words", "param"),
    [
        ({**CHAT, "model": "gpt-9"}, 404, "there is no model 'gpt-9' here", "model"),
        ({**CHAT, "messages": []}, 400, "at least 1 item", "messages"),
        ({"model": "tiny"}, 400, "messages: Field required", "messages"),
        ({**CHAT, "frobnicate": 1}, 400, "unknown field: frobnicate", "frobnicate"),
        ({**CHAT, "n": 0}, 400, "n: ", "n"),
        ({**CHAT, "n": 10**30}, 400, "n: ", "n"),
        ({**CHAT, "n": 1000}, 400, "asks for 1000 results, and at most 128", "n"),
        ({**CHAT, "n": True}, 400, "n: ", "n"),
        ({**CHAT, "max_tokens": -1}, 400, "max_tokens: ", "max_tokens"),
        ({**CHAT, "max_tokens": 10**12}, 400, "this server makes at most 16384", "max_tokens"),
        ({**CHAT, "max_tokens": 600}, 400, "are more than the 512", None),
        ({**CHAT, "temperature": "hot"}, 400, "temperature: ", "temperature"),
        ({**CHAT, "temperature": -1}, 400, "temperature: ", "temperature"),
        ({**CHAT, "top_p": 0}, 400, "top_p: ", "top_p"),
        ({**CHAT, "stop": [""]}, 400, "at most 16 texts", "stop"),
        ({**CHAT, "stop": ["a"] * 17}, 400, "at most 16 texts", "stop"),
        ({**CHAT, "logit_bias": {"x": 1}}, 400, "logit_bias", "logit_bias"),
        ({**CHAT, "logit_bias": {"9999": 1}}, 400, "a token that the model has not", None),
        ({**CHAT, "top_logprobs": 2}, 400, "belongs to requests with logprobs", None),
        ({**CHAT, "stream_options": {}}, 400, "belongs to requests with stream", None),
        ({**CHAT, "messages": [{"role": "wizard"}]}, 400, "role", "messages.0.role"),
        ({**CHAT, "messages": PART}, 400, "no part of type image_url", "messages.0.content"),
        ({**CHAT, "messages": [{"role": "user", "content": "fail"}]}, 400, "roles must alternate",
         "messages"),
        ({**CHAT, "messages": [{"role": "user", "content": "loop"}]}, 400,
         "has not rendered these messages in 1 s", "messages"),
        ({**CHAT, "messages": [{"role": "user", "content": "x" * 600}]}, 400,
         "this server has room for 512", None),
        ({**CHAT, "tool_choice": "required"}, 400, "tool_choice needs tools", None),
        ({**CHAT, "response_format": NEVER_FORMAT}, 400, "no text can be held to the schema", None),
        ({**CHAT, "response_format": {"type": "json_schema"}}, 400, "must be there",
         "response_format"),
        ({**CHAT, "response_format": {"type": "regex", "pattern": "(["}}, 400, "the regex", None),
        ({**CHAT, "response_format": {"type": "json_object"}, "ignore_eos": True}, 400,
         "do not go with a response_format", None),
        ({**PLAIN, "prompt": ""}, 400, "the prompt is empty", "prompt"),
        ({**PLAIN, "prompt": []}, 400, "the prompt is empty", "prompt"),
        ({**PLAIN, "prompt": [[]]}, 400, "the prompt is empty", "prompt"),
        ({**PLAIN, "prompt": [10**6]}, 400, "tokens that are not in", None),
        ({**PLAIN, "prompt": {"a": 1}}, 400, "prompt", "prompt"),
        ({**PLAIN, "suffix": "x"}, 400, "suffix is not there", None),
        ({**PLAIN, "prompt": ["a"] * 200}, 400, "asks for 200 results", "n"),
        ({**PLAIN, "metadata": {"a": nested(80)}}, 400, "nested more than", None),
    ],
)  # fmt: skip
def test_a_wrong_request_is_told_what_is_wrong(server, client, body, status, words, param):
    path = "completions" if "prompt" in body else "chat/completions"
    found = httpx2.post(f"{server.url}/v1/{path}", json=body, timeout=60)
    error = found.json()["error"]
    assert found.status_code == status
    assert words in error["message"]
    assert error["param"] == param
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in found.text
    assert client.completions.create(**PLAIN).choices


@pytest.mark.parametrize(
    ("data", "headers", "status", "words"),
    [
        (b'{"model": "\xff"}', {}, 400, "not UTF-8: byte 11"),
        (b'{"model": "\\ud800"}', {}, 400, "half of a surrogate pair"),
        (b'{"model": ', {}, 400, "not JSON"),
        (b'{"temperature": NaN}', {}, 400, "NaN is no number of JSON"),
        (b"[" * 100_000, {}, 400, "nested"),
        (b"[]", {}, 400, "must be a JSON object"),
        (b"{}", {"content-type": "text/plain"}, 415, "must be application/json"),
        (b" " * (5 * 2**20), {}, 413, "more than 4194304 bytes"),
        (b"{}", {"host": "evil.example"}, 403, "not called 'evil.example'"),
        (b"{}", {"origin": "http://evil.example"}, 403, "pages of 'http://evil.example'"),
    ],
)
def test_what_is_no_request_is_refused(server, data, headers, status, words):
    given = {"content-type": "application/json", **headers}
    found = httpx2.post(f"{server.url}/v1/completions", content=data, headers=given, timeout=60)
    assert found.status_code == status
    assert words in found.json()["error"]["message"]


def test_a_body_without_end_is_cut_off(server):
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    pieces = (b"x" * 65536 for _ in range(200))
    try:
        connection.request(
            "POST", "/v1/completions", pieces, {"content-type": "application/json"},
            encode_chunked=True,
        )  # fmt: skip
        found = connection.getresponse()
        assert found.status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server has closed while we were still sending
    finally:
        connection.close()


def test_paths_and_methods_that_are_not_there_say_so(server):
    found = httpx2.get(f"{server.url}/v2/nothing")
    assert (found.status_code, found.json()["error"]["type"]) == (404, "not_found_error")
    assert httpx2.get(f"{server.url}/v1/completions").status_code == 405
    assert httpx2.get(f"{server.url}/static/..%2fapp.py").status_code == 404


def test_wrong_requests_do_not_disturb_one_that_streams(server, client):
    words = []

    def read():
        asked = {**PLAIN, "max_tokens": 300, "seed": 1, "stream": True}
        asked["extra_body"] = {"ignore_eos": True}
        words.extend(chunk.choices[0].text for chunk in client.completions.create(**asked))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        httpx2.post(f"{server.url}/v1/completions", json={**PLAIN, "prompt": "x" * 600})
        httpx2.post(f"{server.url}/v1/completions", content=json.dumps(PLAIN)[:9])
    reader.join(60)
    assert not reader.is_alive()
    alone = client.completions.create(
        **{**PLAIN, "max_tokens": 300, "seed": 1}, extra_body={"ignore_eos": True}
    )
    assert "".join(words) == alone.choices[0].text


def test_metrics_tell_of_requests_and_of_the_cache(server, client):
    client.completions.create(**PLAIN)
    text = httpx2.get(f"{server.url}/metrics").text
    assert 'drivetrain_server_requests_total{endpoint="/v1/completions",status="200"}' in text
    for name in ("tokens_total", "first_token_seconds_count", "up{", "cache_used{", "restarts{"):
        assert f"drivetrain_server_{name}" in text
    status = httpx2.get(f"{server.url}/live/status").json()
    assert status["tokens"] > 0
    assert status["capacity"] == tiny_model.CONTEXT
    assert httpx2.get(f"{server.url}/health").json()["status"] == "ok"

"""Vectors over HTTP are those of plain Transformers, for the clients that people use."""

from __future__ import annotations

import concurrent.futures
import socket
import subprocess
import sys

import openai
import pytest
import tiny_model
import torch
from drivetrain_server import Server
from drivetrain_server.workers.wire import packed
from served import client_of, settings
from transformers import BertConfig, BertModel


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny BERT with the mean over tokens, and what it says of a text in plain Transformers."""
    folder = tmp_path_factory.mktemp("encoder")
    words = tiny_model.tokenizer()
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, architectures=["BertModel"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertModel(config).eval()
    model.save_pretrained(folder)
    words.save_pretrained(folder)

    def plain(text):
        with torch.no_grad():
            states = model(torch.tensor([words(text)["input_ids"]])).last_hidden_state
        return torch.nn.functional.normalize(states[0].mean(0), dim=0)

    return folder, plain


@pytest.fixture(scope="module")
def client(encoder):
    with Server(settings(encoder[0], config=None)) as server, client_of(server) as found:
        yield found


def test_vectors_are_those_of_transformers(client, encoder):
    texts = ["a", "a longer text", "another"]
    for kind in ("float", "base64"):
        answer = client.embeddings.create(model="tiny", input=texts, encoding_format=kind)
        assert [each.index for each in answer.data] == [0, 1, 2]
        for text, each in zip(texts, answer.data, strict=True):
            found = each.embedding if kind == "float" else _decoded(each.embedding)
            torch.testing.assert_close(torch.tensor(found), encoder[1](text), rtol=0, atol=1e-5)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, texts))


def _decoded(text):
    import base64
    import struct

    raw = base64.b64decode(text)
    return struct.unpack(f"<{len(raw) // 4}f", raw)


def test_tokens_will_do_as_well(client, encoder):
    words = tiny_model.tokenizer()
    answer = client.embeddings.create(model="tiny", input=[words("text")["input_ids"]])
    found = torch.tensor(answer.data[0].embedding)
    torch.testing.assert_close(found, encoder[1]("text"), rtol=0, atol=1e-5)


def test_many_clients_get_their_own_vectors(client, encoder):
    texts = [f"text number {number}" for number in range(40)]

    def one(text):
        return client.embeddings.create(model="tiny", input=text).data[0].embedding

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for text, found in zip(texts, pool.map(one, texts), strict=True):
            torch.testing.assert_close(
                torch.tensor(found), encoder[1](text), rtol=0, atol=1e-5, msg=text
            )


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"input": ""}, 400, "a text is empty"),
        ({"input": []}, 400, "a text is empty"),
        ({"input": "x" * 65}, 400, "65 tokens, and the model takes 64"),
        ({"input": "a", "dimensions": 8}, 400, "vectors of one length"),
        ({"input": "a", "model": "other"}, 404, "there is no model"),
        ({"input": ["a"] * 3000}, 400, "at most 2048"),
    ],
    ids=["empty", "none", "long", "dimensions", "model", "many"],
)
def test_what_cannot_be_is_said(client, options, status, words):
    with pytest.raises(openai.APIStatusError, match=words) as caught:
        client.embeddings.create(**{"model": "tiny", **options})
    assert caught.value.status_code == status


def test_one_bad_text_does_not_hurt_others_of_its_batch(client):
    def one(text):
        try:
            return len(client.embeddings.create(model="tiny", input=text).data[0].embedding)
        except openai.BadRequestError:
            return 0

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, ["a", "x" * 65] * 8)) == [32, 0] * 8


def test_a_model_of_vectors_generates_nothing(client):
    with pytest.raises(openai.APIStatusError, match="generates none") as caught:
        client.completions.create(model="tiny", prompt="a")
    assert caught.value.status_code == 501
    assert [model.id for model in client.models.list().data] == ["tiny"]


def test_a_worker_ends_with_its_server(encoder):
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "drivetrain_server.workers.worker", str(theirs.fileno())]
    with ours, subprocess.Popen(command, pass_fds=(theirs.fileno(),)) as process:
        theirs.close()
        order = {"do": "load", "model": str(encoder[0]), "engine": "", "config": None}
        ours.sendall(packed({**order, "dtype": "", "weights": "", "threads": 1}))
        assert ours.recv(1)  # it serves
        ours.close()
        assert process.wait(60) == 1

"""Adapters are chosen by the name of the model, and exchanged while the server runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import httpx2
import openai
import pytest
import torch
from drivetrain_server import Server
from safetensors.torch import save_file
from served import HELLO, client_of, settings, wait_for

from drivetrain.errors import ConfigError


def written(folder: Path, seed: int) -> None:
    """An adapter of PEFT for the tiny model."""
    folder.mkdir(parents=True)
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(2):
        for part, shape in (("A", (4, 64)), ("B", (64, 4))):
            key = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight"
            tensors[key] = torch.randn(shape, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    known = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(known))


@pytest.fixture
def adapted(server, shelf):
    """Two adapters of the server of all tests, which has none before and after."""
    for seed, name in enumerate(("one", "two")):
        written(shelf / name, seed)
        assert httpx2.post(f"{server.url}/v1/adapters/{name}").status_code == 200
    yield server
    for name in list(server.router.shelf.paths):
        assert httpx2.delete(f"{server.url}/v1/adapters/{name}").json()["deleted"]
    for path in shelf.iterdir():
        shutil.rmtree(path)


def says(client, model):
    found = client.chat.completions.create(
        model=model, messages=HELLO, max_tokens=16, temperature=0
    )
    assert found.model == model
    return found.choices[0].message.content


def test_adapters_are_models_of_their_own_that_come_and_go(adapted, client, shelf):
    server = adapted
    assert [each.id for each in client.models.list()] == ["tiny", "one", "two"]
    texts = {name: says(client, name) for name in ("tiny", "one", "two")}
    assert len(set(texts.values())) == 3
    with pytest.raises(openai.NotFoundError, match="there is no model 'three'"):
        says(client, "three")

    shutil.move(shelf / "two", shelf / "three")
    written(shelf / "two", 0)  # what "one" has
    for name in ("two", "three"):
        assert httpx2.post(f"{server.url}/v1/adapters/{name}").status_code == 200
    assert says(client, "two") == texts["one"]
    assert says(client, "three") == texts["two"]
    assert httpx2.delete(f"{server.url}/v1/adapters/two").json()["deleted"]
    with pytest.raises(openai.NotFoundError):
        says(client, "two")


def test_adapters_that_are_not_there_or_damaged_are_refused(adapted, client, shelf):
    server = adapted
    (shelf / "damaged").mkdir()
    (shelf / "damaged" / "adapter_config.json").write_text("{}")
    for name, status, message in (
        ("damaged", 400, "cannot be loaded as an adapter"),
        ("missing", 404, "the folder of adapters has no 'missing'"),
        ("%2e%2e", 404, "'..' is no name of an adapter"),
        ("tiny", 404, "is no name of an adapter"),
    ):
        found = httpx2.post(f"{server.url}/v1/adapters/{name}")
        assert found.status_code == status
        assert message in found.text
    found = httpx2.delete(f"{server.url}/v1/adapters/missing")
    assert (found.status_code, "there is no adapter 'missing'" in found.text) == (404, True)
    assert says(client, "one")
    (shelf / "one" / "adapter_model.safetensors").write_bytes(b"no tensors")
    found = httpx2.post(f"{server.url}/v1/adapters/one")
    assert (found.status_code, "'one' is forgotten" in found.text) == (400, True)
    with pytest.raises(openai.NotFoundError):
        says(client, "one")


@pytest.mark.long
def test_a_worker_that_starts_again_loads_what_can_be_loaded(folder, tmp_path):
    for seed, name in enumerate(("one", "two")):
        written(tmp_path / name, seed)
    with Server(settings(folder, adapters=str(tmp_path))) as server, client_of(server) as client:
        before = says(client, "two")
        (tmp_path / "one" / "adapter_model.safetensors").write_bytes(b"no tensors")
        worker = server.router.replicas[0]
        os.kill(worker.facts["process"], signal.SIGKILL)
        wait_for(lambda: worker.restarts == 1 and worker.ready)
        assert says(client, "two") == before
        assert [each.id for each in client.models.list()] == ["tiny", "two"]
        assert "cannot be loaded as an adapter" in worker.facts["failed"]["one"]
    with pytest.raises(ConfigError, match="cannot be loaded as an adapter"):
        Server(settings(folder, adapters=str(tmp_path)))
    with pytest.raises(ConfigError, match="is no folder"):
        Server(settings(folder, adapters=str(tmp_path / "none")))

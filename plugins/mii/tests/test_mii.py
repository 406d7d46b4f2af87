"""MII's calls generate what plain Transformers does, in this process and in a server that stays."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mii
import pytest
import torch
from mii.deployments import DeploymentError
from mii.options import Sampling, read
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from drivetrain.errors import ConfigError

PROMPTS = ["DeepSpeed is", "Seattle is a", "x"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """Folder, model and tokenizer of a tiny Llama over bytes."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(BPE({word: place for place, word in enumerate(["<end>", *letters])}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    words = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        eos_token_id=0, bos_token_id=None, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    found = LlamaForCausalLM(config).eval()
    found.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder, found, words


def expected(model: tuple[Path, Any, Any], prompt: str, new: int) -> str:
    _, module, words = model
    ids = torch.tensor([words(prompt)["input_ids"]])
    with torch.no_grad():
        rows = module.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new
        )
    kept = [token for token in rows[0, ids.shape[1] :].tolist() if token]
    text: str = words.decode(kept)
    return text


@pytest.fixture(scope="session")
def pipe(model: tuple[Path, Any, Any]) -> Iterator[mii.MIIPipeline]:
    found = mii.pipeline(str(model[0]))
    yield found
    found.destroy()


@pytest.fixture(scope="session")
def deployed(
    model: tuple[Path, Any, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[mii.MIIClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        client = mii.serve(str(model[0]))
        yield client
        client.terminate_server()
        assert not client.deployment.lives()


def test_a_pipeline_generates_what_transformers_does(model: Any, pipe: mii.MIIPipeline) -> None:
    for prompt, found in zip(
        PROMPTS, pipe(PROMPTS, do_sample=False, max_new_tokens=12), strict=True
    ):
        assert found.generated_text == repr(found) == expected(model, prompt, 12)
        assert found.prompt_length == len(prompt)
        assert found.finish_reason in ("stop", "length")


def test_a_client_gets_the_same(model: Any, pipe: mii.MIIPipeline, deployed: mii.MIIClient) -> None:
    options = {"do_sample": False, "max_new_tokens": 12}
    assert deployed(PROMPTS, **options) == pipe(PROMPTS, **options)
    assert deployed.generate("x", return_full_text=True, **options)[0].generated_text[0] == "x"


def test_a_stream_comes_in_parts_that_are_the_whole(deployed: mii.MIIClient) -> None:
    parts: list[mii.Response] = []
    options = {"do_sample": False, "max_new_tokens": 12}
    (whole,) = deployed.generate(PROMPTS[0], streaming_fn=parts.extend, **options)
    assert len(parts) > 1
    assert "".join(part.generated_text for part in parts) == whole.generated_text
    assert [whole] == deployed(PROMPTS[0], **options)
    with pytest.raises(ConfigError, match="a stream has one prompt"):
        deployed.generate(PROMPTS, streaming_fn=parts.extend)


def test_another_script_finds_the_deployment(deployed: mii.MIIClient, model: Any) -> None:
    script = (
        "import mii, sys\n"
        "for name in sys.argv[1:]:\n"
        "    print(mii.client(name)('x', do_sample=False, max_new_tokens=4)[0].prompt_length)\n"
    )
    names = [str(model[0]), "tiny-mii-deployment"]
    done = subprocess.run(
        [sys.executable, "-c", script, *names], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["1", "1"], done.stderr


def test_a_name_is_taken_once(deployed: mii.MIIClient, model: Any) -> None:
    with pytest.raises(ConfigError, match="there already"):
        mii.serve(str(model[0]))
    with pytest.raises(DeploymentError, match=r"no deployment 'other'.*tiny-mii-deployment"):
        mii.client("other")


def test_strangers_without_the_key_are_refused(deployed: mii.MIIClient) -> None:
    from dataclasses import replace

    stranger = mii.MIIClient(replace(deployed.deployment, key="guessed-key"))
    with pytest.raises(ConfigError, match="key"):
        stranger("x")


def test_a_server_that_does_not_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DeploymentError, match=r"ended with status .*empty"):
        mii.serve(str(tmp_path / "empty"))


def test_options_are_mapped_and_the_rest_is_refused_by_name(tmp_path: Path) -> None:
    engine = {"state_manager": {"max_ragged_batch_size": 96, "max_ragged_sequence_count": 8}}
    found = read(
        str(tmp_path), {"inference_engine_config": engine}, quantization_mode="wf6af16",
        max_length=64, torch_dist_port=29501, replica_num=2,
    )  # fmt: skip
    assert found.section == {
        "max_batch_tokens": 96, "max_sequences": 8, "weight_format": "fp6", "max_context": 64,
    }  # fmt: skip
    assert found.replicas == 2
    for options, words in (
        ({"replicas": 2}, "does not know 'replicas'"),
        ({"deployment_type": "aml"}, "aml.* is not served"),
        ({"task": "fill-mask"}, "fill-mask.* is not served"),
        ({"quantization_mode": "w4"}, "w4.* is not served"),
    ):
        with pytest.raises(ConfigError, match=words):
            read(str(tmp_path), **options)
    with pytest.raises(ConfigError, match="given twice"):
        read(str(tmp_path), {"replica_num": 1}, replica_num=2)
    with pytest.raises(ConfigError, match="no model at"):
        read(str(tmp_path / "nothing"))
    with pytest.raises(mii.UnknownArgument, match="does not know top"):
        Sampling.read({"top": 1})
    with pytest.raises(ConfigError, match="must be positive"):
        Sampling.read({"temperature": 0.0})


def test_lengths_are_those_of_mii() -> None:
    assert Sampling().new_tokens(10, 4096) == 1014
    assert Sampling().new_tokens(10, 128) == 118
    assert Sampling(max_length=20).new_tokens(10, 128) == 10
    assert Sampling(max_new_tokens=2000).new_tokens(10, 4096) == 2000
    assert Sampling(max_length=20, max_new_tokens=30).new_tokens(10, 128) == 10
    with pytest.raises(ConfigError, match="the prompt has 10 tokens"):
        Sampling(max_length=10).new_tokens(10, 128)

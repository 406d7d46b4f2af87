"""Encoders say what Transformers says, whatever is in the batch, with the pooling of the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_inference import Encoder, InferenceEngine, engine_for, load_encoder
from drivetrain_inference.encoders.pooling import POOLS
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
)

from drivetrain.errors import ConfigError

SMALL = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 40, "pad_token_id": 1,
}  # fmt: skip
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15], [16, 17, 18, 19]]

KINDS: dict[str, Any] = {
    "bert": lambda: BertModel(BertConfig(**SMALL)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SMALL)),
    "mpnet": lambda: MPNetModel(MPNetConfig(**SMALL)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=50, dim=32, hidden_dim=48, n_layers=2, n_heads=4)
    ),
}


def saved(kind: Any, folder: Path) -> nn.Module:
    torch.manual_seed(0)
    model: Any = kind().eval()
    model.save_pretrained(folder)
    found: nn.Module = model
    return found


def states(model: Any, prompt: list[int]) -> torch.Tensor:
    """Hidden states [length, width] of one text, without padding."""
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([prompt])).last_hidden_state[0]
    return found


def sentence_transformer(folder: Path, *parts: str, **pooling: Any) -> None:
    listed = []
    for number, name in enumerate(["Transformer", *parts]):
        place = "" if name == "Transformer" else f"{number}_{name}"
        (folder / place).mkdir(exist_ok=True)
        kind = f"sentence_transformers.models.{name}"
        listed.append({"idx": number, "name": str(number), "path": place, "type": kind})
    (folder / "modules.json").write_text(json.dumps(listed))
    if "Pooling" in parts:
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_do_not_depend_on_the_batch(tmp_path: Path, kind: str) -> None:
    model = saved(KINDS[kind], tmp_path)
    encoder = load_encoder(tmp_path)
    found = encoder.embed(PROMPTS)
    for prompt, vector in zip(PROMPTS, found, strict=True):
        expected = nn.functional.normalize(states(model, prompt).mean(0), dim=0)
        torch.testing.assert_close(vector, expected, rtol=0, atol=1e-5)
    assert encoder.dimensions == 32
    encoder.close()


EXPECTED = {
    "cls": lambda h: h[0],
    "lasttoken": lambda h: h[-1],
    "max": lambda h: h.amax(0),
    "mean": lambda h: h.mean(0),
    "mean_sqrt_len_tokens": lambda h: h.sum(0) / len(h) ** 0.5,
    "weightedmean": lambda h: (
        sum((i + 1) * row for i, row in enumerate(h)) / sum(range(1, len(h) + 1))
    ),
}


@pytest.mark.parametrize("name", POOLS)
def test_each_pooling_is_what_its_name_says(tmp_path: Path, name: str) -> None:
    model = saved(KINDS["bert"], tmp_path)
    sentence_transformer(tmp_path, "Pooling", pooling_mode=name)
    encoder = load_encoder(tmp_path)
    for prompt, vector in zip(PROMPTS, encoder.embed(PROMPTS), strict=True):
        expected = EXPECTED[name](states(model, prompt))
        torch.testing.assert_close(vector, expected, rtol=0, atol=1e-5)
    encoder.close()


def test_poolings_dense_layers_and_length_one_come_in_their_order(tmp_path: Path) -> None:
    model = saved(KINDS["bert"], tmp_path)
    keys = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    sentence_transformer(tmp_path, "Pooling", "Dense", "Normalize", **keys)
    dense = nn.Linear(64, 8)
    place = tmp_path / "2_Dense"
    kind = "torch.nn.modules.activation.Tanh"
    (place / "config.json").write_text(
        json.dumps({"in_features": 64, "out_features": 8, "activation_function": kind})
    )
    weights = {"linear.weight": dense.weight.detach(), "linear.bias": dense.bias.detach()}
    save_file(weights, place / "model.safetensors")
    encoder = load_encoder(tmp_path)
    for prompt, vector in zip(PROMPTS, encoder.embed(PROMPTS), strict=True):
        h = states(model, prompt)
        with torch.no_grad():
            expected = nn.functional.normalize(dense(torch.cat([h[0], h.mean(0)])).tanh(), dim=0)
        torch.testing.assert_close(vector, expected, rtol=0, atol=1e-5)
    encoder.close()


def test_a_causal_model_as_an_encoder_takes_the_last_token(tmp_path: Path) -> None:
    model = saved(lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), tmp_path)
    generates = engine_for(tmp_path)
    assert isinstance(generates, InferenceEngine)
    generates.close()
    sentence_transformer(tmp_path, "Pooling", "Normalize", pooling_mode_lasttoken=True)
    encoder = engine_for(tmp_path)
    assert isinstance(encoder, Encoder)
    for prompt, vector in zip(PROMPTS, encoder.embed(PROMPTS), strict=True):
        expected = nn.functional.normalize(states(model.model, prompt)[-1], dim=0)
        torch.testing.assert_close(vector, expected, rtol=0, atol=1e-5)
    encoder.close()


@pytest.mark.parametrize("several", [False, True])
def test_classes_are_those_of_transformers(tmp_path: Path, several: bool) -> None:
    problem = "multi_label_classification" if several else "single_label_classification"
    config = BertConfig(
        **SMALL, num_labels=3, id2label={0: "good", 1: "bad", 2: "odd"}, problem_type=problem
    )
    model: Any = saved(lambda: BertForSequenceClassification(config), tmp_path)
    encoder = load_encoder(tmp_path)
    for prompt, found in zip(PROMPTS, encoder.classify(PROMPTS), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0]
        expected = logits.sigmoid() if several else logits.softmax(0)
        assert list(found.scores.values()) == pytest.approx(expected.tolist(), abs=1e-5)
        assert found.label == ["good", "bad", "odd"][int(expected.argmax())]
    with pytest.raises(ConfigError, match="use classify"):
        encoder.embed(PROMPTS)
    encoder.close()


def without(folder: Path, name: str) -> None:
    file = folder / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if name not in n}, file, {"format": "pt"})


def test_weights_that_a_folder_lacks_are_named_and_not_drawn_at_random(tmp_path: Path) -> None:
    model = saved(KINDS["bert"], tmp_path)
    without(tmp_path, "pooler")  # which no vector needs
    encoder = load_encoder(tmp_path)
    expected = nn.functional.normalize(states(model, PROMPTS[0]).mean(0), dim=0)
    torch.testing.assert_close(encoder.embed(PROMPTS)[0], expected, rtol=0, atol=1e-5)
    encoder.close()
    without(tmp_path, "layer.1.output.dense.weight")
    with pytest.raises(ConfigError, match=r"lacks weights.*layer\.1\.output\.dense\.weight"):
        load_encoder(tmp_path)
    saved(lambda: BertForSequenceClassification(BertConfig(**SMALL)), tmp_path)
    without(tmp_path, "pooler")
    with pytest.raises(ConfigError, match=r"lacks weights.*pooler"):
        load_encoder(tmp_path)


def test_what_cannot_be_taken_is_said(tmp_path: Path) -> None:
    saved(KINDS["bert"], tmp_path)
    encoder = load_encoder(tmp_path)
    for prompts, words in (
        ([[]], "a text is empty"),
        ([[5] * 41], "41 tokens, and the model takes 40"),
        (["text"], "no tokenizer"),
        ([], "there are no texts"),
    ):
        with pytest.raises(ConfigError, match=words):
            encoder.embed(prompts)
    with pytest.raises(ConfigError, match="use embed"):
        encoder.classify(PROMPTS)
    encoder.close()


@pytest.mark.parametrize(
    ("parts", "pooling", "words"),
    [
        (("WordWeights",), {}, "WordWeights.* is not known"),
        ((), {}, "no part that pools"),
        (("Pooling",), {"pooling_mode": "odd"}, "pooling odd is not known"),
        (("Pooling",), {}, "pooling of no kind"),
    ],
)
def test_parts_that_are_not_known_are_named(
    tmp_path: Path, parts: tuple[str, ...], pooling: dict[str, Any], words: str
) -> None:
    saved(KINDS["bert"], tmp_path)
    sentence_transformer(tmp_path, *parts, **pooling)
    with pytest.raises(ConfigError, match=words):
        load_encoder(tmp_path)


def test_files_outside_of_the_folder_are_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    saved(KINDS["bert"], folder)
    listed = [{"path": "../elsewhere", "type": "sentence_transformers.models.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(ConfigError, match="outside of it"):
        load_encoder(folder)

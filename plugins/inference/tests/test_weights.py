"""Weights come from folders, checkpoints and files, and may be quantised."""

from __future__ import annotations

import pytest
import torch
from drivetrain_inference import Int4, Int8, SamplingParams, serve
from tiny_decoders import decoder, expected

import drivetrain
from drivetrain.errors import ConfigError, DrivetrainError

PROMPT, NEW = [3, 1, 4, 1, 5], 12


def tokens_of(engine):
    with engine:
        return list(engine.generate([PROMPT], SamplingParams(max_new_tokens=NEW))[0][0].tokens)


def test_a_folder_of_safetensors_is_served(tmp_path):
    model = decoder()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert tokens_of(serve(tmp_path)) == expected(model, PROMPT, NEW)[0]
    assert tokens_of(serve(tmp_path, dtype=torch.bfloat16))


def test_a_checkpoint_of_training_is_served(tmp_path):
    model = decoder()
    model.config.save_pretrained(tmp_path / "config")
    config = {"train_batch_size": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.5}}}
    engine, *_ = drivetrain.initialize(model=model, config=config)
    engine.backward(engine(input_ids=torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss)
    engine.step()
    engine.save_checkpoint(str(tmp_path / "run"))
    engine.destroy()
    wanted = expected(model, PROMPT, NEW)[0]
    assert wanted != expected(decoder(), PROMPT, NEW)[0]
    assert tokens_of(serve(tmp_path / "config", weights=tmp_path / "run")) == wanted


def test_folders_without_a_model_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="neither a folder nor a GGUF file"):
        serve(tmp_path / "missing")
    with pytest.raises(ConfigError, match="cannot be loaded as a language model"):
        serve(tmp_path)
    decoder().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises((ConfigError, DrivetrainError), match="cannot be loaded"):
        serve(tmp_path)


@pytest.mark.parametrize(("form", "steps"), [(Int8(), 127), (Int4(), 15)])
@pytest.mark.parametrize("shape", [(5, 64), (48, 128), (3, 96)])
def test_a_format_keeps_its_promises(form, steps, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed = form.pack(weight)
    promised = form.tensors(shape)
    assert {n: (tuple(t.shape), t.dtype) for n, t in packed.items()} == promised
    assert form.bytes(shape) == sum(t.numel() * t.element_size() for t in packed.values())
    found = form.unpack(packed, shape, torch.float32)
    span = weight.abs().max() if steps == 127 else weight.max() - weight.min()
    assert (found - weight).abs().max() <= span / steps / 2 + 1e-6
    x = torch.randn(7, shape[1])
    torch.testing.assert_close(
        form.multiply(x, packed, shape[0]), x @ found.T, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_quantised_model_computes_with_the_quantised_weights(form):
    model, kind = decoder(intermediate_size=64), {"int8": Int8, "int4": Int4}[form]()
    found = tokens_of(serve(model, {"inference": {"weight_format": form}}))
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            shape = parameter.shape
            parameter.data = kind.unpack(kind.pack(parameter), shape, torch.float32)
    tokens, _, clear = expected(model, PROMPT, NEW)
    same = clear.index(False) if False in clear else NEW
    assert found[:same] == tokens[:same]
    assert same > 4


def test_formats_that_cannot_be_had_are_refused():
    with pytest.raises(ConfigError, match=r"'q9' is not known; there are .*int4, int8"):
        serve(decoder(), {"inference": {"weight_format": "q9"}})
    with pytest.raises(ConfigError, match="weight_format needs the fast path"):
        serve(decoder("gemma2, soft caps"), {"inference": {"weight_format": "int8"}})
    with pytest.raises(ConfigError, match="48 columns cannot be cut into groups"):
        serve(decoder(), {"inference": {"weight_format": "int8"}})

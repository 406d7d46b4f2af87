"""Models in compressed files, with weights kept packed: the same logits, no more memory, served."""

from __future__ import annotations

import json

import pytest
import torch
from drivetrain_compression import compress, load_compressed, load_packed
from drivetrain_compression.stored.kept import Kept
from drivetrain_compression.stored.linear import StoredLinear
from drivetrain_compression.stored.weight import StoredWeight
from safetensors.torch import load_file, save_file
from tiny_models import llama, rows

from drivetrain.errors import CheckpointError, ConfigError

W4 = {"gptq": {"bits": 4, "group": 16}}
W8A8 = {"round": {"bits": 8, "activations": "int8"}}
STATIC = {"round": {"bits": 8, "activations": "int8", "activation_scales": "static"}}
FP8 = {"round": {"format": "e4m3", "activations": "e4m3"}}
OWN = [
    {"round": {"bits": 4, "group": 16, "symmetric": False}}, {"round": {"format": "e3m2"}},
    {"round": {"bits": 3, "group": 24}}, {"round": {"bits": 4, "low_rank": 4}},
]  # fmt: skip
CASES = [
    *(("compressed-tensors", recipe) for recipe in (W4, W8A8, STATIC, FP8)),
    *(("drivetrain", recipe) for recipe in (W4, W8A8, STATIC, FP8)),
    *(("drivetrain", recipe) for recipe in OWN),
]  # fmt: skip


def made(folder, recipe, layout, **changes):
    model = llama(**changes)
    model.save_pretrained(folder / "model")
    compress(folder / "model", {"modifiers": [recipe]}, rows(), folder / layout, format=layout)
    return folder / layout


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=rows()[0] if ids is None else ids).logits


@pytest.mark.parametrize(("layout", "recipe"), CASES, ids=str)
def test_packed_weights_give_the_logits_of_the_compressed_module(tmp_path, layout, recipe):
    if layout == "compressed-tensors":
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is missing")
    folder = made(tmp_path, recipe, layout)
    model, wanted = load_packed(folder), load_compressed(folder)
    layers = [m for m in model.modules() if isinstance(m, StoredLinear)]
    assert len(layers) == 3 * 7
    for ids in (rows()[0], rows()[0][:1, :3]):  # many tokens, and few, which kernels multiply
        torch.testing.assert_close(logits(model, ids), logits(wanted, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("bits", "expected"), [(4, 4 + 32 / 16), (8, 8 + 32 / 16)])
def test_no_more_is_in_memory_than_what_is_packed(tmp_path, bits, expected):
    folder = made(tmp_path, {"round": {"bits": bits, "group": 16}}, "drivetrain")
    weights = [m for m in load_packed(folder).modules() if isinstance(m, StoredWeight)]
    numbers = sum(w.shape[0] * w.shape[1] for w in weights)
    assert sum(w.stored.numel() for w in weights) * 8 == expected * numbers


@pytest.mark.parametrize("bits", [4, 8])
def test_a_format_packs_what_it_unpacks(bits):
    from drivetrain_compression.calibrated.grids import Integers

    form = Kept(Integers(bits), 16)
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    parts = form.pack(weight)
    for name, (shape, dtype) in form.tensors(weight.shape).items():
        assert (tuple(parts[name].shape), parts[name].dtype) == (shape, dtype)
    near = form.unpack(parts, weight.shape, torch.float32)
    assert float((near - weight).abs().max()) < 3 / 2 ** (bits - 1)
    x = torch.randn(3, 48)
    torch.testing.assert_close(form.multiply(x, parts, 6), x @ near.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["compressed-tensors", "drivetrain"])
def test_damaged_folders_are_named(tmp_path, layout):
    folder = made(tmp_path, W4, layout)
    file = min(folder.glob("*.safetensors"))
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight_scale"
    save_file({n: t for n, t in tensors.items() if n != name}, file)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale is missing"):
        load_packed(folder)
    save_file({**tensors, name: tensors[name][:, :1].contiguous()}, file)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj: scales"):
        load_packed(folder)
    del tensors["model.layers.0.input_layernorm.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.input_layernorm\.weight"):
        load_packed(folder)


def test_what_is_not_packed_is_said(tmp_path):
    with pytest.raises(ConfigError, match="has nothing packed"):
        load_packed(made(tmp_path, W4, "plain"))
    folder = made(tmp_path, W4, "compressed-tensors")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"_proj: pack-quantized .* cannot be read here"):
        load_packed(folder)


@pytest.mark.parametrize(
    ("layout", "recipe"), [("compressed-tensors", W4), ("drivetrain", W8A8)], ids=str
)
def test_an_engine_serves_packed_weights(tmp_path, layout, recipe):
    inference = pytest.importorskip(
        "drivetrain_inference", reason="drivetrain-inference is missing"
    )
    folder = made(tmp_path, recipe, layout, bos_token_id=None, eos_token_id=None)
    wanted = load_packed(folder)
    prompt = rows()[0][0, :5].tolist()
    with torch.no_grad():
        for _ in range(6):
            last = wanted(input_ids=torch.tensor([prompt])).logits[0, -1]
            prompt.append(int(last.argmax()))
    engine = inference.serve(folder, {"inference": {"max_context": 64}})
    try:
        assert any(isinstance(m, StoredLinear) for m in engine.module.modules())
        ((found,),) = engine.generate(
            [prompt[:5]], inference.SamplingParams(max_new_tokens=6, temperature=0.0)
        )
        assert list(found.tokens) == prompt[5:]
    finally:
        engine.close()

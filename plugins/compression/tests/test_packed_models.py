"""Models in compressed files, with weights kept packed: the same logits, no more memory, served."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from drivetrain_compression import compress, load_compressed, load_packed
from drivetrain_compression.files.packed import packed_or_none
from drivetrain_compression.stored import kept_blocks
from drivetrain_compression.stored.kept import Kept
from drivetrain_compression.stored.kept_blocks import KeptBlocks
from drivetrain_compression.stored.linear import StoredLinear
from drivetrain_compression.stored.weight import StoredWeight
from safetensors.torch import load_file, save_file
from tiny_models import bert, llama, rows

from drivetrain.errors import CheckpointError, ConfigError

W4 = {"gptq": {"bits": 4, "group": 16}}
W8 = {"round": {"bits": 8}}
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


def made(folder, recipe, layout, dtype=torch.float32, **changes):
    model = llama(**changes).to(dtype)
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


@pytest.mark.parametrize("layout", ["compressed-tensors", "drivetrain"])
def test_4_bits_in_bfloat16_leave_inputs_as_they_are_unless_asked(tmp_path, layout, monkeypatch):
    if layout == "compressed-tensors":
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is missing")
    folder = made(tmp_path, W4, layout, torch.bfloat16)
    model, wanted = load_packed(folder), load_compressed(folder)
    assert formats(model) == {Kept}
    assert logits(model).dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(wanted))
    # Where no accelerator brings the kernel, its reference computes what it would.
    monkeypatch.setattr(kept_blocks, "_has_kernel", lambda device: True)
    rounding = load_packed(folder, rounds_inputs=True)
    assert formats(rounding) == {KeptBlocks}
    assert not torch.equal(logits(rounding), logits(wanted))
    few, wide = rows()[0][:1, :3], torch.float32  # in which the order of sums changes little
    exact = load_packed(folder, wide)
    whole = logits(exact)[:1, :3]  # of many tokens, for which weights are unpacked
    torch.testing.assert_close(logits(exact, few), whole, rtol=1e-4, atol=1e-5)
    rounded = logits(load_packed(folder, wide, rounds_inputs=True), few)
    assert float((rounded - whole).norm() / whole.norm()) > 1e-3


def formats(model):
    return {type(m.format) for m in model.modules() if isinstance(m, StoredWeight)}


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


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float")
    return made(folder, {"round": {"format": "e3m2", "low_rank": 2}}, "drivetrain")


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def without(key):
    def change(path):
        data = json.loads(path.read_text())
        data["layers"]["model.layers.0.mlp.up_proj"].pop(key)
        path.write_text(json.dumps(data))

    return change


def of_floats(path):
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("weight_codes"))
    save_file({**tensors, name: tensors[name].float()}, path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("drivetrain_compression.json", cut),
        ("drivetrain_compression.json", lambda path: path.write_text("[]")),
        ("drivetrain_compression.json", lambda path: path.write_bytes(b"\xff\xfe")),
        ("drivetrain_compression.json", lambda path: path.write_text("{}")),
        ("drivetrain_compression.json", without("shape")),
        ("drivetrain_compression.json", without("group")),
        ("model-00001", cut),
        ("model-00002", of_floats),
    ],
)
def test_a_damaged_file_is_named_whatever_its_parser_says(float_folder, tmp_path, name, damage):
    folder = shutil.copytree(float_folder, tmp_path / "copy")
    file = next(folder.glob(f"{name}*"))
    damage(file)
    for opens in (load_packed, lambda path: packed_or_none(path, None), load_compressed):
        with pytest.raises(CheckpointError) as raised:
            opens(folder)
        assert str(folder) in str(raised.value)
        assert file.name in str(raised.value)


def test_scales_and_factors_stay_those_of_the_file_in_another_dtype(float_folder):
    wanted, found = load_packed(float_folder), load_packed(float_folder, torch.bfloat16)
    for one, other in zip(wanted.modules(), found.modules(), strict=True):
        if isinstance(one, StoredWeight):
            assert torch.equal(one.packed, other.packed)
            assert torch.equal(one.dequantized().bfloat16(), other.dequantized())
    assert logits(found).dtype == torch.bfloat16


def test_tokens_that_end_a_text_come_from_the_generation_config(float_folder, tmp_path):
    inference = pytest.importorskip(
        "drivetrain_inference", reason="drivetrain-inference is missing"
    )
    folder = shutil.copytree(float_folder, tmp_path / "copy")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 77]}))
    for model in (folder, load_packed(folder)):
        with inference.serve(model, {"inference": {"max_context": 32}}) as engine:
            assert 77 in engine.stop_tokens


@pytest.mark.parametrize("layout", ["compressed-tensors", "drivetrain"])
def test_an_encoder_is_served_with_the_weights_of_the_file(tmp_path, layout):
    if layout == "compressed-tensors":
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is missing")
    inference = pytest.importorskip(
        "drivetrain_inference", reason="drivetrain-inference is missing"
    )
    bert().save_pretrained(tmp_path / "model")
    compress(tmp_path / "model", {"modifiers": [W8]}, rows(), tmp_path / "out", format=layout)
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    wanted = load_compressed(tmp_path / "out")
    encoder = inference.engine_for(tmp_path / "out")
    for prompt, vector in zip(prompts, encoder.embed(prompts), strict=True):
        with torch.no_grad():
            states = wanted(torch.tensor([prompt])).last_hidden_state[0]
        expected = torch.nn.functional.normalize(states.mean(0), dim=0)
        torch.testing.assert_close(vector, expected, rtol=0, atol=1e-4)
    encoder.close()


def test_rounding_of_inputs_can_be_left_out_for_a_while(tmp_path):
    model = load_packed(made(tmp_path, W8A8, "drivetrain"))
    weights = [m for m in model.modules() if isinstance(m, StoredWeight)]
    rounded = logits(model)
    for weight in weights:
        assert weight.rounds_inputs
        weight.rounds_inputs = False
    exact = logits(model)
    assert not torch.allclose(exact, rounded, rtol=0, atol=1e-4)
    for weight in weights:
        weight.rounds_inputs = True
    assert torch.equal(logits(model), rounded)


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

"""Files are as small as their bits, are what other programs read, and come back as they were."""

from __future__ import annotations

import json
import re

import pytest
import torch
from click.testing import CliRunner
from drivetrain_compression import compress, load_compressed
from drivetrain_compression.files.packing import pack_words, unpack_words
from safetensors.torch import load_file, save_file
from tiny_models import llama, rows

from drivetrain.cli import main
from drivetrain.errors import CheckpointError, ConfigError


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 32, 33, 40, 96])
def test_words_hold_codes_bit_after_bit(bits, count):
    codes = torch.randint(0, 2**bits, (3, count), generator=torch.Generator().manual_seed(bits))
    words = pack_words(codes, bits)
    for row in range(3):
        whole = sum(int(code) << (at * bits) for at, code in enumerate(codes[row]))
        found = sum((int(word) & 0xFFFFFFFF) << (32 * at) for at, word in enumerate(words[row]))
        assert found == whole
    assert words.shape == (3, -(-count * bits // 32))
    assert torch.equal(unpack_words(words, bits, count), codes)


GRIDS = [
    {"bits": 4, "group": 16}, {"bits": 3, "group": 24}, {"bits": 8, "activations": "int8"},
    {"format": "e3m2"}, {"format": "e2m1", "group": 16, "scale_ratios": "m2"},
    {"format": "e3m0", "group": 16, "activations": "e4m3", "scale_ratios": "m1"},
    {"bits": 4, "group": 16, "symmetric": False}, {"bits": 4, "low_rank": 4},
]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_own_files_give_the_logits_of_plain_ones(tmp_path, grid):
    llama().save_pretrained(tmp_path / "model")
    recipe = {"modifiers": [{"round": grid}]}
    logits = []
    for layout in ("drivetrain", "plain"):
        compress(tmp_path / "model", recipe, None, tmp_path / layout, format=layout)
        model = load_compressed(tmp_path / layout)
        if layout == "plain" and grid.get("activations"):  # ordinary layers do not round inputs
            continue
        with torch.no_grad():
            logits.append(model(input_ids=rows()[0]).logits)
    if len(logits) == 2:
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["compressed-tensors", "drivetrain"])
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 0), (2, 32)])
def test_files_are_as_small_as_their_bits(tmp_path, layout, bits, group):
    model = llama(hidden_size=128, intermediate_size=256, num_hidden_layers=2).bfloat16()
    model.save_pretrained(tmp_path / "model")
    recipe = {"modifiers": [{"round": {"bits": bits, "group": group}}]}
    compress(tmp_path / "model", recipe, None, tmp_path / "out", format=layout)
    expected = 0.0
    for name, weight in model.state_dict().items():
        if "proj" in name:
            groups = weight.shape[1] // group if group else 1
            expected += weight.numel() * bits / 8 + 2 * groups * len(weight)
        elif name != "lm_head.weight":
            expected += 2 * weight.numel()
    found = sum(
        tensor.numel() * tensor.element_size()
        for file in (tmp_path / "out").glob("*.safetensors")
        for tensor in load_file(file).values()
    )
    assert abs(found / expected - 1) < 0.03


def test_damaged_files_are_named(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    recipe = {"modifiers": [{"round": {"group": 16}}]}
    compress(tmp_path / "model", recipe, None, tmp_path / "out", format="drivetrain")
    file = min((tmp_path / "out").glob("*.safetensors"))
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight_scale"
    save_file({**tensors, name: tensors[name][:, :1].contiguous()}, file)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj: scales"):
        load_compressed(tmp_path / "out")
    save_file({n: t for n, t in tensors.items() if n != name}, file)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale is missing"):
        load_compressed(tmp_path / "out")


@pytest.mark.parametrize(
    "grid", [{"group": 16}, {"bits": 8, "activations": "int8", "activation_scales": "static"}]
)
def test_what_a_folder_for_other_programs_lacks_is_named(tmp_path, grid):
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is missing")
    llama(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    compress(tmp_path / "model", {"modifiers": [{"round": grid}]}, rows(), tmp_path / "out")
    file = min((tmp_path / "out").glob("*.safetensors"))
    tensors = load_file(file)
    for name in ("mlp.up_proj.weight_scale", "input_layernorm.weight"):
        whole = f"model.layers.0.{name}"
        save_file({n: t for n, t in tensors.items() if n != whole}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=re.escape(f"lacks {whole}")):
            load_compressed(tmp_path / "out")
    save_file(tensors, file, {"format": "pt"})
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_compressed(tmp_path / "out")


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"symmetric": False}, "zero points"),
        ({"format": "e3m2"}, "no e3m2"),
        ({"low_rank": 2}, "low-rank"),
        ({"bits": 8, "group": 16, "activations": "int8"}, "one scale an output"),
    ],
)
def test_what_compressed_tensors_cannot_hold_is_said(tmp_path, grid, message):
    llama().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=message):
        compress(tmp_path / "model", {"modifiers": [{"round": grid}]}, None, tmp_path / "out")


def test_the_config_says_which_layers_are_how(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    recipe = {
        "modifiers": [
            {"round": {"bits": 8, "modules": ["self_attn"]}},
            {"round": {"bits": 4, "group": 16, "modules": ["mlp"], "exclude": ["down_proj"]}},
        ]
    }
    compress(tmp_path / "model", recipe, None, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = list(config["config_groups"].values())
    assert sorted(g["weights"]["num_bits"] for g in groups) == [4, 8]
    assert sum(len(g["targets"]) for g in groups) == 3 * 6
    assert set(config["ignore"]) == {
        "lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in range(3))
    }  # fmt: skip
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is missing")
    assert load_compressed(tmp_path / "out")(input_ids=rows()[0]).logits.isfinite().all()


def test_the_commands_compress_and_compare(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "model")
    save_file({"input_ids": torch.cat(rows(8))}, tmp_path / "data.safetensors")
    (tmp_path / "recipe.yaml").write_text("modifiers:\n  - gptq: {bits: 4, group: 16}\n")
    data = ["--data", str(tmp_path / "data.safetensors"), "--samples", "8", "--length", "16"]
    run = CliRunner().invoke
    arguments = ["--recipe", str(tmp_path / "recipe.yaml"), "--format", "drivetrain", *data]
    out = str(tmp_path / "out")
    first = run(main, ["compress", str(tmp_path / "model"), *arguments, "--out", out])
    assert first.exit_code == 0, first.output
    assert "MB in" in first.output
    again = run(main, ["compress", str(tmp_path / "model"), *arguments, "--out", out])
    assert again.exit_code == 2
    assert "exists; choose another folder" in again.output
    short = run(
        main,
        ["compress", str(tmp_path / "model"), *arguments, "--samples", "99", "--out", out + "2"],
    )
    assert "too short: 8 rows of 16 tokens, but 99 rows" in short.output
    picture = tmp_path / "picture.svg"
    compared = run(
        main,
        ["compress", "compare", str(tmp_path / "model"), out, *data, "--picture", str(picture)],
    )
    assert compared.exit_code == 0, compared.output
    for word in ("weights, MB", "perplexity", "tokens/s", "error of weights", "blocks' outputs"):
        assert word in compared.output
    assert picture.read_text().startswith("<svg")
    assert "perplexity" in picture.read_text()

"""GGUF files hold the numbers that were chosen, and read back as the model."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from drivetrain_compression import compress, load_compressed
from drivetrain_compression.files.gguf_file import write_gguf
from tiny_models import llama, rows

from drivetrain.errors import ConfigError

needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="needs the package gguf")
KINDS = [
    ("Q4_0", {"bits": 4, "group": 32}),
    ("Q8_0", {"bits": 8, "group": 32}),
    ("Q4_1", {"bits": 4, "group": 32, "symmetric": False}),
]


@needs_gguf
@pytest.mark.parametrize(("kind", "grid"), KINDS)
def test_blocks_hold_the_chosen_numbers(tmp_path, kind, grid):
    from gguf import GGUFReader
    from gguf.quants import dequantize

    llama().save_pretrained(tmp_path / "model")
    recipe = {"modifiers": [{"round" if kind == "Q4_1" else "hqq": grid}]}
    compress(tmp_path / "model", recipe, None, tmp_path / "out", format="drivetrain")
    write_gguf(tmp_path / "out", tmp_path / "m.gguf")
    wanted = load_compressed(tmp_path / "out").state_dict()
    tensors = {t.name: t for t in GGUFReader(tmp_path / "m.gguf").tensors}
    found = tensors["blk.1.ffn_down.weight"]
    assert found.tensor_type.name == kind
    values = torch.from_numpy(np.array(dequantize(found.data, found.tensor_type)))
    off = wanted["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(values, off, rtol=1e-3, atol=1e-4)
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == kind
    assert tensors["token_embd.weight"].tensor_type.name == "BF16"
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(ConfigError, match="exists"):
        write_gguf(tmp_path / "out", tmp_path / "m.gguf")


@needs_gguf
@pytest.mark.skipif(find_spec("accelerate") is None, reason="Transformers needs accelerate for it")
def test_transformers_reads_the_same_logits(tmp_path):
    llama().bfloat16().save_pretrained(tmp_path / "model")
    recipe = {"modifiers": [{"gptq": {"bits": 4, "group": 32}}]}
    compress(tmp_path / "model", recipe, rows(), tmp_path / "out", format="drivetrain")
    write_gguf(tmp_path / "out", tmp_path / "m.gguf")
    models = [load_compressed(path) for path in (tmp_path / "out", tmp_path / "m.gguf")]
    with torch.no_grad():
        first, second = (m.float()(input_ids=rows()[0]).logits for m in models)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


@needs_gguf
def test_other_folders_are_refused(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"drivetrain_compression\.json is missing"):
        write_gguf(tmp_path / "model", tmp_path / "m.gguf")

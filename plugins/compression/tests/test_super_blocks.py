"""Q4_K: as small as its bits say, unpacked by gguf to what was chosen, and chosen well."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from drivetrain_compression import compress, load_compressed
from drivetrain_compression.files.gguf_file import write_gguf
from drivetrain_compression.files.super_blocks import q4_k
from tiny_models import llama

pytestmark = pytest.mark.skipif(find_spec("gguf") is None, reason="needs the package gguf")


def unpacked(raw):
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return torch.from_numpy(np.array(dequantize(raw, GGMLQuantizationType.Q4_K)))


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(raw):
    """One block of 144 bytes, byte by byte as the format says, in float64."""
    block = bytes(raw)
    d, e = (float(x) for x in np.frombuffer(block[:4], np.float16))
    head, codes, found = block[4:16], block[16:], []
    for part in range(8):
        if part < 4:
            scale, offset = head[part] & 63, head[part + 4] & 63
        else:
            scale = (head[part + 4] & 15) | ((head[part - 4] >> 6) << 4)
            offset = (head[part + 4] >> 4) | ((head[part] >> 6) << 4)
        for at in range(32):
            byte = codes[32 * (part // 2) + at]
            found.append(d * scale * (byte >> 4 if part % 2 else byte & 15) - e * offset)
    return torch.tensor(found, dtype=torch.float64)


def test_gguf_unpacks_blocks_as_the_format_says():
    raw = q4_k(drawn(3, 512) * torch.tensor([[1e-3], [1.0], [50.0]]) + 0.1)
    assert raw.shape == (3, 2 * 144)
    assert raw.dtype == np.uint8
    wanted = torch.stack([by_hand(block) for block in raw.reshape(-1, 144)]).view(3, 512)
    torch.testing.assert_close(unpacked(raw).double(), wanted, rtol=1e-6, atol=1e-8)


def test_what_lies_on_the_grid_comes_back():
    values = unpacked(q4_k(drawn(4, 1024)))
    again = unpacked(q4_k(values))
    assert float((again - values).norm() / values.norm()) < 0.01


@pytest.mark.parametrize("shape", ["normal", "outliers", "one side"])
def test_the_search_finds_better_scales(shape):
    values = drawn(8, 1024)
    if shape == "outliers":
        values[:, ::97] *= 6
    elif shape == "one side":
        values = values.abs() + 0.5
    weight = (values.view(8, -1, 32).square().mean(2, keepdim=True).sqrt()).expand(8, -1, 32)
    weight = weight.reshape(8, -1) + values.abs()

    def error(made):
        return float((weight * (made - values).square()).sum())

    searched, whole = (error(unpacked(q4_k(values, search=n))) for n in (21, 1))
    assert searched < 0.95 * whole
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    old = GGMLQuantizationType.Q4_0  # as many bits
    known = torch.from_numpy(np.array(dequantize(quantize(values.numpy(), old), old)))
    assert searched < 0.8 * error(known)


def test_zeros_and_constants_are_kept():
    values = torch.zeros(3, 256)
    values[1], values[2] = 0.5, -0.25
    torch.testing.assert_close(unpacked(q4_k(values)), values, rtol=2e-3, atol=0)


def test_files_are_as_small_as_their_bits(tmp_path):
    from gguf import GGUFReader

    model = llama(hidden_size=256, intermediate_size=512, num_hidden_layers=2, vocab_size=512)
    model.save_pretrained(tmp_path / "model")
    compress(tmp_path / "model", {"modifiers": [{"round": {"bits": 8}}]}, None, tmp_path / "out",
             format="plain")  # fmt: skip
    write_gguf(tmp_path / "out", tmp_path / "m.gguf", rest="Q4_K")
    tensors = {t.name: t for t in GGUFReader(tmp_path / "m.gguf").tensors}
    matrices = [t for t in tensors.values() if len(t.shape) == 2]
    assert {t.tensor_type.name for t in matrices} == {"Q4_K"}
    numbers = sum(int(np.prod(t.shape)) for t in matrices)
    assert sum(t.n_bytes for t in matrices) * 8 == numbers * 4.5
    found = tensors["blk.1.ffn_down.weight"]
    wanted = load_compressed(tmp_path / "out").state_dict()["model.layers.1.mlp.down_proj.weight"]
    off = unpacked(np.array(found.data)) - wanted
    assert float(off.norm() / wanted.norm()) < 0.08
    whole = (tmp_path / "m.gguf").stat().st_size
    assert abs(whole / (numbers * 4.5 / 8) - 1) < 0.03


def test_matrices_of_other_widths_become_q5_0(tmp_path):
    from gguf import GGUFReader

    llama(hidden_size=96, intermediate_size=256).save_pretrained(tmp_path / "model")
    compress(tmp_path / "model", {"modifiers": [{"round": {"bits": 8}}]}, None, tmp_path / "out",
             format="plain")  # fmt: skip
    write_gguf(tmp_path / "out", tmp_path / "m.gguf", rest="Q4_K")
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "Q4_K"
    assert kinds["blk.0.ffn_up.weight"] == "Q5_0"

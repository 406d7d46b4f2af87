"""Blocks of a GGUF file are used as they are."""

from __future__ import annotations

import pytest
import torch

gguf = pytest.importorskip("gguf")

from drivetrain_inference.weights.gguf import FileFormat  # noqa: E402

from drivetrain.errors import ConfigError  # noqa: E402

KINDS = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


def written(path, tensors):
    """A file with tensors of the given kinds; returns the values that they stand for."""
    from gguf.quants import dequantize, quantize

    writer, values = gguf.GGUFWriter(str(path), "llama"), {}
    for name, (weight, kind) in tensors.items():
        code = gguf.GGMLQuantizationType[kind]
        data = quantize(weight.numpy(), code)
        values[name] = torch.from_numpy(dequantize(data, code))
        writer.add_tensor(name, data, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_any_order_get_the_blocks_of_the_file(tmp_path, kind, dtype):
    path = tmp_path / "model.gguf"
    values = written(path, {"a": (normal(0, 40, 64), kind), "b": (normal(1, 24, 64), kind)})
    form = FileFormat(path, dtype)
    whole = torch.cat([values["a"], values["b"]])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    weight = whole[order].to(dtype)
    assert form.has(weight)
    packed = form.pack(weight)
    # Not rounded again: the values are those of the file, not of the module's dtype.
    assert torch.equal(form.unpack(packed, weight.shape, torch.float32), whole[order])
    size = sum(each.numel() * each.element_size() for each in packed.values())
    assert size == 64 * 2 * KINDS[kind]
    x = torch.randint(-127, 128, (3, 64), generator=torch.Generator().manual_seed(3)).float()
    x[:, ::32] = 127  # so that rounding does nothing
    product = form.multiply(x, packed, 64)
    torch.testing.assert_close(product, x @ whole[order].T, rtol=1e-5, atol=1e-2)


def test_rows_that_the_file_has_not_are_packed_in_8_bits(tmp_path):
    path = tmp_path / "model.gguf"
    mixed = {"a": (normal(0, 32, 64), "Q4_1"), "b": (normal(1, 32, 64), "Q8_0")}
    values = written(path, mixed)
    form = FileFormat(path, torch.float32)
    for weight in (normal(5, 32, 64), torch.cat([values["a"], values["b"]])):
        assert not form.has(weight)
        found = form.unpack(form.pack(weight), weight.shape, torch.float32)
        assert (found - weight).abs().max() < 0.02


def test_a_file_without_such_blocks_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    written(path, {"a": (normal(0, 8, 64), "F16")})
    with pytest.raises(ConfigError, match="no tensors of Q4_0, Q4_1, Q8_0"):
        FileFormat(path, torch.float32)

"""Weights come from folders, checkpoints and files, and may be quantised."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from drivetrain_inference import Q40, Q41, Q80, W8A8, Fp6, Fp8, Int4, Int8, SamplingParams, serve
from drivetrain_kernels.ops.minifloat_linear import decode_minifloat, encode_minifloat
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


SYMMETRIC = [(Int8(), 127), (W8A8(), 127), (Q80(), 127), (Q40(), 7.5)]


@pytest.mark.parametrize(("form", "steps"), [*SYMMETRIC, (Int4(), 15), (Q41(), 15)])
@pytest.mark.parametrize("shape", [(5, 64), (48, 128), (3, 96)])
def test_a_format_keeps_its_promises(form, steps, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed = form.pack(weight)
    promised = form.tensors(shape)
    assert {n: (tuple(t.shape), t.dtype) for n, t in packed.items()} == promised
    assert form.bytes(shape) == sum(t.numel() * t.element_size() for t in packed.values())
    found = form.unpack(packed, shape, torch.float32)
    span = weight.max() - weight.min() if steps == 15 else weight.abs().max()
    # Scales are float16 in blocks; Q4_0 has no code for the negative of its largest weight.
    far = span / steps / 2 + span * 2**-10 if not isinstance(form, Q40) else span / 8 + 1e-3
    assert (found - weight).abs().max() <= far
    x = torch.randn(7, shape[1], generator=torch.Generator().manual_seed(1))
    if isinstance(form, (W8A8, Q80, Q40, Q41)):  # what comes is rounded, too: 254 steps a block
        block = form.block(shape[1])
        rows = x.view(7, -1, block)
        step = rows.abs().amax(2, keepdim=True) / 127
        x = (torch.round(rows / step) * step).view(7, -1)
    torch.testing.assert_close(
        form.multiply(x, packed, shape[0]), x @ found.T, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("form", [Int8(), Int4()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_are_multiplied_by_a_weight_that_is_unpacked_in_slices(form, dtype, monkeypatch):
    monkeypatch.setattr("drivetrain_inference.weights.grouped._SLICE", 7 * 128)
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    packed = form.pack(weight)
    x = torch.randn(33, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = form.bind(packed, 48, invariant=False)(x)
    expected = x.double() @ form.unpack(packed, (48, 128), dtype).double().T
    loose = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found.double(), expected, rtol=loose / 10, atol=loose)
    rows = form.bind(packed, 48, invariant=True)
    if find_spec("drivetrain_cpu"):  # torch, which stands in, has other bits for few rows
        assert torch.equal(rows(x)[:5], rows(x[:5]))


@pytest.mark.parametrize(("form", "mantissa", "largest"), [(Fp8(), 3, 448), (Fp6(), 2, 28)])
@pytest.mark.parametrize("shape", [(5, 64), (33, 30)])
def test_small_floats_are_the_nearest_of_their_kind(form, mantissa, largest, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    packed = form.pack(weight)
    assert {n: (tuple(t.shape), t.dtype) for n, t in packed.items()} == form.tensors(shape)
    found = form.unpack(packed, shape, torch.float32)
    top = weight.abs().amax(1, keepdim=True)
    torch.testing.assert_close(found.abs().amax(1, keepdim=True), top)
    smallest = top / largest * (2.0**-6 if mantissa == 3 else 2.0**-2)
    far = torch.maximum(weight.abs(), smallest) * 2.0 ** -(mantissa + 1)
    assert ((found - weight).abs() <= far + 1e-7).all()
    x = torch.randn(7, shape[1], generator=torch.Generator().manual_seed(1))
    product = form.multiply(x, packed, shape[0])
    torch.testing.assert_close(product, x @ found.T, rtol=1e-4, atol=1e-4)


def test_fp6_has_the_63_numbers_of_its_definition():
    positive = [m / 16 for m in range(4)]
    positive += [(1 + m / 4) * 2.0 ** (e - 3) for e in range(1, 8) for m in range(4)]
    numbers = torch.tensor(positive + [-each for each in positive])
    assert torch.equal(decode_minifloat(encode_minifloat(numbers, "fp6_e3m2"), "fp6_e3m2"), numbers)
    between = torch.tensor([each * 1.0001 for each in positive[1:-1]])
    again = decode_minifloat(encode_minifloat(between, "fp6_e3m2"), "fp6_e3m2")
    assert torch.equal(again, numbers[1:31])


FORMS = {"int8": Int8, "int4": Int4, "fp8": Fp8, "fp6": Fp6}


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_model_computes_with_the_quantised_weights(form):
    model, kind = decoder(intermediate_size=64), FORMS[form]()
    found = tokens_of(serve(model, {"inference": {"weight_format": form}}))
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            shape = parameter.shape
            parameter.data = kind.unpack(kind.pack(parameter), shape, torch.float32)
    tokens, _, clear = expected(model, PROMPT, NEW)
    same = clear.index(False) if False in clear else NEW
    assert found[:same] == tokens[:same]
    assert same > 4


def rounded_as(form, model):
    """The model with rounded weights, and linear layers that round what they multiply."""

    def forward(layer):
        def run(x):
            flat = x.reshape(-1, x.shape[-1])
            whole = torch.nn.functional.pad(flat, (0, -flat.shape[1] % form.block(flat.shape[1])))
            blocks = whole.view(len(flat), -1, form.block(flat.shape[1]))
            step = blocks.abs().amax(2, keepdim=True).clamp_min(1e-30) / 127
            again = (torch.round(blocks / step) * step).view(whole.shape)[:, : flat.shape[1]]
            return torch.nn.functional.linear(again, layer.weight).view(*x.shape[:-1], -1)

        return run

    for name, module in model.named_modules():
        if name.endswith("proj"):
            shape = module.weight.shape
            module.weight.data = form.unpack(form.pack(module.weight), shape, torch.float32)
            module.forward = forward(module)
    return model


@pytest.mark.parametrize("form", ["w8a8", "q8_0", "q4_0", "q4_1"])
def test_integer_products_are_those_of_rounded_weights_and_activations(form):
    kind = {"w8a8": W8A8, "q8_0": Q80, "q4_0": Q40, "q4_1": Q41}[form]()
    prompt, options = [3, 1, 4, 1, 5], {"inference": {"weight_format": form}}
    reference = rounded_as(kind, decoder())(input_ids=torch.tensor([prompt])).logits[0, -1]
    with serve(decoder(), options) as engine:
        logits = engine.put([0], [prompt])[0]
    spread = float(reference.max() - reference.min())
    # A value between two codes may go either way after different roundings before it.
    assert (logits - reference).abs().max() < 0.02 * spread


def test_the_head_has_the_format_when_asked():
    plain, options = decoder(), {"weight_format": "w8a8"}
    logits = []
    for own in ({}, {"quantize_head": True}):
        with serve(plain, {"inference": {**options, **own}}) as engine:
            logits.append(engine.put([0], [PROMPT]))
    assert not torch.equal(*logits)
    torch.testing.assert_close(*logits, rtol=0, atol=0.05)
    with pytest.raises(ConfigError, match="quantize_head needs a weight_format"):
        serve(plain, {"inference": {"quantize_head": True}})


def test_formats_that_cannot_be_had_are_refused():
    with pytest.raises(ConfigError, match="gguf keeps the blocks of a GGUF file"):
        serve(decoder(), {"inference": {"weight_format": "gguf"}})
    with pytest.raises(ConfigError, match=r"'q9' is not known; there are .*fp6, fp8, gguf, .*int4"):
        serve(decoder(), {"inference": {"weight_format": "q9"}})
    with pytest.raises(ConfigError, match="weight_format needs the fast path"):
        serve(decoder("gemma2, soft caps"), {"inference": {"weight_format": "int8"}})
    with pytest.raises(ConfigError, match="48 columns cannot be cut into groups"):
        serve(decoder(), {"inference": {"weight_format": "int8"}})

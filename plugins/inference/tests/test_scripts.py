"""Scripts for DeepSpeed find init_inference, and engines by folder, as they call them."""

from __future__ import annotations

import pytest
import torch
from drivetrain_inference.scripts import build_hf_engine, default_inference_config, init_inference
from tiny_decoders import decoder

from drivetrain.errors import ConfigError

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.mark.parametrize("inject", [True, False])
def test_generate_continues_as_the_module_does(inject):
    model = decoder()
    engine = init_inference(model, dtype="fp32", replace_with_kernel_inject=inject)
    found = engine.generate(IDS, max_new_tokens=9, do_sample=False)
    assert torch.equal(found, model.generate(IDS, max_new_tokens=9, do_sample=False))
    torch.testing.assert_close(engine(IDS).logits, model(IDS).logits)
    assert engine.engine.fast == inject
    engine.destroy()


@pytest.mark.parametrize("inject", [True, False])
def test_forward_is_the_engine_s_where_only_tokens_are_given(inject, monkeypatch):
    model = decoder()
    options = {"dtype": "fp32", "replace_with_kernel_inject": inject}
    engine = init_inference(model, {"max_out_tokens": 64}, **options)
    calls, run = [], engine.engine.ragged.run
    monkeypatch.setattr(engine.engine.ragged, "run", lambda *a: calls.append(a) or run(*a))
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    long = torch.arange(90)[None] % 64
    with torch.no_grad():
        wanted = model(IDS, attention_mask=mask).logits
        found = engine(input_ids=IDS, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-4)
        assert len(calls) == 2
        assert engine.engine.ragged.free_blocks == engine.engine.ragged.blocks.blocks
        for options in ({"labels": IDS}, {"attention_mask": mask.flip(1)}):
            options["use_cache"] = False
            assert torch.equal(engine(IDS, **options).logits, model(IDS, **options).logits)
        assert torch.equal(
            engine(long, use_cache=False).logits, model(long).logits
        )  # above max_out_tokens
    assert engine(IDS, use_cache=False).logits.requires_grad
    assert len(calls) == 2
    engine.destroy()


def test_a_script_s_own_decoding_loop_gets_the_cache_that_it_goes_on_with():
    model = decoder()
    engine = init_inference(model, dtype="fp32", replace_with_kernel_inject=True)
    wanted = model.generate(IDS, max_new_tokens=4, do_sample=False)
    ids, cache, found = IDS, None, IDS
    with torch.no_grad():
        for _ in range(4):
            out = engine(input_ids=ids, past_key_values=cache)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            found = torch.cat([found, ids], 1)
        assert torch.equal(found, wanted)
        model.config.use_cache = False
        assert engine(IDS).get("past_key_values") is None
    engine.destroy()


def test_rows_of_one_token_have_logits_of_their_own():
    model, ids = decoder(), torch.tensor([[3], [9], [4]])
    options = {"replace_with_kernel_inject": True, "enable_cuda_graph": True}
    engine = init_inference(model, dtype="fp32", **options)
    with torch.no_grad():
        found, wanted = engine(input_ids=ids, use_cache=False).logits, model(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    engine.destroy()


@pytest.mark.parametrize("inject", [True, False])
def test_a_wish_for_captured_forwards_that_is_not_met_is_told(inject, caplog):
    options = {"dtype": "fp32", "enable_cuda_graph": True, "replace_with_kernel_inject": inject}
    engine = init_inference(decoder(), **options)
    captures = getattr(engine.engine.ragged.model, "captures", False)
    assert ("enable_cuda_graph changes nothing here" in caplog.text) != captures
    assert inject or not captures
    engine.destroy()


def test_padded_rows_continue_what_is_not_padding():
    engine = init_inference(decoder(), {"dtype": torch.float32})
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    found = engine.generate(IDS, attention_mask=mask, max_length=12, num_return_sequences=2)
    alone = engine.generate(IDS[1:, 2:], max_new_tokens=7)
    assert found.shape == (4, 12)
    assert torch.equal(found[2, 5:], alone[0, 3:])
    engine.destroy()


def test_int8_quantises():
    engine = init_inference(decoder(intermediate_size=64), dtype="int8")
    assert engine.engine.fast
    assert engine.generate(IDS, max_new_tokens=3).shape == (2, 8)
    engine.destroy()


@pytest.mark.parametrize(("options", "message"), [
    ({"config": {"dtype": "fp16"}, "dtype": "bf16"}, "dtype is given twice: 'fp16' and 'bf16'"),
    ({"config": {"dtyp": "fp16"}}, "does not know 'dtyp'"),
    ({"dtype": "fp4"}, "dtype 'fp4' is none of"),
    ({"mp_size": 2, "dtype": "int8"}, "dtype int8 is served by one rank"),
    ({"config": 3}, "config must be a dict or a path"),
])  # fmt: skip
def test_what_cannot_be_served_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        init_inference(decoder(), **options)
    assert default_inference_config()["max_out_tokens"] == 1024


def test_an_engine_by_folder_takes_its_limits(tmp_path):
    model = decoder()
    model.save_pretrained(tmp_path)
    manager = {"max_ragged_batch_size": 16, "max_ragged_sequence_count": 4, "max_context": 64}
    manager["memory_config"] = {"mode": "allocate", "size": 6}
    with build_hf_engine(str(tmp_path), {"state_manager": manager}) as engine:
        assert (engine.ragged.budget, engine.ragged.free_blocks) == (16, 6)
        found = engine.put([1], [IDS[0]])
    with torch.no_grad():
        wanted = model(IDS).logits[:1, -1]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="offload is not served"):
        build_hf_engine(str(tmp_path), {"state_manager": {"offload": True}})

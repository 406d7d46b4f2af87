"""Adapters of PEFT: several at once, chosen by request, exchanged while the engine runs."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from drivetrain_inference import SamplingParams, serve
from drivetrain_inference.adapters.loading import load_adapter
from safetensors.torch import save_file
from tiny_decoders import decoder, expected

from drivetrain.errors import ConfigError

PROMPT, NEW = [3, 1, 4, 1, 5, 9, 2, 6, 5], 12
OPTIONS = {"block_size": 4, "max_batch_tokens": 32, "max_sequences": 8}
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")


def written(folder, model, seed, *, rank=2, targets=TARGETS, **config):
    """An adapter as PEFT writes it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] in targets:
            outputs, inputs = layer.weight.shape
            if type(layer).__name__ == "Conv1D":
                outputs, inputs = inputs, outputs
            for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                value = 0.3 * torch.randn(shape, generator=generator)
                tensors[f"base_model.model.{name}.lora_{part}.weight"] = value
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    known = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(known))
    return tensors


def merged(model, tensors, scale):
    """The model with the adapter's products added to its weights."""
    found = deepcopy(model)
    for name, layer in found.named_modules():
        key = f"base_model.model.{name}.lora_"
        if f"{key}A.weight" in tensors:
            change = scale * tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
            layer.weight.data += change.T if type(layer).__name__ == "Conv1D" else change
    return found


@pytest.mark.parametrize(
    ("kind", "fast_path", "targets"),
    [
        ("llama", "always", TARGETS),
        ("llama", "never", TARGETS),
        ("gpt2", "never", ("c_attn", "c_proj")),
    ],
)
def test_each_request_is_computed_with_its_adapter(tmp_path, kind, fast_path, targets):
    model = decoder(kind)
    one = written(tmp_path / "one", model, 1, targets=targets)
    two = written(tmp_path / "two", model, 2, rank=4, targets=targets, use_rslora=True)
    wanted = {
        "": expected(model, PROMPT, NEW)[0],
        "one": expected(merged(model, one, 3 / 2), PROMPT, NEW)[0],
        "two": expected(merged(model, two, 3 / 4**0.5), PROMPT, NEW)[0],
    }
    assert len(set(map(tuple, wanted.values()))) == 3
    adapters = {name: str(tmp_path / name) for name in ("one", "two")}
    with serve(
        model, {"inference": {**OPTIONS, "fast_path": fast_path, "adapters": adapters}}
    ) as engine:
        assert engine.fast == (fast_path == "always")
        names = ["one", "", "two", "one"]
        params = [SamplingParams(max_new_tokens=NEW, adapter=name) for name in names]
        # Twice, so that what is in the cache of one is not taken for another's.
        for _ in range(2):
            results = engine.generate([PROMPT] * 4, params)
            assert [list(each[0].tokens) for each in results] == [wanted[name] for name in names]
        assert engine.generate([PROMPT], params[2])[0][0].cached_tokens == 8
        engine.scheduler.blocks.check([])


def test_adapters_are_exchanged_while_requests_run(tmp_path):
    model = decoder()
    parts = [written(tmp_path / str(n), model, n) for n in (1, 2)]
    wanted = [expected(merged(model, each, 3 / 2), PROMPT, NEW)[0] for each in parts]
    params = SamplingParams(max_new_tokens=NEW, adapter="mine")
    with serve(model, {"inference": OPTIONS}) as engine:
        engine.adapters.load("mine", tmp_path / "1")
        first = engine.add(PROMPT, params)
        done = engine.step() + engine.step()
        engine.adapters.load("mine", tmp_path / "2")
        second = engine.add(PROMPT, params)
        done += engine.step()
        engine.adapters.unload("mine")
        with pytest.raises(ConfigError, match="there is no adapter 'mine'; there is none"):
            engine.add(PROMPT, params)
        while engine.busy:
            done += engine.step()
    ends = {each.request: list(each.completion.tokens) for each in done if each.completion}
    assert ends == {first: wanted[0], second: wanted[1]}


def test_the_first_pattern_that_fits_a_layer_gives_its_alpha(tmp_path):
    model = decoder()
    patterns = {"layers.0.self_attn.q_proj": 7, "q_proj": 5, ".*self_attn.q_proj": 9}
    tensors = written(
        tmp_path / "one", model, 1, alpha_pattern=patterns, init_lora_weights="gaussian"
    )
    found = load_adapter("one", tmp_path / "one", model).pairs
    for name, layer in model.named_modules():
        if (key := f"base_model.model.{name}.lora_B.weight") in tensors:
            alpha = 3 if "q_proj" not in name else 7 if "layers.0." in name else 5
            torch.testing.assert_close(found[layer][1], tensors[key] * alpha / 2)


@pytest.mark.parametrize("capture", [True, False])
def test_rows_with_and_without_an_adapter_share_batches_beside_repeated_ones(tmp_path, capture):
    model = decoder()
    tensors = written(tmp_path / "one", model, 1)
    wanted = {
        "": expected(model, PROMPT, NEW)[0],
        "one": expected(merged(model, tensors, 3 / 2), PROMPT, NEW)[0],
    }
    options = {**OPTIONS, "capture_decodes": capture, "adapters": {"one": str(tmp_path / "one")}}
    with serve(model, {"inference": options}) as engine:
        for names in ([""], ["one", ""], ["", ""], ["one"]):
            # Those with an adapter end first, so that the others are repeated thereafter.
            lengths = [NEW - 5 * bool(name) for name in names]
            params = [
                SamplingParams(max_new_tokens=n, adapter=name)
                for n, name in zip(lengths, names, strict=True)
            ]
            found = [
                list(each[0].tokens) for each in engine.generate([PROMPT] * len(names), params)
            ]
            assert found == [wanted[name][:n] for n, name in zip(lengths, names, strict=True)]


@pytest.mark.parametrize(
    "options", [{"n": 3, "temperature": 1.0, "seed": 2}, {"num_beams": 3}], ids=["n", "beams"]
)
def test_several_results_of_one_request_have_its_adapter(tmp_path, options):
    model = decoder()
    other = merged(model, written(tmp_path / "one", model, 1), 3 / 2)
    params = SamplingParams(max_new_tokens=6, adapter="one", **options)
    plain = SamplingParams(max_new_tokens=6, **options)
    blocks = 9 if params.num_beams == 1 else 12
    small = {**OPTIONS, "cache_blocks": blocks, "host_cache_bytes": 1 << 20}
    found = []
    with serve(model, {"inference": {**small, "adapters": {"one": str(tmp_path / "one")}}}) as both:
        mixed = both.generate([PROMPT] * 2, [params, plain])
        found = [[list(each.tokens) for each in results] for results in mixed]
        assert both.scheduler.swaps > 0 or params.num_beams > 1
    wanted = []
    for each in (other, model):
        with serve(each, {"inference": OPTIONS}) as engine:
            (results,) = engine.generate([PROMPT], plain)
            wanted.append([list(each.tokens) for each in results])
    assert found == wanted
    assert wanted[0] != wanted[1]


def test_an_adapter_goes_on_top_of_weights_of_fewer_bits(tmp_path):
    model = decoder(intermediate_size=64)
    tensors = written(tmp_path / "one", model, 1)
    options = {**OPTIONS, "weight_format": "int8", "adapters": {"one": str(tmp_path / "one")}}
    with serve(model, {"inference": options}) as engine:
        params = SamplingParams(max_new_tokens=1, adapter="one", logprobs=90)
        ((found,),) = engine.generate([PROMPT], params)
    logits = merged(model, tensors, 3 / 2)(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    logprobs = torch.log_softmax(logits.detach(), 0)
    for token, value in found.logprobs[0].top:
        assert abs(value - float(logprobs[token])) < 0.1


def test_adapters_that_cannot_be_served_are_refused_by_name(tmp_path):
    model = decoder()
    tensors = written(tmp_path / "good", model, 1)
    written(tmp_path / "dora", model, 1, use_dora=True)
    written(tmp_path / "biased", model, 1, bias="all")
    written(tmp_path / "alora", model, 1, alora_invocation_tokens=[5, 6])
    written(tmp_path / "later", model, 1, use_what_comes_later=True, target_parameters=None)
    written(tmp_path / "pissa", model, 1, init_lora_weights="pissa_niter_16")
    written(tmp_path / "ia3", model, 1, peft_type="IA3")
    written(tmp_path / "head", model, 1, targets=("lm_head",))
    written(tmp_path / "larger", decoder(hidden_size=64), 1)
    written(tmp_path / "damaged", model, 1)
    (tmp_path / "damaged" / "adapter_model.safetensors").write_bytes(b"no tensors")
    written(tmp_path / "half", model, 1)
    half = {
        key: value
        for key, value in tensors.items()
        if not key.endswith("0.self_attn.q_proj.lora_B.weight")
    }
    save_file(half, tmp_path / "half" / "adapter_model.safetensors")
    written(tmp_path / "odd", model, 1)
    save_file(
        {**tensors, "base_model.model.x": torch.ones(2)},
        tmp_path / "odd" / "adapter_model.safetensors",
    )
    written(tmp_path / "deep", decoder(num_hidden_layers=3), 1)
    with serve(model, {"inference": OPTIONS}) as engine:
        for name, message in (
            ("missing", "cannot be loaded as an adapter"),
            ("damaged", "cannot be loaded as an adapter"),
            ("dora", "sets use_dora, which is not served"),
            ("biased", "sets bias, which is not served"),
            ("alora", "sets alora_invocation_tokens, which is not served"),
            ("later", "sets use_what_comes_later, which is not served"),
            ("pissa", "has init_lora_weights 'pissa_niter_16', which changes the model's own"),
            ("ia3", "is an adapter of kind IA3, and LORA alone is served"),
            ("head", "lm_head is a Linear that makes logits"),
            ("larger", r"has matrices .*the layer makes 32 outputs of \d+ inputs"),
            ("half", "q_proj has one matrix of two"),
            ("odd", r"base_model\.model\.x of .* is no matrix of LoRA"),
            ("deep", r"changes model\.layers\.2\.\w+\.\w+, which the model has not"),
        ):
            with pytest.raises(ConfigError, match=message):
                engine.adapters.load("new", tmp_path / name)
        assert engine.adapters.names == []
        with pytest.raises(ConfigError, match="there is no adapter 'new'"):
            engine.generate([PROMPT], SamplingParams(adapter="new"))


def test_an_adapter_of_experts_is_refused_as_rows_are_not_requests(tmp_path):
    model = decoder()

    class Half(torch.nn.Module):
        """Sends some tokens through a layer, as experts do."""

        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            y = torch.zeros(*x.shape[:-1], self.layer.out_features)
            chosen = x[..., 0] > 0
            y[chosen] = self.layer(x[chosen])
            return y

    mlp = model.model.layers[0].mlp
    mlp.up_proj = Half(mlp.up_proj)
    written(tmp_path / "one", model, 1, targets=("layer",))
    with (
        serve(model, {"inference": {**OPTIONS, "fast_path": "never"}}) as engine,
        pytest.raises(ConfigError, match="which request a row belongs to is not known"),
    ):
        engine.adapters.load("one", tmp_path / "one")

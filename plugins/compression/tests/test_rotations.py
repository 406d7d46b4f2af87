"""Rotations cancel: the model computes the same, and rounds better where features stick out."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from drivetrain_compression import compress, compress_module, load_compressed
from drivetrain_compression.calibrated import walk as walking
from drivetrain_compression.calibrated.rotations import Rotation
from tiny_models import Chain, bert, llama, rows
from torch import nn

from drivetrain.errors import ConfigError

ROTATE = {"modifiers": [{"rotate": {}}]}


@pytest.mark.parametrize("order", [1, 2, 12, 20, 28, 36, 60, 64, 256, 576, 896, 960])
def test_matrices_are_those_of_hadamard(order):
    rotation = Rotation.random(order, 3)
    matrix = rotation.turn(torch.eye(order))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order).double())
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, order**-0.5))
    x = torch.randn(5, order, dtype=torch.float64)
    torch.testing.assert_close(rotation.turn(x), x @ matrix)
    torch.testing.assert_close(rotation.back(x), x @ matrix.T)


@pytest.mark.parametrize("order", [3, 52 * 3, 70])
def test_other_orders_have_an_orthogonal_matrix(order):
    matrix = Rotation.random(order, 0).turn(torch.eye(order))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order).double())


def qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _drawn(Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=False)


def qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _drawn(Qwen3ForCausalLM, Qwen3Config, head_dim=16)


def gemma():
    from transformers import GemmaConfig, GemmaForCausalLM

    return _drawn(GemmaForCausalLM, GemmaConfig, head_dim=8)


def _drawn(kind, config, **changes):
    torch.manual_seed(0)
    made = config(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, **changes,
    )  # fmt: skip
    model = kind(made).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.uniform_(parameter, 0.5, 2.0)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=rows()[0]).logits


@pytest.mark.parametrize("make", [llama, qwen2, qwen3, gemma])
def test_the_model_computes_the_same_when_it_is_turned(make):
    model = make().double()
    before = copy.deepcopy(model)
    compress_module(model, ROTATE, rows())
    torch.testing.assert_close(logits(model), logits(before), rtol=1e-5, atol=1e-5)
    same = [
        name
        for (name, a), (_, b) in zip(
            model.named_parameters(remove_duplicate=False),
            before.named_parameters(remove_duplicate=False),
            strict=True,
        )
        if torch.equal(a, b)
    ]
    kept = {part for name in same for part in ("q_norm", "k_norm", "_proj.bias") if part in name}
    assert all(any(part in name for part in kept) for name in same)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings


def test_weights_are_those_of_the_formulas():
    model = llama(num_hidden_layers=2).double()
    before = copy.deepcopy(model)
    compress_module(model, {"modifiers": [{"rotate": {"seed": 5, "heads": False}}]}, rows())
    turned = Rotation.random(32, 5).turn(torch.eye(32))
    old, new = before.model.layers[1], model.model.layers[1]
    gain = torch.diag(old.input_layernorm.weight)
    close = torch.testing.assert_close
    close(new.self_attn.q_proj.weight, old.self_attn.q_proj.weight @ gain @ turned)
    close(new.self_attn.o_proj.weight, turned.T @ old.self_attn.o_proj.weight)
    close(new.mlp.down_proj.weight, turned.T @ old.mlp.down_proj.weight)
    close(new.input_layernorm.weight, torch.ones(32).double())
    close(model.model.embed_tokens.weight, before.model.embed_tokens.weight @ turned)
    head = before.lm_head.weight @ torch.diag(before.model.norm.weight) @ turned
    close(model.lm_head.weight, head)


def test_values_of_heads_are_turned_head_by_head():
    models = [llama(num_hidden_layers=2).double() for _ in range(2)]
    for model, heads in zip(models, (False, True), strict=True):
        compress_module(model, {"modifiers": [{"rotate": {"heads": heads}}]}, rows())
    plain, turned = (m.model.layers[0].self_attn.v_proj.weight for m in models)
    for at in range(0, 16, 8):  # two heads of 8
        one, two = plain[at : at + 8], turned[at : at + 8]
        assert not torch.allclose(one, two)
        torch.testing.assert_close(one.T @ one, two.T @ two)
    torch.testing.assert_close(*(m.model.layers[0].self_attn.k_proj.weight for m in models))


def test_a_tied_folder_gives_what_the_module_in_memory_does(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "model")
    recipe = {"modifiers": [{"rotate": {}}, {"gptq": {"group": 16}}]}
    compress(tmp_path / "model", recipe, rows(), tmp_path / "out", format="drivetrain")
    compress_module(model, recipe, rows())
    loaded = load_compressed(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )


class Killed(BaseException):
    pass


@pytest.mark.parametrize("when", ["layers.1 gptq", "rest"])
def test_a_killed_job_goes_on(tmp_path, monkeypatch, when):
    llama().save_pretrained(tmp_path / "model")
    recipe = {"modifiers": [{"rotate": {}}, {"gptq": {"group": 16}}]}

    def run(name, **options):
        compress(tmp_path / "model", recipe, rows(), tmp_path / name, format="plain", **options)

    def dying(what, done, total):
        if when in what:
            raise Killed

    def no_rest(walk, blocks, number):
        raise Killed

    run("whole")
    with monkeypatch.context() as patched:
        if when == "rest":
            patched.setattr(walking.Walk, "_rest", no_rest)
        with pytest.raises(Killed):
            run("killed", report=dying)
    run("killed")
    first, second = (load_compressed(tmp_path / name).state_dict() for name in ("whole", "killed"))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_features_that_stick_out_round_better_when_turned():
    def model():
        made = llama(hidden_size=64, intermediate_size=128)
        with torch.no_grad():  # two features of hidden states count more, and are read more
            made.model.embed_tokens.weight[:, :2] *= 10
            for layer in made.model.layers:
                for part in (*layer.self_attn.children(), *layer.mlp.children()):
                    if isinstance(part, nn.Linear) and part.in_features == 64:
                        part.weight[:, :2] *= 10
        return made

    exact = logits(model())
    for rounding in ({"round": {"bits": 4}}, {"gptq": {"bits": 8, "activations": "int8"}}):
        off = []
        for first in ([], [{"rotate": {}}]):
            made = model()
            compress_module(made, {"modifiers": [*first, rounding]}, rows(8, 32))
            off.append(float((logits(made) - exact).square().mean()))
        assert off[1] < 0.7 * off[0], (rounding, off)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bert, "BertModel returns hidden states that were turned"),
        (gpt2, r"transformer\.h\.0 \(GPT2Block\) has no linear layers"),
        (Chain, "Chain has no norm and head behind"),
        (lambda: llama().model, "LlamaModel has no norm and head"),
        (lambda: llama(num_hidden_layers=1), "LlamaForCausalLM has no repeated blocks"),
    ],
)
def test_models_that_change_are_refused(make, message):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=message):
        compress_module(model, ROTATE, rows())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Leaky(nn.Module):
    """May add what its norm makes to hidden states, too; computes something else turned then."""

    def __init__(self, leak):
        super().__init__()
        self.leak = leak
        self.norm, self.up = nn.RMSNorm(16), nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x):
        normed = self.norm(x)
        return x + self.down(self.up(normed).relu()) + (normed.abs() if self.leak else 0)


def refusing():
    """Blocks of which only the last cannot be turned, and a head that is tied."""
    model = Chain()
    model.layers = nn.ModuleList(Leaky(leak) for leak in (False, False, True))
    model.head = nn.Sequential(nn.RMSNorm(16), nn.Linear(16, 90))
    model.head[1].weight = model.embed.weight
    return model


def test_a_block_that_changes_is_refused_by_name_and_the_model_stays_as_it_was():
    model = refusing()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ConfigError, match=r"layers\.2 does not compute the same.*norm as norms.*down"
    ):
        compress_module(model, ROTATE, rows())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.head[1].weight is model.embed.weight
    model.layers[2].leak = False
    wanted = model(rows()[0]).detach()
    compress_module(model, ROTATE, rows())
    torch.testing.assert_close(model(rows()[0]), wanted, rtol=1e-4, atol=1e-4)
    assert model.head[1].weight is not model.embed.weight


def test_weights_that_no_method_takes_are_refused_before_a_block_is_turned():
    model = refusing()
    model.layers[2].leak = False
    model.layers[2].up.weight.data[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=r"layers\.2\.up has NaN"):
        compress_module(model, {"modifiers": [{"rotate": {}}, {"round": {}}]}, rows())
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


def test_patterns_are_refused():
    with pytest.raises(ConfigError, match="leave out modules and exclude"):
        compress_module(llama(), {"modifiers": [{"rotate": {"modules": ["mlp"]}}]}, rows())

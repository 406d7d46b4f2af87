"""A dense model that has become a mixture of experts computes at first what it did before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drivetrain_moe import find_mlps, upcycle
from torch import nn

from drivetrain.errors import ConfigError

transformers = pytest.importorskip("transformers")

WIDTH, INNER = 8, 12


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


class FusedGate(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * INNER, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(gate.sigmoid() * up)


class Mixer(nn.Module):
    """Matrices of a layer with a fused gate, but tokens see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, scores = self.qkv(x).chunk(2, -1)
        return self.out((scores @ scores.mT).softmax(-1) @ values)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(3, WIDTH)
        self.mixer = Mixer()
        self.ffn = nn.ModuleList([Plain(), FusedGate(), Plain()])
        adapter = nn.Sequential(nn.Linear(WIDTH, 2), nn.ReLU(), nn.Linear(2, WIDTH))
        self.adapter = adapter
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mixer(self.stem(x))
        for layer in (*self.ffn, self.adapter):
            x = x + layer(x)
        return x


def transformer(name: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}Config")(vocab_size=64, **config)
    return getattr(transformers, f"{name}ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel")(
        kind
    ).double()


LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def hidden() -> torch.Tensor:
    return torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(3)).double()


def words() -> torch.Tensor:
    return torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(3))


def equal(model: nn.Module, dense: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        for training in (True, False):  # no dropout in these models
            got, expected = (m.train(training)(x) for m in (model, dense))
            got, expected = (getattr(out, "logits", out) for out in (got, expected))
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"k": 2}, {"gate", "experts"}),
        ({"k": 3}, {"gate", "experts"}),
        ({"k": 1, "normalise": True}, {"gate", "experts"}),
        ({"k": 2, "use_residual": True}, {"gate", "experts", "residual", "coefficient"}),
    ],
)
def test_an_upcycled_model_computes_what_the_dense_one_does(
    options: dict[str, Any], names: set[str]
) -> None:
    dense = Dense()
    model = copy.deepcopy(dense)
    new = upcycle(model, 4, **options)
    assert list(new) == ["ffn.0", "ffn.1", "ffn.2"]
    equal(model, dense, hidden())
    state, before = model.state_dict(), dense.state_dict()
    assert {name.split(".")[2] for name in state if name.startswith("ffn.0.")} == names
    for name in ("up.weight", "up.bias", "down.weight"):
        for expert in range(4):
            assert torch.equal(state[f"ffn.0.experts.{expert}.{name}"], before[f"ffn.0.{name}"])
    assert {n for n in state if not n.startswith("ffn.")} == {
        n for n in before if not n.startswith("ffn.")
    }


def test_one_expert_a_token_begins_near_the_dense_model_and_trains_its_router() -> None:
    dense = Dense()
    model = copy.deepcopy(dense)
    new = upcycle(model, 4, k=1)
    difference = (model(hidden()) - dense(hidden())).abs().max() / dense(hidden()).abs().max()
    assert 0 < difference < 0.05  # a weight is E times a score near 1 / E
    model(hidden()).square().sum().backward()
    assert all(layer.gate.weight.grad.abs().max() > 0 for layer in new.values())


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: transformer("Llama", **LLAMA), ["model.layers.0.mlp", "model.layers.1.mlp"]),
        (
            lambda: transformer(
                "GPT2", n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
            ),
            ["transformer.h.0.mlp"],
        ),
    ],
    ids=["gate", "plain"],
)
def test_models_of_transformers_are_upcycled(
    build: Callable[[], nn.Module], names: list[str]
) -> None:
    dense, model = build(), build()
    assert list(upcycle(model, 4)) == names
    equal(model, dense, words())


def test_a_pyramid_has_other_numbers_of_experts_and_leaves_layers_dense() -> None:
    dense = Dense()
    model = copy.deepcopy(dense)
    new = upcycle(model, [2, 0, 6], use_residual=True)
    assert {name: layer.num_experts for name, layer in new.items()} == {"ffn.0": 2, "ffn.2": 6}
    assert type(model.ffn[1]) is FusedGate
    equal(model, dense, hidden())
    upcycle(model, 3, layers=r"ffn\.1|adapter")  # what is left, and what only a name finds
    equal(model, dense, hidden())


def test_a_layer_in_two_places_stays_one() -> None:
    dense = Dense()
    dense.ffn[2] = dense.ffn[0]
    model = copy.deepcopy(dense)
    upcycle(model, 4)
    assert model.ffn[2] is model.ffn[0]
    equal(model, dense, hidden())


def test_the_seed_decides_what_is_drawn() -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        model = Dense()
        upcycle(model, 4, seed=seed, reinitialise=0.5)
        return model.state_dict()

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in ("ffn.0.gate.weight", "ffn.1.experts.2.up.weight"):
        assert not torch.equal(first[name], other[name])


def test_partly_drawn_experts_keep_the_other_neurons() -> None:
    dense = Dense()
    model = copy.deepcopy(dense)
    upcycle(model, 4, reinitialise=0.25)  # 3 of 12
    drawn = set()
    for layer, expert in ((0, 0), (0, 1), (1, 0), (1, 3)):
        before, after = dense.ffn[layer], model.ffn[layer].experts[str(expert)]
        rows = (before.up.weight != after.up.weight).all(1)
        assert torch.equal(rows, (before.up.weight != after.up.weight).any(1))
        columns = (before.down.weight != after.down.weight).all(0)
        assert columns.sum() == 3
        assert torch.equal(rows, columns if layer == 0 else columns.repeat(2))  # gate and up
        drawn.add(tuple(columns.nonzero().flatten().tolist()))
    assert len(drawn) > 1


def wrong(model: nn.Module, *arguments: Any, **options: Any) -> str:
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ConfigError) as error:
        upcycle(model, *arguments, **options)
    assert {name: type(module) for name, module in model.named_modules()} == before
    return str(error.value)


def test_what_cannot_be_upcycled_is_refused_and_the_model_stays() -> None:
    model = Dense()
    message = wrong(model, 4, layers="stem")
    assert "layers: stem (Linear) has 1 matrices; a feed-forward" in message
    message = wrong(model, 4, layers="mixer")
    assert message.startswith(
        "upcycle: layers: mixer (Mixer) does not compute each token by itself"
    )
    message = wrong(model, 4, layers="mlp.*")
    assert "no module of Dense has a name that matches 'mlp.*'; feed-forward layers are" in message
    assert message.endswith("ffn.0, ffn.1, ffn.2")
    assert "upcycle: ffn.0: MoE: 3 experts do not divide by ep_size 2" in wrong(model, 3, ep_size=2)
    assert "ffn.2: MoE: k = 2 is not from 1 to num_experts = 1" in wrong(model, [2, 2, 1])
    assert "num_experts has 2 numbers for 3 layers: ffn.0, ffn.1, ffn.2" in wrong(model, [2, 4])
    assert "num_experts = 0 is below 1" in wrong(model, 0)
    assert "reinitialise = 2 is not from 0 to 1" in wrong(model, 4, reinitialise=2)
    nothing = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    assert "Sequential has no module that looks like a feed-forward layer" in wrong(nothing, 4)
    with torch.device("meta"):
        meta = Dense()
    assert "ffn.0.up.weight has no values (meta device): load the dense" in wrong(meta, 4)


def test_layers_are_found_by_what_they_compute() -> None:
    found = find_mlps(Dense())
    assert [(mlp.name, mlp.width, mlp.inner) for mlp in found] == [
        (f"ffn.{layer}", WIDTH, INNER) for layer in range(3)
    ]

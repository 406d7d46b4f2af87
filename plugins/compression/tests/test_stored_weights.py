"""Weights that stay packed: formats, products, LoRA beside them, and models converted to them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_models import batches, net
from drivetrain_compression import (
    LoRAConfig,
    LoRALinear,
    QuantizationConfig,
    StoredLinear,
    StoredWeight,
    lora_over_quantised,
)
from drivetrain_compression.deepspeed.linear import (
    LoRAOptimizedLinear,
    OptimizedLinear,
    QuantizedLinear,
    QuantizedParameter,
    init_lora,
)
from drivetrain_compression.stored.formats import format_named
from live_memory import Live
from tiny_models import llama, rows
from torch import nn

from drivetrain.errors import ConfigError

DOUBLE = torch.float64
# Appendix E of arXiv 2305.14314.
NORMAL = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
SMALL = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
SIX = [m / 16 for m in range(4)] + [2.0**e * (1 + m / 4) for e in range(-2, 5) for m in range(4)]
GRIDS = {"e2m1": SMALL, "e3m2": SIX}
BITS = {"e4m3": 8, "e5m2": 8, "e3m2": 6, "e2m1": 4, "nf4": 4}


def grid_of(name: str) -> torch.Tensor:
    """All numbers of a format, by its definition."""
    if name == "nf4":
        return torch.tensor(NORMAL)
    if name in GRIDS:
        numbers = torch.tensor(GRIDS[name], dtype=torch.float32)
    else:
        kind = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
        numbers = torch.arange(128, dtype=torch.uint8).view(kind).float()
        numbers = numbers[torch.isfinite(numbers)]
    return torch.cat([-numbers.flip(0), numbers])


@pytest.mark.parametrize("name", sorted(BITS))
@pytest.mark.parametrize("shape", [(16, 32), (7, 11)])
def test_each_number_is_the_nearest_of_its_format(name: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, group = torch.randn(shape), 64
    weight[0, 1:4] = 0
    form = format_named(name, group=group)
    packed = form.pack(weight)
    values = form.unpack(packed, shape, torch.float32).flatten()
    grid = grid_of(name)
    for at in range(0, weight.numel(), group):
        part = weight.flatten()[at : at + group]
        scale = part.abs().max() / grid.max()
        distance = (part[:, None] - grid * scale).abs().amin(1)
        error = (part - values[at : at + group]).abs()
        torch.testing.assert_close(error, distance, rtol=1e-4, atol=1e-6)
    codes = -(-weight.numel() // 4) * 4 if name == "e3m2" else -(-weight.numel() // 2) * 2
    wanted = codes * BITS[name] // 8 + 4 * -(-weight.numel() // group)
    assert sum(part.nbytes for part in packed.values()) == form.bytes(shape) == wanted


@pytest.mark.parametrize("shape", [(64, 64), (33, 20), (1, 4)])
def test_two_of_four_are_kept_exactly_in_little_more_than_half(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).bfloat16().view(shape[0], -1, 4)
    gone = torch.rand(weight.shape).argsort(2)[:, :, :2]
    weight = weight.scatter(2, gone, 0.0).view(shape)
    form = format_named("two_of_four")
    packed = form.pack(weight)
    assert torch.equal(form.unpack(packed, shape, torch.bfloat16), weight)
    for many, dtype in (
        (1, torch.bfloat16),
        (3, torch.bfloat16),
        (20, torch.bfloat16),
        (2, DOUBLE),
    ):
        x = torch.randn(many, shape[1], dtype=dtype)
        product = form.multiply(x, packed, shape[0])
        wanted = (x.double() @ weight.double().T).to(dtype)
        torch.testing.assert_close(product, wanted, rtol=2e-2, atol=2e-2)
    if shape == (64, 64):
        assert form.bytes(shape) == 64 * 64 * (1 + 1 / 8)
    weight[0, :4] = 1.0
    with pytest.raises(ConfigError, match=rf"\[{shape[0]}, {shape[1]}\] has more than two of four"):
        form.pack(weight)


def test_long_weights_are_packed_in_pieces_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, form = torch.randn(33, 50), format_named("e3m2", group=40)
    whole = form.pack(weight)
    monkeypatch.setattr("drivetrain_compression.stored.formats._AT_ONCE", 100)
    for name, part in form.pack(weight).items():
        assert torch.equal(part, whole[name])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_integers_in_groups_are_as_documented(bits: int, dim: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 32)
    form = format_named(f"grouped_int{bits}", group=8, dim=dim)
    packed = form.pack(weight)
    found = form.unpack(packed, weight.shape, DOUBLE)
    wide = weight.double() if dim == 1 else weight.double().T
    groups = wide.reshape(-1, 8)
    low = groups.amin(1, keepdim=True)
    step = (groups.amax(1, keepdim=True) - low) / (2**bits - 1)
    wanted = (torch.round((groups - low) / step) * step + low).view(wide.shape)
    torch.testing.assert_close(found, wanted if dim == 1 else wanted.T, rtol=0, atol=2e-6)
    for many in (5, 20):
        x = torch.randn(many, 32)
        torch.testing.assert_close(form.multiply(x, packed, 16), x @ found.T.float())
    with pytest.raises(ConfigError, match=r"\[16, 32\] is not cut into groups of 10"):
        format_named(f"grouped_int{bits}", group=10, dim=dim).pack(weight)


def test_nothing_but_the_bytes_is_kept_and_nothing_changes_them() -> None:
    weight = torch.randn(24, 40, dtype=DOUBLE)
    form = format_named("e3m2", group=64)
    stored = StoredWeight(weight, form)
    held = [*stored.parameters(), *stored.buffers()]
    assert [t.nbytes for t in held] == [form.bytes((24, 40))] == [720 + 4 * 15]
    wanted = form.unpack(form.pack(weight), (24, 40), DOUBLE)
    other = nn.Sequential(QuantizedParameter(torch.randn(24, 40, dtype=DOUBLE), False, SIX_BITS))
    other.load_state_dict({f"0.{name}": value for name, value in stored.state_dict().items()})
    for each in (
        stored,
        copy.deepcopy(stored),
        pickle.loads(pickle.dumps(stored)),
        copy.deepcopy(stored).to(torch.bfloat16),
        other[0],
    ):
        assert torch.equal(each.dequantized(DOUBLE), wanted)


SIX_BITS = QuantizationConfig(q_bits=6, group_size=64)


@pytest.mark.parametrize("name", ["e4m3", "nf4", "grouped_int4"])
def test_products_have_the_gradients_of_plain_ones_twice(name: str) -> None:
    torch.manual_seed(0)
    stored = StoredWeight(torch.randn(6, 8, dtype=DOUBLE), format_named(name, group=8))
    x = torch.randn(2, 3, 8, dtype=DOUBLE, requires_grad=True)
    plain = stored.dequantized()
    for training in (True, False):
        stored.train(training)
        torch.testing.assert_close(stored.product(x), x @ plain.T, rtol=1e-14, atol=1e-14)
        assert torch.autograd.gradcheck(stored.product, x)
        assert torch.autograd.gradgradcheck(lambda x: stored.product(x).sin(), x)


def test_products_of_serving_are_the_formats_own(monkeypatch: pytest.MonkeyPatch) -> None:
    form = format_named("grouped_int8", group=8)
    layer = StoredLinear(torch.randn(6, 8), nn.Parameter(torch.randn(6)), form)
    x, calls = torch.randn(2, 3, 8), []
    monkeypatch.setattr(form, "multiply", lambda x, p, n: calls.append(x.shape) or x @ weight.T)
    weight = layer.weight.dequantized()
    layer.train()(x)
    assert not calls
    torch.testing.assert_close(layer.eval()(x), nn.functional.linear(x, weight, layer.bias))
    assert calls == [(6, 8)]


def test_autocast_decides_the_dtype() -> None:
    layer = QuantizedLinear(8, 6, dtype=torch.float32, quantization_config=SIX_BITS)
    x = torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("quantization", [None, SIX_BITS, QuantizationConfig(format="nf4")])
def test_lora_is_its_formula(quantization: QuantizationConfig | None) -> None:
    torch.manual_seed(0)
    lora = LoRAConfig(lora_r=4, lora_alpha=6.0)
    layer: Any = OptimizedLinear(8, 6, False, lora, quantization, None, DOUBLE)
    assert isinstance(layer, LoRAOptimizedLinear)
    a, b = layer.lora_weight_1.weight, layer.lora_weight_2.weight
    x = torch.randn(5, 8, dtype=DOUBLE)
    base = layer.full_weight()
    assert torch.equal(layer(x), x @ base.T + 0)
    assert a.shape == (4, 8)
    assert a.abs().max() <= 8**-0.5
    nn.init.normal_(b)
    torch.testing.assert_close(layer(x), x @ base.T + 6 / 4 * (x @ a.T) @ b.T)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == [
        "lora_weight_1.weight",
        "lora_weight_2.weight",
    ]


def test_the_configs_choose_the_layer() -> None:
    assert type(OptimizedLinear(8, 6)) is nn.Linear
    assert isinstance(OptimizedLinear(8, 6, quantization_config=SIX_BITS), QuantizedLinear)
    late: Any = OptimizedLinear(8, 6, lora_config=LoRAConfig(lora_r=2, delay_lora_init=True))
    with pytest.raises(ConfigError, match="init_lora"):
        late(torch.zeros(1, 8, dtype=torch.bfloat16))
    init_lora(nn.Sequential(late))
    assert late(torch.zeros(1, 8, dtype=torch.bfloat16)).shape == (1, 6)


def test_a_model_trains_low_rank_changes_of_packed_weights() -> None:
    model = net()
    model.layers[0].down.eval()
    before = sum(p.numel() for n, p in model.named_parameters() if "up.w" in n or "down.w" in n)
    config = QuantizationConfig(format="grouped_int8", group_size=8)
    changed: Any = lora_over_quantised(
        model, LoRAConfig(lora_r=2), config, modules=[r"\.up$", "down"]
    )
    assert changed is model
    layers = {n: m for n, m in changed.named_modules() if isinstance(m, LoRALinear)}
    assert sorted(layers) == ["layers.0.down", "layers.0.up", "layers.1.down", "layers.1.up"]
    assert {n for n, m in layers.items() if not m.training} == {"layers.0.down"}
    assert all(("lora" in n) == p.requires_grad for n, p in changed.named_parameters())
    packed = sum(b.nbytes for n, b in changed.named_buffers() if n.endswith("packed"))
    assert packed == before * 2  # 8 bits, and a scale and an offset of 32 bits for 8
    plain = net()
    for name, layer in layers.items():
        plain.get_submodule(name).weight.data.copy_(layer.full_weight())
    tokens, targets = batches(1)[0]
    torch.testing.assert_close(changed(tokens, targets), plain(tokens, targets))


def test_a_shared_layer_is_exchanged_everywhere() -> None:
    layer = nn.Linear(64, 64)
    model = nn.Sequential(layer, nn.Sequential(layer))
    lora_over_quantised(model, modules=["*"])
    inner: Any = model[1]
    assert model[0] is inner[0]
    assert isinstance(model[0], LoRALinear)


class Odd(nn.Linear):
    """A layer with a forward of its own."""


def odd_models() -> dict[str, tuple[nn.Module, str]]:
    tied = net()
    tied.head.weight = tied.embed.weight
    hooked, broken, normed = net(), net(), net()
    hooked.head.register_forward_hook(lambda *a: None)
    broken.head.weight.data[0, 0] = float("nan")
    nn.utils.parametrizations.weight_norm(normed.head)
    odd = net()
    odd.head = Odd(8, 12)
    return {
        "tied": (tied, "head cannot be stored.*also.*embed"),
        "hooked": (hooked, "head has hooks"),
        "broken": (broken, "head: .*not finite"),
        "normed": (normed, "head cannot be stored.*parametrisation"),
        "odd": (odd, "head is a Odd"),
    }


@pytest.mark.parametrize("name", ["tied", "hooked", "broken", "normed", "odd"])
def test_odd_layers_are_refused_by_name(name: str) -> None:
    model, message = odd_models()[name]
    with pytest.raises(ConfigError, match=message):
        lora_over_quantised(model, modules=["^head$"])


def test_what_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"modules: .*'lm_head' is found"):
        lora_over_quantised(net(), modules=["lm_head"])
    with pytest.raises(
        ConfigError, match=r"layers\.0\.up: a weight \[32, 8\] is not cut into groups"
    ):
        lora_over_quantised(
            net(), None, QuantizationConfig(format="grouped_int4"), modules=["up", "down"]
        )
    with pytest.raises(ConfigError, match="no format has 12 bits"):
        QuantizationConfig(q_bits=12).weight_format()
    with pytest.raises(ConfigError, match=r"'w3' is not known; there are .*e4m3"):
        QuantizationConfig(format="w3").weight_format()
    with pytest.raises(ConfigError, match="give a multiple of 8"):
        QuantizationConfig(group_size=12).weight_format()
    with pytest.raises(ConfigError, match=r"torch\.int8"):
        QuantizationConfig(q_dtype=torch.int8).weight_format()
    with pytest.raises(ConfigError, match="offload_ratio"):
        LoRAConfig(offload_ratio=0.5)
    with pytest.raises(ConfigError, match="lora_r"):
        LoRAConfig(lora_r=0)
    with pytest.raises(ConfigError, match="2 parts, but the world has 1 rank"):
        OptimizedLinear(8, 8, lora_config=LoRAConfig(base_weight_sharding=2))
    with pytest.raises(ConfigError, match="frozen"):
        QuantizedParameter(torch.randn(8, 8), requires_grad=True)
    with pytest.raises(ConfigError, match="meta device"):
        StoredWeight(torch.empty(8, 8, device="meta"), format_named("e4m3"))
    with pytest.raises(ConfigError, match="no matrix of floats"):
        StoredWeight(torch.ones(8), format_named("e4m3"))


def test_a_model_on_disk_is_never_whole_in_memory(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}
    model = llama(**sizes).float()
    model.save_pretrained(tmp_path)
    config = QuantizationConfig(format="nf4")
    with Live() as live:
        small: Any = lora_over_quantised(str(tmp_path), LoRAConfig(lora_r=2), config)
    held = sum(t.nbytes for t in {*small.parameters(), *small.buffers()})
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    assert live.now <= held + 4096
    assert live.most <= held + block
    assert live.most < 0.6 * sum(p.nbytes for p in model.parameters())
    assert not any(p.is_meta for p in small.parameters())
    for name, layer in small.named_modules():
        if isinstance(layer, LoRALinear):
            assert isinstance(layer.weight, StoredWeight)
            whole = model.get_submodule(name).weight.detach()
            wanted = StoredWeight(whole, config.weight_format()).dequantized()
            model.get_submodule(name).weight.data.copy_(wanted)
    ids = rows(2)[0]
    torch.testing.assert_close(small(ids).logits, model(ids).logits)

"""The section ``weight_quantization``: weights packed as they get values, to serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_models import batches, net
from drivetrain_compression import StoredLinear, store_for_serving
from drivetrain_compression.deepspeed.compress import quantise_for_serving
from drivetrain_compression.stored.linear import StoredEmbedding
from live_memory import Live
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError
from drivetrain.plan import Plan

BASE: dict[str, Any] = {"train_micro_batch_size_per_gpu": 4}


def rounded(weight: torch.Tensor, bits: int, group: int, symmetric: bool = False) -> torch.Tensor:
    """As the section says, in float64."""
    groups = weight.double().reshape(-1, group)
    if symmetric:
        step = groups.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        return (torch.round(groups / step) * step).view(weight.shape)
    low = groups.amin(1, keepdim=True)
    step = (groups.amax(1, keepdim=True) - low) / (2**bits - 1)
    return (torch.round((groups - low) / step) * step + low).view(weight.shape)


def section(**keys: Any) -> dict[str, Any]:
    return {**BASE, "weight_quantization": keys}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval().logits(batches(1)[0][0])
    return found


@pytest.mark.parametrize("on_meta", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_are_packed_as_the_section_says(on_meta: bool, symmetric: bool) -> None:
    plain = net().float()
    values = {name: p.detach().clone() for name, p in plain.state_dict().items()}
    group = {"num_bits": 8, "group_size": 8, "group_dim": -1, "symmetric": symmetric}
    model = plain.to("meta") if on_meta else net().float()
    engine = drivetrain.initialize(
        model=model,
        config=section(quantized_initialization=group),
        weights=values if on_meta else None,
    )[0]
    layers = [m for m in model.modules() if isinstance(m, (StoredLinear, StoredEmbedding))]
    assert len(layers) == 14
    assert model.embed.weight.shape == (12, 8)
    assert {n.rpartition(".")[2] for n, _ in model.named_parameters()} == {"bias"}
    numbers = sum(m.weight.shape.numel() for m in layers)
    per_group = 4 if symmetric else 8
    kept = [m.weight for m in layers]
    assert sum(w.packed.nbytes for w in kept) == numbers + numbers // 8 * per_group
    wanted = net().float()
    for name, parameter in wanted.named_parameters():
        if name.endswith("weight"):
            parameter.data.copy_(rounded(parameter.data, 8, 8, symmetric))
    torch.testing.assert_close(logits(engine.module), logits(wanted))
    engine.destroy()


def test_patterns_choose_layers_and_formats() -> None:
    model: Any = net().float()
    four = {"num_bits": 4, "group_size": 4}
    engine = drivetrain.initialize(
        model=model, config=section(post_init_quant={"up": four, r"query$": {"format": "nf4"}})
    )[0]
    found = {n: m for n, m in model.named_modules() if isinstance(m, StoredLinear)}
    assert {n.rpartition(".")[2] for n in found} == {"up", "query"}
    assert len(found) == 4
    before = net().float()
    torch.testing.assert_close(
        found["layers.1.up"].weight.dequantized(torch.float64),
        rounded(before.layers[1].up.weight.detach(), 4, 4),
        rtol=0,
        atol=1e-6,
    )
    assert found["layers.0.query"].weight.packed.nbytes == 32 + 4
    assert type(model.layers[0].key) is nn.Linear
    engine.destroy()


def test_modules_packed_by_hand_stay_as_they_are() -> None:
    config = section(post_init_quant={"up": {"group_size": 8}})
    model: Any = net().float()
    hooked = []
    model.layers[0].up.register_forward_hook(lambda *a: hooked.append(1))
    assert quantise_for_serving(model, config) is model
    first = model.layers[0].up.weight
    engine = drivetrain.initialize(model=model, config=config)[0]
    assert model.layers[0].up.weight is first
    logits(engine.module)
    assert hooked == [1]
    engine.destroy()


def test_a_precision_decides_what_embeddings_give(tmp_path: Path) -> None:
    model: Any = net().float()
    config = section(quantized_initialization={"group_size": 8}) | {"bf16": {"enabled": True}}
    engine = drivetrain.initialize(model=model, config=config)[0]
    assert logits(engine.module).dtype == torch.bfloat16
    engine.save_checkpoint(str(tmp_path))
    wanted = logits(engine.module)
    model.layers[0].up.weight.packed.zero_()
    engine.load_checkpoint(str(tmp_path))
    assert torch.equal(logits(engine.module), wanted)
    engine.destroy()


def test_tied_weights_stay_unless_they_are_asked_for() -> None:
    model: Any = net().float()
    model.head.weight = model.embed.weight
    store_for_serving(model, section(quantized_initialization={"group_size": 8}))
    assert type(model.head) is nn.Linear
    assert isinstance(model.layers[0].up, StoredLinear)
    with pytest.raises(ConfigError, match=r"post_init_quant: head cannot.*also.*embed"):
        store_for_serving(model, section(post_init_quant={"head": {"group_size": 8}}))


def test_weights_are_never_whole_in_memory(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    sizes = {"layers": 6, "width": 64}
    plain = net(**sizes).float()
    save_file(dict(plain.state_dict()), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = net(**sizes).float()
    config = section(quantized_initialization={"num_bits": 4, "group_size": 64})
    with Live() as live:
        engine = drivetrain.initialize(
            model=model, config=config, weights=str(tmp_path / "model.safetensors")
        )[0]
    held = sum(t.nbytes for t in {*model.parameters(), *model.buffers()})
    block = sum(p.nbytes for p in plain.layers[0].parameters())
    assert live.most <= held + block
    assert held < 0.2 * sum(p.nbytes for p in plain.parameters())
    engine.destroy()


def test_bad_sections_are_refused_by_name() -> None:
    group = {"group_size": 8}
    for keys, message in [
        ({"quantized_initialization": group, "post_init_quant": {"up": group}}, "either"),
        ({"post_init_quant": {"up": {"num_bits": 3}}}, "post_init_quant.up.num_bits"),
        ({"post_init_quant": {"up": {"group_size": 6}}}, r"layers\.0\.up: a weight \[32, 8\]"),
        ({"post_init_quant": {"up": group, r"0\.up": group}}, r"layers\.0\.up is found by 'up'"),
        ({"post_init_quant": {"nowhere": group}}, "'nowhere' is found"),
        ({"post_init_quant": {"up": {"format": "w3"}}}, "'w3' is not known"),
        ({"post_init_quant": {"up": {"format": "nf4", "num_bits": 4}}}, "leave the other keys"),
    ]:
        with pytest.raises(ConfigError, match=message):
            store_for_serving(net().float(), section(**keys))


def test_what_trains_is_refused() -> None:
    config = section(quantized_initialization={"group_size": 8})
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    with pytest.raises(ConfigError, match=r"weight_quantization.*cannot be trained"):
        Plan.build({**config, **sgd}, world_size=1)
    model = net().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"weight_quantization.*cannot be trained"):
        drivetrain.initialize(model=model, optimizer=optimizer, config=config)
    assert isinstance(model.layers[0].up.weight, nn.Parameter)


def test_values_that_are_not_finite_are_refused() -> None:
    model = net().float()
    model.layers[0].up.weight.data[0, 0] = float("inf")
    with pytest.raises(ConfigError, match=r"layers\.0\.up: .*not finite"):
        store_for_serving(model, section(post_init_quant={"up": {"group_size": 8}}))

"""Packed weights whose products are sums of whole numbers: the numbers chosen, and the products."""

from __future__ import annotations

import pytest
import torch
from drivetrain_compression import compress, compress_module, load_packed
from drivetrain_compression.calibrated.grids import Floats, Integers, Scales, fit, round_to, stored
from drivetrain_compression.calibrated.results import Rounded, rounded_tokens
from drivetrain_compression.stored import kept_blocks
from drivetrain_compression.stored.kept import Kept, kept
from drivetrain_compression.stored.kept_blocks import KeptBlocks
from drivetrain_compression.stored.linear import StoredLinear
from drivetrain_compression.stored.weight import StoredWeight
from tiny_models import llama, rows

W8A8 = {"round": {"bits": 8, "activations": "int8"}}
W4 = {"round": {"group": 16}}
SIZES = [(8, 70, 70), (8, 64, 64), (4, 16, 64), (4, 32, 80), (4, 8, 20)]
"""(bits, group, inputs): one group a row, and several, the last one short."""


@pytest.fixture(autouse=True)
def _as_with_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference takes the place of one that is missing."""
    monkeypatch.setattr(kept_blocks, "_has_kernel", lambda device: True)


def chosen(bits: int, group: int, inputs: int, outputs: int = 40) -> Rounded:
    generator = torch.Generator().manual_seed(bits + inputs)
    weight, grid = torch.randn(outputs, inputs, generator=generator), Integers(bits)
    scales = stored(fit(weight, grid, group), torch.bfloat16)
    activations = "int8" if bits == 8 else ""
    return Rounded(round_to(weight, grid, scales), scales, grid, activations)


def product(x: torch.Tensor, found: Rounded) -> torch.Tensor:
    """Group by group in float64, on whole numbers."""
    wide, total = x.double(), torch.zeros(len(x), len(found.numbers), dtype=torch.float64)
    for at in range(found.scales.scale.shape[1]):
        near = slice(at * found.scales.group, (at + 1) * found.scales.group)
        step = wide[:, near].abs().amax(1, keepdim=True) / 127
        codes = torch.round(wide[:, near] / step)
        assert int(codes.abs().max()) <= 127
        total += (codes @ found.numbers[:, near].double().T) * step * found.scales.scale[:, at]
    return total


@pytest.mark.parametrize(("bits", "group", "inputs"), SIZES)
@pytest.mark.parametrize("tokens", [1, 3, 21])
def test_products_are_sums_of_whole_numbers(
    bits: int, group: int, inputs: int, tokens: int
) -> None:
    found = chosen(bits, group, inputs)
    form = kept(found, torch.bfloat16, rounds_inputs=True)
    assert isinstance(form, KeptBlocks)
    weight = StoredWeight.of(form, form.packed(found), found.numbers.shape, torch.bfloat16)
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        weight.eval().product(x).double(), product(x, found), rtol=1e-4, atol=1e-4
    )
    weight.rounds_inputs = False
    exact = x @ found.weight(torch.float32).T
    torch.testing.assert_close(weight.product(x), exact, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(product(x, found).float(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "group", "inputs"), SIZES)
def test_the_very_numbers_come_back(bits: int, group: int, inputs: int) -> None:
    found = chosen(bits, group, inputs)
    form = kept(found, torch.bfloat16, rounds_inputs=True)
    parts = form.packed(found)
    for name, (shape, dtype) in form.tensors(found.numbers.shape).items():
        assert (tuple(parts[name].shape), parts[name].dtype) == (shape, dtype)
    back = form.unpack(parts, found.numbers.shape, torch.float32)
    assert torch.equal(back, found.weight(torch.float32))
    weight = found.weight(torch.float32)
    again = form.unpack(form.pack(weight), weight.shape, torch.float32)
    assert float((again - weight).abs().max()) < 3 / 2 ** (bits - 1)


def test_what_such_a_format_cannot_hold_keeps_its_own() -> None:
    found = chosen(4, 16, 64)
    tiny = Scales(found.scales.scale * 2.0**-20, found.scales.zero, 16)
    eight, static = chosen(8, 64, 64), 0.5
    for other in (
        Rounded(found.numbers, tiny, found.grid),  # scales that float16 has not
        Rounded(found.numbers, found.scales, Integers(4, symmetric=False)),
        Rounded(found.numbers, found.scales, found.grid, low_rank=(torch.ones(40, 1),) * 2),
        Rounded(eight.numbers, eight.scales, eight.grid),  # inputs that are not to be rounded
        Rounded(eight.numbers, eight.scales, eight.grid, "int8", input_scale=static),
        Rounded(found.numbers, found.scales, Floats("e2m1")),
    ):
        assert KeptBlocks.of(other, rounds_inputs=True) is None
    tiny_numbers = Rounded(found.numbers, tiny, found.grid)
    assert isinstance(kept(tiny_numbers, torch.float32, rounds_inputs=True), Kept)
    assert isinstance(kept(found, torch.float32), Kept)  # inputs are not to be rounded


@pytest.mark.parametrize("recipe", [W8A8, W4], ids=str)
def test_a_folder_in_bfloat16_is_loaded_so(recipe, tmp_path) -> None:
    llama().bfloat16().save_pretrained(tmp_path / "model")
    recipes, out = {"modifiers": [recipe]}, tmp_path / "out"
    compress(tmp_path / "model", recipes, rows(), out, format="drivetrain")
    model = load_packed(out, rounds_inputs=True)
    layers = [m for m in model.modules() if isinstance(m, StoredLinear)]
    assert len(layers) == 3 * 7
    assert all(isinstance(layer.weight.format, KeptBlocks) for layer in layers)
    wanted = llama().bfloat16()
    compress_module(wanted, recipes, rows())
    with torch.no_grad():
        ours, theirs = (m(input_ids=rows()[0]).logits.float() for m in (model, wanted))
    spread = float((theirs.amax(-1) - theirs.amin(-1)).max())
    assert float((ours - theirs).abs().max()) < 0.05 * spread


@pytest.mark.parametrize(
    ("outputs", "biased", "one"),
    [((64, 32, 40), False, True), ((40, 32), False, False), ((64, 32), True, False)],
)
def test_layers_of_one_input_are_one_product_where_panels_allow_it(
    outputs: tuple[int, ...], biased: bool, one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = []
    for rows_of in outputs:
        found = chosen(4, 16, 64, rows_of)
        form = kept(found, torch.bfloat16, rounds_inputs=True)
        weight = StoredWeight.of(form, form.packed(found), found.numbers.shape, torch.bfloat16)
        bias = torch.nn.Parameter(torch.randn(rows_of)) if biased else None
        layers.append(StoredLinear.over(weight, bias).eval())
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    wanted = torch.cat([layer(x) for layer in layers], dim=1)
    product = StoredLinear.joined(layers)
    assert torch.equal(product(x), wanted)
    for layer in layers:
        layer.weight.rounds_inputs = False
    exact = torch.cat([layer(x) for layer in layers], dim=1)
    assert torch.equal(product(x), exact)
    assert not torch.equal(exact, wanted)
    for layer in layers:
        layer.weight.rounds_inputs = True
    monkeypatch.setattr(StoredLinear, "forward", lambda self, x: pytest.fail("called by itself"))
    if one:
        assert torch.equal(product(x), wanted)
    else:
        with pytest.raises(pytest.fail.Exception, match="by itself"):
            product(x)


@pytest.mark.parametrize(("bits", "group", "inputs"), [(8, 64, 64), (4, 16, 64)])
def test_without_a_kernel_only_what_the_model_asks_for_is_rounded(
    bits: int, group: int, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_blocks, "_has_kernel", lambda device: False)
    found = chosen(bits, group, inputs)
    form = kept(found, torch.bfloat16, rounds_inputs=True)
    assert isinstance(form, KeptBlocks)
    weight = StoredWeight.of(form, form.packed(found), found.numbers.shape, torch.float32).eval()
    x = torch.randn(3, inputs, generator=torch.Generator().manual_seed(0))
    rounded = rounded_tokens(x, "int8") if bits == 8 else x
    assert torch.equal(weight.product(x), rounded @ found.weight(torch.float32).T)
    assert form.joined([form], [weight.parts()], [40]) is None

"""Products and attention in bfloat16, by the matrix unit where there is one, and without it."""

from __future__ import annotations

import pytest
import torch
from drivetrain_cpu.instruction_sets import VARIABLE, runnable
from drivetrain_cpu.kernels import register
from drivetrain_kernels import Provider, pack_panels

PATHS = [path.name for path in runnable() if path.name in ("amx", "avx512bf16")]
ROWS = (1, 2, 15, 16, 17, 31, 32, 33, 64, 95, 130)


def function_of(name, path, monkeypatch):
    monkeypatch.setenv(VARIABLE, path)
    provider = Provider("drivetrain-cpu", "0", "cpu")
    register(provider)
    return provider.offers[name].bind(provider.offers[name].library.load())


def drawn(generator, *shape):
    return torch.randn(*shape, generator=generator).bfloat16()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 96), (70, 33), (2, 31), (575, 64), (30, 1)])
def test_products_are_those_of_float64_whatever_the_shape(path, inputs, outputs, monkeypatch):
    multiply = function_of("packed_linear", path, monkeypatch)
    generator = torch.Generator().manual_seed(inputs)
    weight, bias = drawn(generator, outputs, inputs), drawn(generator, outputs)
    panels, x = pack_panels(weight), drawn(generator, max(ROWS), inputs)
    exact = x.double() @ weight.double().T + bias.double()
    alone = torch.cat([multiply(row[None].contiguous(), panels, bias, outputs) for row in x])
    for rows in ROWS:
        found = multiply(x[:rows].contiguous(), panels, bias, outputs)
        # Half a unit in the last place of bfloat16, and what sums in float32 lose.
        torch.testing.assert_close(found.double(), exact[:rows], rtol=2**-8, atol=1e-5 * inputs)
        assert torch.equal(found, alone[:rows]), f"{rows} rows"


def attended(q, keys, values, first, window):
    """Attention of the queries from position ``first`` on, in float64; every head for itself."""
    group = q.shape[1] // keys.shape[0]
    wide = [each.double().repeat_interleave(group, dim=0) for each in (keys, values)]
    scores = torch.einsum("qhd,hkd->hqk", q.double(), wide[0]) * 0.2
    position, key = torch.arange(first, first + len(q))[:, None], torch.arange(keys.shape[1])
    hidden = (key > position) | (key <= position - (window or 1 << 30))
    return torch.einsum("hqk,hkd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(2), wide[1])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize(
    ("heads", "size", "dim"), [((6, 2), 32, 64), ((3, 3), 16, 32), ((8, 1), 48, 96)]
)
def test_attention_is_that_of_float64_and_a_query_has_its_bits_in_every_batch(
    path, window, heads, size, dim, monkeypatch
):
    attend = function_of("paged_attention", path, monkeypatch)
    generator, length = torch.Generator().manual_seed(dim), 301
    (many, few), blocks = heads, -(-length // size)
    keys, values = (drawn(generator, blocks, few, size, dim) for _ in range(2))
    table = torch.randperm(blocks, generator=generator).int()[None]
    q = drawn(generator, length, many, dim)

    def part(first, end):
        bounds = torch.tensor([0, end - first], dtype=torch.int32)
        lengths = torch.tensor([end], dtype=torch.int32)
        rest = (table, bounds, lengths, 0.2, window, 0.0, None, None, None)
        return attend(q[first:end], keys, values, *rest)

    flat = [
        each[table[0].long()].transpose(0, 1).flatten(1, 2)[:, :length] for each in (keys, values)
    ]
    whole = part(0, length)
    exact = attended(q, *flat, 0, window)
    torch.testing.assert_close(whole.double(), exact, rtol=2**-6, atol=2**-7)
    for first, end in ((0, 1), (0, 130), (130, 301), (200, 201), (300, 301)):
        assert torch.equal(part(first, end), whole[first:end]), f"{first} to {end}"


@pytest.mark.skipif("amx" not in PATHS, reason="no matrix unit here")
def test_other_libraries_that_use_the_unit_are_not_disturbed(monkeypatch):
    multiply = function_of("packed_linear", "amx", monkeypatch)
    generator = torch.Generator().manual_seed(0)
    x, weight = drawn(generator, 130, 96), drawn(generator, 96, 96)
    panels, before = pack_panels(weight), x @ weight.T
    ours = multiply(x, panels, None, 96)
    assert torch.equal(x @ weight.T, before)
    assert torch.equal(multiply(x, panels, None, 96), ours)

"""Layers in chunks that scripts call by DeepSpeed's names compute what plain torch does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from drivetrain_sequence import Cut
from drivetrain_sequence.fpdt_scripts import FPDT_FFN, FPDT_Attention, FPDT_LogitsLoss
from torch import nn

from drivetrain.errors import ConfigError, TrainingError
from drivetrain.testing import run_distributed

LENGTH, ROWS, HIDDEN, WIDTH, CHUNK = 24, 2, 12, 4, 8
ROTATED = 2


def randn(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def config_of(heads: int, key_heads: int, **changes: Any) -> SimpleNamespace:
    given = {"num_attention_heads": heads, "num_key_value_heads": key_heads}
    given |= {"hidden_size": HIDDEN, "kv_channels": WIDTH, "attention_dropout": 0.0, **changes}
    return SimpleNamespace(**given)


def weights_of(heads: int, key_heads: int) -> list[torch.Tensor]:
    rows = (heads + 2 * key_heads) * WIDTH
    return [
        randn(rows, HIDDEN, seed=1),
        randn(rows, seed=2),
        randn(HIDDEN, heads * WIDTH, seed=3),
        randn(HIDDEN, seed=4),
    ]


def angles() -> tuple[torch.Tensor, torch.Tensor]:
    found = torch.arange(LENGTH, dtype=torch.float64)[:, None, None, None] * torch.ones(ROTATED)
    return found.cos(), found.sin()


def plain(heads: int, key_heads: int, rotary: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Result of the whole sequence, and gradients of the sum of its squares, in one piece."""
    x, weights = randn(LENGTH, ROWS, HIDDEN, seed=0), weights_of(heads, key_heads)
    first, bias, second, added = weights
    projected = x @ first.t() + bias
    ends = (heads * WIDTH, (heads + key_heads) * WIDTH)
    each = [
        y.unflatten(2, (-1, WIDTH)).permute(1, 2, 0, 3) for y in projected.tensor_split(ends, 2)
    ]
    if rotary:
        cos, sin = (y[:, 0, 0] for y in angles())
        for i in range(2):
            a, b, rest = each[i][..., :1], each[i][..., 1:2], each[i][..., 2:]
            c, s = cos[:, :1], sin[:, :1]
            each[i] = torch.cat([a * c - b * s, b * c + a * s, rest], -1)
    q, k, v = each
    scores = q @ k.repeat_interleave(heads // key_heads, 1).mT / WIDTH**0.5
    hidden = torch.ones(LENGTH, LENGTH).triu(1).bool()
    y = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    y = y @ v.repeat_interleave(heads // key_heads, 1)
    output = y.permute(2, 0, 1, 3).flatten(2) @ second.t() + added
    output.square().sum().backward()
    return output.detach(), [w.grad for w in (x, *weights) if w.grad is not None]


CASES = [(4, 4, False), (6, 2, True), (2, 1, True)]


def in_chunks(cases: list[tuple[int, int, bool]], size: int, chunk: int) -> list[Any]:
    """The like of this rank's tokens; gradients of weights are sums over ranks."""
    if size > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if size > 1 else 0
    places = Cut(size, chunk=chunk).of_rank(LENGTH, rank)
    found = []
    for number, (heads, key_heads, rotary) in enumerate(cases):
        weights = weights_of(heads, key_heads)
        own = randn(LENGTH, ROWS, HIDDEN, seed=0).detach()[places].requires_grad_()
        given = {"chunk_size": chunk, "return_bias": bool(number % 2)}
        layer = FPDT_Attention(config_of(heads, key_heads), *weights, None, **given)
        output, bias = layer(own, None, None, angles() if rotary else None)
        assert (bias is None) == (number % 2 == 0)
        output = output if bias is None else output + bias
        output.square().sum().backward()
        gradients = [w.grad for w in weights]
        for gradient in gradients if size > 1 else []:
            dist.all_reduce(gradient)
        found.append((places, output.detach(), own.grad, gradients))
    return found


def check(found: list[Any], cases: list[tuple[int, int, bool]]) -> None:
    for (places, output, gradient, gradients), case in zip(found, cases, strict=True):
        expected, (for_x, *others) = plain(*case)
        torch.testing.assert_close(output, expected[places])
        torch.testing.assert_close(gradient, for_x[places])
        torch.testing.assert_close(gradients, others)


@pytest.mark.parametrize("chunk", [CHUNK, 10, LENGTH, 100])
def test_attention_in_chunks_is_dense_on_one_rank(chunk: int) -> None:
    check(in_chunks(CASES, 1, chunk), CASES)


def losses(size: int) -> list[torch.Tensor]:
    """Losses of all tokens, and gradients of their weighted sum: this rank's, and the sum."""
    rank = dist.get_rank() if size > 1 else 0
    hidden, head, labels, weights = loss_inputs()
    own = hidden.detach().chunk(size)[rank].requires_grad_()
    given = (labels.chunk(size, 1)[rank], head, rank, size, None, 3)
    found = FPDT_LogitsLoss.apply(own, *given)
    (found * weights).sum().backward()
    assert head.grad is not None
    if size > 1:
        dist.all_reduce(head.grad)
    return [found.detach(), own.grad, head.grad]


def loss_inputs() -> tuple[torch.Tensor, ...]:
    labels = torch.arange(LENGTH * ROWS).view(ROWS, LENGTH) % 9
    labels[1, 4:] = -100
    weights = randn(LENGTH, ROWS, seed=6).detach()
    return randn(LENGTH, ROWS, HIDDEN, seed=0), randn(9, HIDDEN, seed=5), labels, weights


def check_losses(found: list[torch.Tensor], size: int, rank: int) -> None:
    hidden, head, labels, weights = loss_inputs()
    logits = (hidden @ head.t()).flatten(0, 1)
    each = nn.functional.cross_entropy(logits, labels.t().flatten(), reduction="none")
    each = each.view(LENGTH, ROWS)
    (each * weights).sum().backward()
    assert hidden.grad is not None
    expected = [each.detach(), hidden.grad.chunk(size)[rank], head.grad]
    torch.testing.assert_close(found, expected)


def over_ranks() -> Any:
    found = in_chunks(CASES, 2, CHUNK), losses(2)
    with pytest.raises(ConfigError, match="chunk_size of 7 tokens is not as many for each of 2"):
        FPDT_Attention(config_of(4, 4), *weights_of(4, 4), None, chunk_size=7)
    dist.destroy_process_group()
    return found


def test_layers_over_two_ranks_are_those_of_one() -> None:
    for rank, (attended, lost) in enumerate(run_distributed(over_ranks, 2)):
        check(attended, CASES)
        check_losses(lost, 2, rank)


def test_losses_in_chunks_are_those_of_the_whole() -> None:
    check_losses(losses(1), 1, 0)


@pytest.mark.parametrize("add_bias", [True, False])
def test_mlps_in_chunks_are_those_of_the_whole(add_bias: bool) -> None:
    given = [randn(7, ROWS, HIDDEN, seed=0), randn(16, HIDDEN, seed=1), randn(16, seed=2)]
    given += [randn(HIDDEN, 16, seed=3), randn(HIDDEN, seed=4)]
    output, bias = FPDT_FFN.apply(*given, add_bias, 3)
    assert (bias is None) == add_bias
    output = output if bias is None else output + bias
    x, w1, b1, w2, b2 = given
    inner = x @ w1.t() + b1
    bent = inner / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
    expected = bent @ w2.t() + b2
    torch.testing.assert_close(output, expected)
    found, others = (torch.autograd.grad(y.square().sum(), given) for y in (output, expected))
    torch.testing.assert_close(found, others)


def test_attention_keeps_no_more_than_it_says() -> None:
    """Not the scores, nor projections: inputs, weights, keys, values, results and sums."""
    layer = FPDT_Attention(config_of(4, 2), *weights_of(4, 2), None, chunk_size=CHUNK)
    x, kept = randn(LENGTH, ROWS, HIDDEN, seed=0), []

    def keep(y: torch.Tensor) -> torch.Tensor:
        if not isinstance(y, nn.Parameter) and y.shape[:1] != (32,):
            kept.append(y.numel())
        return y

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        layer(x, None, None, None)
    each = LENGTH * ROWS
    inputs, second = each * (HIDDEN + 4 * WIDTH), HIDDEN * 4 * WIDTH
    assert sum(kept) == inputs + second + each * (2 * 2 * WIDTH + 4 * WIDTH + 4)


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (config_of(4, 4, attention_dropout=0.1), {}, "attention_dropout 0.1: weights of attention"),
        (config_of(4, 3), {}, "4 heads of queries do not share 3 of keys evenly"),
        (config_of(4, 4), {"scatter_idx": 1}, "gather_idx 0 and scatter_idx 1"),
    ],
    ids=["dropout", "heads", "dimensions"],
)
def test_layers_that_chunks_do_not_have_are_refused(
    config: Any, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        FPDT_Attention(config, *weights_of(4, 4), None, **changes)


def test_masks_and_rotations_that_do_not_fit_are_refused() -> None:
    layer = FPDT_Attention(config_of(4, 4), *weights_of(4, 4), None, chunk_size=CHUNK)
    x = randn(LENGTH, ROWS, HIDDEN, seed=0)
    short = tuple(y[:9] for y in angles())
    for given, said in (
        ((torch.ones(1), None, None), "takes no mask"),
        ((None, object(), None), "takes no cache"),
        ((None, None, short), "rotary_pos_emb is of 9 tokens, and sequences have 24"),
    ):
        with pytest.raises(TrainingError, match=said):
            layer(x, *given)
    with pytest.raises(ConfigError, match="rank 1 of 2, and the group has this as rank 0 of 1"):
        FPDT_LogitsLoss.apply(x, x, x, 1, 2, None, 1)

"""What scripts call: attention over a process group, losses of all ranks, functions in tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from drivetrain_sequence.fwd_loss_bwd import UlyssesSPFwdLossBwdWithLogits
from drivetrain_sequence.scripts import (
    DistributedAttention,
    SequenceTiledCompute,
    TiledFusedLogitsLoss,
    TiledLoss,
    TiledMLP,
    sequence_tiled_compute,
    vocab_sequence_parallel_cross_entropy,
)
from drivetrain_sequence.ulysses_scripts import UlyssesSPDataLoaderAdapter
from sequence_models import batch, engine_of, tiny
from torch import nn

from drivetrain.errors import ConfigError, TrainingError
from drivetrain.testing import run_distributed

LENGTH, ROWS, HEADS, WIDTH = 8, 2, 6, 4


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch_first: bool) -> torch.Tensor:
    order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
    q, k, v = (x.permute(order) for x in (q, k, v))
    y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y.permute((0, 2, 1, 3) if batch_first else (2, 0, 1, 3))


def in_parts(batch_first: bool) -> list[torch.Tensor]:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    first = (ROWS, LENGTH) if batch_first else (LENGTH, ROWS)
    whole = [randn(*first, heads, WIDTH, seed=i) for i, heads in enumerate((HEADS, 3, 3))]
    own = [x.detach().chunk(size, int(batch_first))[rank].requires_grad_() for x in whole]
    layer = DistributedAttention(lambda q, k, v: dense(q, k, v, batch_first), dist.group.WORLD)
    found = layer(*own, batch_dim_idx=0 if batch_first else 1)
    expected = dense(*whole, batch_first=batch_first)
    expected.square().sum().backward()
    found.square().sum().backward()
    part = lambda x: x.chunk(size, int(batch_first))[rank]  # noqa: E731
    torch.testing.assert_close(found, part(expected))
    for mine, theirs in zip(own, whole, strict=True):
        torch.testing.assert_close(mine.grad, part(theirs.grad))
    logits, target = randn(LENGTH, ROWS, 9), torch.arange(LENGTH * ROWS).view(LENGTH, ROWS) % 9
    reference = nn.functional.cross_entropy(
        logits.flatten(0, 1), target.flatten(), reduction="none"
    ).view(LENGTH, ROWS)
    mine_ = logits.detach().chunk(size)[rank].requires_grad_()
    losses = vocab_sequence_parallel_cross_entropy(mine_, target.chunk(size)[rank], None)
    torch.testing.assert_close(losses, reference)
    (gradient,) = torch.autograd.grad(losses.sum(), mine_)
    (other,) = torch.autograd.grad(reference.sum(), logits)
    torch.testing.assert_close(gradient, other.chunk(size)[rank])
    dist.destroy_process_group()
    return []


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_over_a_group_and_losses_of_all_ranks_are_dense(batch_first: bool) -> None:
    run_distributed(in_parts, 2, batch_first)


def test_losses_in_tiles_are_the_mean_over_labels_that_count() -> None:
    logits, labels = randn(2, 7, 9), torch.arange(14).view(2, 7) % 9
    labels[:, :3], labels[1, 4:] = -100, -100
    seen = list[int]()

    def loss(
        logits: torch.Tensor, labels: None, vocab_size: int, shift_labels: torch.Tensor
    ) -> torch.Tensor:
        seen.append(shift_labels.shape[1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), shift_labels.view(-1))

    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    found = TiledLoss.apply(loss, logits, 9, labels, 3)
    torch.testing.assert_close(found, expected)
    gradients, others = (torch.autograd.grad(y, logits) for y in (found, expected))
    torch.testing.assert_close(gradients, others)
    assert sorted(seen) == [1, 1, 3, 3]  # a tile without labels is left out, the others come twice
    none = TiledLoss.apply(loss, logits, 9, torch.full_like(labels, -100), 3)
    (gradient,) = torch.autograd.grad(none, logits)
    assert (none, gradient.abs().max()) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_without_labels_are_of_the_same_dtype_and_zero(dtype: torch.dtype) -> None:
    logits = torch.full((1, 4, 9), 300.0, dtype=dtype)
    logits[..., 5] = -torch.inf  # a word that a model masks; and the sum is none of float16
    logits.requires_grad_()
    labels = torch.tensor([[1, 2, 3, -100]])
    given = (labels, torch.full_like(labels, -100))
    some, none = (TiledLoss.apply(plain_loss, logits, 9, shifted, 2) for shifted in given)
    assert some.dtype == none.dtype == torch.float32
    (gradient,) = torch.autograd.grad(none, logits)
    assert (none, gradient.abs().max()) == (0, 0)


def plain_loss(
    logits: torch.Tensor, labels: None, vocab_size: int, shift_labels: torch.Tensor
) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), shift_labels.flatten())


WITHOUT = [({}, 7, 1e-6), ({"bf16": {"enabled": True}}, 12, 0.02)]
"""Config, labels at the beginning that do not count, of 24, and how exact losses are."""


def unlike(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, their places, and labels of the token after each, the first of which do not count."""
    tokens = batch(0, "plain")["input_ids"]
    labels = nn.functional.pad(tokens, (0, 1), value=-100)[:, 1:].clone()
    labels[:, :count] = -100
    return tokens, torch.arange(tokens.shape[1]).expand_as(tokens), labels


def with_an_engine() -> list[Any]:
    found = []
    for config, count, _ in WITHOUT:
        model = tiny("llama")
        whole = {"sequence_parallel": {"inputs": "whole"}}
        engine = engine_of(model, sequence_parallel_size=2, **whole, **config)
        names = ("input_ids", "position_ids", "shift_labels")
        own = (x.chunk(2, 1)[engine.job.rank] for x in unlike(count))
        step = UlyssesSPFwdLossBwdWithLogits(engine, model, engine.device, 2)
        loss = step.sp_fwd_loss_bwd(dict(zip(names, own, strict=True)))
        engine.step()
        found.append((loss.item(), [p.detach().clone() for p in model.parameters()]))
        engine.destroy()
    return found


def test_a_step_with_an_engine_is_right_where_ranks_have_different_labels() -> None:
    for found in run_distributed(with_an_engine, 2):
        for (loss, weights), (_, count, exact) in zip(found, WITHOUT, strict=True):
            model = tiny("llama")
            tokens, places, labels = unlike(count)
            logits = model(input_ids=tokens, position_ids=places).logits
            expected = plain_loss(logits, None, 0, labels)
            expected.backward()
            torch.optim.SGD(model.parameters(), lr=0.05).step()
            assert loss == pytest.approx(expected.item(), rel=exact)
            for ours, theirs in zip(weights, model.parameters(), strict=True):
                torch.testing.assert_close(
                    ours.double(), theirs.detach(), rtol=exact, atol=exact / 10
                )


def test_functions_in_tiles_have_values_and_gradients_of_the_whole() -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)).double()
    head = nn.Linear(4, 9).double()
    x, y = randn(2, 7, 4), torch.arange(14).view(2, 7) % 9
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = False

    def loss(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(module(x).flatten(0, 1), y.flatten())

    def gradients(value: torch.Tensor) -> list[torch.Tensor]:
        inputs = [x, *mlp.parameters(), *head.parameters()]
        return [value.detach(), *torch.autograd.grad(value, inputs)]

    plain = gradients(loss(head, mlp(x)[mask][None], y[mask][None]))
    tiled = TiledMLP.apply(lambda m, part: m(part), mlp, x, 3)
    found = gradients(TiledFusedLogitsLoss.apply(loss, head, tiled, y, mask, 4))
    torch.testing.assert_close(found, plain)
    called: dict[str, Any] = {"kwargs_to_pass": {"m": mlp}, "grad_requiring_tensor_key": "part"}
    again = sequence_tiled_compute(lambda part, m: m(part), 7, 3, {"part": x}, **called)
    torch.testing.assert_close(again, mlp(x))
    by_position = (["part"], ["m"], "part", None, 1, None, x, mlp)
    torch.testing.assert_close(
        SequenceTiledCompute.apply(lambda part, m: m(part), 7, 3, *by_position), mlp(x)
    )
    with pytest.raises(ConfigError, match="expected 6 tokens"):
        sequence_tiled_compute(lambda part, m: m(part), 6, 3, {"part": x}, **called)


def test_batches_that_an_adapter_cannot_share_out_are_refused_by_name() -> None:
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH)
    whole = {"input_ids": tokens, "position_ids": tokens, "labels": tokens}
    wrong = [
        ({"input_ids": tokens}, "a batch without position_ids, labels cannot be shared out"),
        ({k: x[:, 1:] for k, x in whole.items()}, "7 tokens cannot be cut into 2 equal parts"),
        ({**whole, "labels": tokens[:, :3]}, r"labels of shape \(2, 3\) is not one for each of 8"),
    ]
    for rows, said in wrong:
        adapter = UlyssesSPDataLoaderAdapter([rows], 0, None, 2, "cpu")
        with pytest.raises(TrainingError, match=said):
            next(iter(adapter))
    (part,) = UlyssesSPDataLoaderAdapter([{**whole, "name": "a"}], 0, None, 1)
    assert part["name"] == "a"
    assert part["shift_labels"].tolist() == [[*row[1:], -100] for row in tokens.tolist()]

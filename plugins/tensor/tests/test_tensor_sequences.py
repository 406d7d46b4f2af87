"""Sequences that ranks share out between layers train as they do whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensor_models import MODELS, ROWS, TOKENS, build, reference
from test_tensor_losses import ODD, Head
from test_tensor_training import STEPS, full, make, train
from torch import nn

from drivetrain.contracts import Purpose
from drivetrain.testing import run_distributed

SHARED = {"sequence_parallel": True}


def trained(names: list[str], section: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name in names:
        engine = make(build(name), 2, **SHARED, **section)
        engine.job.byte_log.reset()
        losses = train(engine)
        total = engine.job.byte_log.total
        moved = {
            op: total(Purpose.ACTIVATION, "tp", op).payload_bytes
            for op in ("all_reduce", "reduce_scatter", "all_gather")
        }
        found[name] = losses, full(engine), moved
        engine.destroy()
    return found


@pytest.mark.parametrize("section", [{}, {"vocabulary": False}])
def test_a_model_trains_as_the_whole_one(section: dict[str, Any]) -> None:
    for results in run_distributed(trained, 2, list(MODELS), section):
        for name, (losses, parameters, moved) in results.items():
            model = build(name)
            assert losses == pytest.approx(reference(model, STEPS), rel=1e-9), name
            for path, expected in model.named_parameters():
                found = parameters[path]
                assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10), (name, path)
            assert moved["reduce_scatter"] > 0, name


def test_bytes_are_those_of_the_sums() -> None:
    """A reduce-scatter and an all-gather at each end of a region, where there was a sum."""
    name, width, layers = "llama", 16, 2
    for results in run_distributed(trained, 2, [name], {"vocabulary": False}):
        moved = results[name][2]
        tokens = ROWS * TOKENS * width * 8
        # each layer has two regions; each has both in forward and, swapped, in backward
        formula = STEPS * layers * 2 * 2 * tokens
        # the first norm reads whole embeddings, and the head, which is not cut, gathers again
        assert formula - STEPS * tokens <= moved["reduce_scatter"] <= formula
        assert moved["all_gather"] <= formula + STEPS * 2 * tokens
        assert moved["all_reduce"] <= STEPS * tokens


# -- odd lengths, more ranks than tokens have parts ------------------------------------------------


def odd(tokens: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    engine, losses = make(Head().double(), 4, **SHARED), []
    for step in range(STEPS):
        x, labels = few(step, tokens)
        loss = nn.functional.cross_entropy(engine(x).flatten(0, 1), labels.flatten())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    found = losses, full(engine)
    engine.destroy()
    return found


def few(step: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(ODD, (ROWS, tokens), generator=generator)
    return x, x.roll(-1, 1)


@pytest.mark.parametrize("tokens", [5, 3])  # parts of 2, 2, 1 and 0; fewer tokens than ranks
def test_lengths_that_do_not_divide_train_alike(tokens: int) -> None:
    model, losses = Head().double(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, labels = few(step, tokens)
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for found, parameters in run_distributed(odd, 4, tokens):
        assert found == pytest.approx(losses, rel=1e-10)
        for path, expected in model.named_parameters():
            assert torch.allclose(parameters[path], expected, rtol=1e-9, atol=1e-12), path


# -- dropout, and what is kept ---------------------------------------------------------------------


def dropped(shared: bool) -> tuple[list[float], list[tuple[int, ...]]]:
    """Losses, and shapes of what the last norm reads on this rank."""
    engine, seen = make(build("gpt2", dropout=0.2), 2, sequence_parallel=shared), []

    def look(module: nn.Module, args: Any) -> None:
        seen.append(tuple(getattr(args[0], "part", args[0]).shape))

    engine.module.transformer.ln_f.register_forward_pre_hook(look)
    losses = train(engine)
    engine.destroy()
    return losses, seen


def test_dropout_is_that_of_whole_sequences() -> None:
    """Each rank drops of its tokens what is dropped of them when ranks have all."""
    for (whole, wide), (shared, narrow) in zip(
        run_distributed(dropped, 2, False), run_distributed(dropped, 2, True), strict=True
    ):
        assert shared == pytest.approx(whole, rel=1e-9)
        assert {shape[1] for shape in wide} == {TOKENS}
        assert {shape[1] for shape in narrow} == {TOKENS // 2}

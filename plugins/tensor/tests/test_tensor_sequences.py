"""Sequences that ranks share out between layers train as they do whole."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tensor_models import MODELS, ROWS, TOKENS, build, reference
from test_tensor_losses import ODD, Head
from test_tensor_training import STEPS, full, make, train
from torch import nn

from drivetrain.communication.byte_log import ByteLog
from drivetrain.contracts import Collective, Handle, Purpose
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


@pytest.mark.parametrize("section", [{}, {"vocabulary": False}, {"tp_overlap_comm": True}])
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


def odd(tokens: int, overlap: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    engine, losses = make(Head().double(), 4, **SHARED, tp_overlap_comm=overlap), []
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


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("tokens", [5, 3])  # parts of 2, 2, 1 and 0; fewer tokens than ranks
def test_lengths_that_do_not_divide_train_alike(tokens: int, overlap: bool) -> None:
    model, losses = Head().double(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, labels = few(step, tokens)
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for found, parameters in run_distributed(odd, 4, tokens, overlap):
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


# -- what is under way while what computes ---------------------------------------------------------


def order_of_work() -> tuple[list[str], list[str]]:
    """Products of the layer at the beginning of a region, and collectives that end."""
    engine, log = make(Head().double(), 2, **SHARED, tp_overlap_comm=True), list[str]()
    engine.backward(engine(few(0, 8)[0]).square().mean())
    run, linear = ByteLog.run, nn.functional.linear

    def noted(self: ByteLog, collective: Collective) -> Handle:
        handle = run(self, collective)
        if not collective.asynchronous:
            return handle
        log.append(f"begin {collective.kind}")
        return Noted(handle, partial(log.append, f"end {collective.kind}"))

    def multiplied(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if rest[0] is engine.module.up.weight:
            log.append(f"multiply {x.shape[1]}")
        return linear(x, *rest)

    ByteLog.run, nn.functional.linear = noted, multiplied  # type: ignore[method-assign, assignment]
    try:
        loss = engine(few(0, 8)[0]).square().mean()
        forward, log[:] = list(log), []
        weight = engine.module.up.weight
        (inner,) = [node for node in graph(loss) if reads(node, weight)]
        inner.register_prehook(lambda *_: log.append("product"))
        inner.register_hook(lambda *_: log.append("gradients"))
        engine.backward(loss)
    finally:
        ByteLog.run, nn.functional.linear = run, linear  # type: ignore[method-assign, assignment]
    engine.destroy()
    at = log.index("product")
    return forward[:7], log[at : at + 4]


class Noted:
    def __init__(self, handle: Handle, note: Any) -> None:
        self._handle, self._note = handle, note

    def wait(self) -> None:
        self._handle.wait()
        self._note()


def graph(loss: torch.Tensor) -> list[Any]:
    """Nodes behind a loss."""
    found, todo = [], [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.append(node)
            todo += [following for following, _ in node.next_functions]
    return found


def reads(node: Any, weight: nn.Parameter) -> bool:
    return any(getattr(n, "variable", None) is weight for n, _ in node.next_functions)


def test_own_tokens_are_multiplied_while_the_others_come() -> None:
    """Of eight tokens this rank has four; the others come in two chunks of two."""
    gather, scatter = ("begin all_gather", "end all_gather"), "begin reduce_scatter"
    for forward, backward in run_distributed(order_of_work, 2):
        chunks = [gather[1], "multiply 2"] * 2
        assert forward == [gather[0], gather[0], "multiply 4", *chunks]
        assert backward == ["product", scatter, "gradients", "end reduce_scatter"]

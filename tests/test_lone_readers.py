"""Scripts that look at logits on one tensor-parallel rank alone, whatever carries collectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.errors import CommunicationError
from drivetrain.testing import run_distributed

WIDTH, VOCABULARY = 8, 11
DTYPES = {"float32": torch.float32, "float64": torch.float64}
"""Shared memory adds up the first; sums of the second go through gloo."""


class Model(nn.Module):
    """An embedding, an MLP and logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        return self.head(self.norm(x + self.down(F.gelu(self.up(x)))))


def engine_of(dtype: str) -> Any:
    return drivetrain.initialize(
        model=Model().to(DTYPES[dtype]),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.5,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "tensor_parallel": {"autotp_size": 2},
        },
    )[0]


def tokens() -> torch.Tensor:
    return torch.arange(12).view(2, 6) % VOCABULARY


def step(engine: Any, logits: torch.Tensor) -> float:
    loss = F.cross_entropy(logits.view(-1, VOCABULARY), tokens().view(-1))
    engine.backward(loss)
    engine.step()
    return loss.item()


def printed(dtype: str) -> tuple[list[float], str]:
    """Losses, and what rank 0 prints."""
    engine, losses, text = engine_of(dtype), [], ""
    for _ in range(2):
        logits = engine(tokens())
        if engine.job.rank == 0:
            text = f"{logits} {logits!r}"
        losses.append(step(engine, logits))
    engine.destroy()
    return losses, text


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rank_prints_logits_of_which_it_has_a_part(dtype: str) -> None:
    model = Model().to(DTYPES[dtype])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens()).view(-1, VOCABULARY), tokens().view(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        expected.append(loss.item())
    (first, text), (second, _) = run_distributed(printed, 2, dtype)
    assert first == pytest.approx(expected, rel=1e-5) == second
    assert text.count("size=(2, 6, 11)") == 2
    assert "this rank has [0, 6) along dimension 2" in text
    assert "whole_logits" in text


def read_alone(dtype: str, when: str) -> str:
    """What rank 0 is told that reads values, before or behind the others' backward."""
    engine = engine_of(dtype)
    logits = engine(tokens())
    try:
        if when == "behind backward":
            engine.backward(F.cross_entropy(logits.view(-1, VOCABULARY), tokens().view(-1)))
        if Ranks.current().rank == 0:
            logits.detach().tolist()
        if when == "behind backward":
            engine.step()
        elif when == "before backward":
            step(engine, logits)
    except CommunicationError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("when", ["before backward", "behind backward", "at the end"])
def test_one_rank_alone_that_reads_values_is_told_what_to_do(dtype: str, when: str) -> None:
    reader, other = run_distributed(read_alone, 2, dtype, when)
    assert "this rank reads all of logits (tensor_parallel.vocabulary_loss)" in reader
    assert "call drivetrain_tensor.whole_logits on every rank" in reader
    assert bool(other) == (when != "at the end")

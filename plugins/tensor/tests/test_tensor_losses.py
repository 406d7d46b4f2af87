"""Losses of vocabularies that are cut over ranks, from parts of the logits, as of one process."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drivetrain_tensor import whole_logits
from tensor_models import MODELS, ROWS, TOKENS, batch, build
from test_tensor_training import full, make
from torch import nn
from torch.nn import functional as F

from drivetrain.contracts import Purpose
from drivetrain.errors import TrainingError
from drivetrain.testing import run_distributed

WIDTH, ODD = 8, 11
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Head(nn.Module):
    """An embedding, an MLP, and logits of a vocabulary that two ranks cannot halve."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(ODD, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, ODD)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        return self.head(self.norm(x + self.down(F.gelu(self.up(x)))))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(ODD, (ROWS, TOKENS), generator=generator)
    labels = tokens.roll(-1, 1)
    labels[0, 1] = labels[1, 0] = -100
    return tokens, labels


def flat(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.view(-1, ODD), labels.view(-1))


def shifted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    part = logits[..., :-1, :].contiguous()
    return nn.CrossEntropyLoss()(part.view(-1, part.size(-1)), labels[..., 1:].reshape(-1))


def classes_second(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (losses * torch.arange(losses.numel()).view_as(losses)).sum()


def other_ignored(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.clamp(min=0).flatten(), ignore_index=0)


def only_labelled(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    mask = labels >= 0
    return F.cross_entropy(logits[mask], labels[mask], reduction="sum")


def capped(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return flat(torch.tanh(logits / 3.0) * 3.0, labels)


def of_one_token(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, -1], labels[:, -1])


def halved_in_place(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = logits * 1.0
    logits.div_(2.0)
    return flat(logits, labels)


def smoothed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.view(-1, ODD), labels.view(-1), label_smoothing=0.1)


def with_penalty(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Some of it needs parts, and some all logits."""
    return flat(logits, labels) + 0.1 * logits.logsumexp(-1).square().mean()


def masked_in_place(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = logits * 1.0
    view = logits.view(-1, ODD)
    view[:, 7] = -2.0  # a token of the second rank; seen through what it is a view of
    view[0].masked_fill_(torch.arange(ODD) < 3, 0.5)
    return flat(logits, labels)


def by_hand(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1))
    return -chosen.squeeze(-1)[labels >= 0].mean()


PART_LOSSES = (flat, shifted, classes_second, other_ignored)
MORE_PART_LOSSES = (only_labelled, capped, of_one_token, halved_in_place)
READ_LOSSES = (smoothed, with_penalty, masked_in_place, by_hand)
LOSSES: dict[str, Loss] = {
    loss.__name__: loss for loss in (*PART_LOSSES, *MORE_PART_LOSSES, *READ_LOSSES)
}
PARTS = [loss.__name__ for loss in (*PART_LOSSES, *MORE_PART_LOSSES)]
READ = [loss.__name__ for loss in READ_LOSSES]
"""Names of losses that need parts, and of those that need all logits."""


def trained(names: list[str], lazy: bool) -> dict[str, Any]:
    """Loss, parameters after a step, and bytes of all-gathers in it, by loss."""
    found = {}
    tokens, labels = data()
    for name in names:
        engine = make(Head().double(), 2, vocabulary_loss=lazy)
        engine.job.byte_log.reset()
        value = LOSSES[name](engine(tokens), labels)
        engine.backward(value)
        engine.step()
        moved = engine.job.byte_log.total(Purpose.ACTIVATION, "tp", "all_gather")
        found[name] = value.item(), full(engine), moved.payload_bytes
        engine.destroy()
    return found


@pytest.mark.parametrize(("names", "lazy"), [(PARTS, True), (READ, True), (READ[:2], False)])
def test_a_loss_of_cut_logits_is_that_of_one_process(names: list[str], lazy: bool) -> None:
    tokens, labels = data()
    for results in run_distributed(trained, 2, names, lazy):
        for name, (value, parameters, gathered) in results.items():
            model = Head().double()
            expected = LOSSES[name](model(tokens), labels)
            expected.backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            assert value == pytest.approx(expected.item(), rel=1e-12), name
            assert (gathered == 0) == (names is PARTS), name
            for path, parameter in model.named_parameters():
                close = torch.allclose(parameters[path], parameter, rtol=1e-10, atol=1e-12)
                assert close, (name, path)


# -- what scripts do with logits -------------------------------------------------------------------


def looked_at() -> dict[str, Any]:
    engine = make(Head().double(), 2)
    logits = engine(data()[0])
    found: dict[str, Any] = {
        "list": logits.detach().tolist(),
        "array": torch.from_numpy(logits.detach().cpu().numpy().copy()),
        "best": logits.argmax(-1),
        "of one": logits[0, 1, 3].item(),
        "copied": torch.load(_saved(logits.detach())),
        "facts": (logits.shape, logits.dtype, logits.requires_grad, "tensor" in repr(logits)),
    }
    engine.destroy()
    return found


def _saved(logits: torch.Tensor) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(logits, file)
    file.seek(0)
    return file


def test_scripts_read_all_logits() -> None:
    logits = Head().double()(data()[0]).detach()
    for found in run_distributed(looked_at, 2):
        for key in ("list", "array", "copied"):
            assert torch.allclose(torch.as_tensor(found[key], dtype=logits.dtype), logits), key
        assert torch.equal(found["best"], logits.argmax(-1))
        assert found["of one"] == pytest.approx(logits[0, 1, 3].item())
        assert found["facts"] == (logits.shape, torch.float64, True, True)


def changed_through_a_view() -> str:
    logits = make(Head().double(), 2)(data()[0])
    some = logits[..., 2:4]
    try:
        some.detach().zero_()
    except TrainingError as error:
        return str(error)
    return "nothing"


def test_a_view_of_some_tokens_is_not_changed_in_silence() -> None:
    for message in run_distributed(changed_through_a_view, 2):
        assert "tensor_parallel.vocabulary_loss" in message


def wrong_label() -> str:
    engine = make(Head().double(), 2)
    tokens, labels = data()
    labels[1, 2] = ODD
    try:
        flat(engine(tokens), labels)
    except IndexError as error:
        return str(error)
    return "nothing"


def test_a_label_that_is_no_token_is_refused_on_every_rank() -> None:
    for message in run_distributed(wrong_label, 2):
        assert f"target {ODD} is out of bounds: there are {ODD} tokens" in message


# -- models of Transformers, which compute their losses themselves ---------------------------------


def own_losses(names: list[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        engine = make(build(name, vocab_size=51), 2)
        engine.job.byte_log.reset()
        output = engine(**labelled())
        engine.backward(output.loss)
        gathered = engine.job.byte_log.total(Purpose.ACTIVATION, "tp", "all_gather")
        found[name] = (
            output.loss.item(),
            gathered.payload_bytes,
            whole_logits(output.logits.detach()),
        )
        engine.destroy()
    return found


def labelled() -> dict[str, torch.Tensor]:
    """Some labels do not count."""
    tokens = batch(0)["input_ids"]
    labels = tokens.clone()
    labels[0, :3] = -100
    return {"input_ids": tokens, "labels": labels}


def test_models_compute_their_own_losses_from_parts() -> None:
    names = [name for name in MODELS if name != "mixtral"]
    for results in run_distributed(own_losses, 2, names):
        for name, (loss, gathered, logits) in results.items():
            expected = build(name, vocab_size=51)(**labelled())
            # which these models compute in float32
            assert loss == pytest.approx(expected.loss.item(), rel=1e-6), name
            assert gathered == 0, name
            assert torch.allclose(logits, expected.logits, rtol=1e-9, atol=1e-12), name

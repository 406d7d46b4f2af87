"""Blocks computed in chunks of the sequence train as whole ones do, to rounding, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sequence_models import LENGTH, ROWS, batch, engine_of, plain, tiny, train
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.plan.plan import Plan
from drivetrain.testing import run_distributed

CASES = [
    ("llama", "plain", LENGTH),
    ("llama", "padded", LENGTH - 1),
    ("llama", "packed", LENGTH),
    ("qwen", "plain", LENGTH - 3),
    ("mistral", "packed", LENGTH),
    ("gpt2", "padded", LENGTH),
    ("bert", "masked", LENGTH - 1),
]
CHUNKS = {"chunk": 8, "loss_tile": 5}


def chunked(sp: int, cases: list[tuple[str, str, int]], section: dict[str, Any]) -> list[Any]:
    found = []
    for name, kind, length in cases:
        here = {k: v for k, v in section.items() if name != "bert" or k != "loss_tile"}
        engine = engine_of(tiny(name), sequence_parallel_size=sp, sequence_parallel=here)
        losses = train(engine, kind, length=length)
        weights = [p.detach().clone() for p in engine.module.parameters()]
        found.append((losses, weights))
        engine.destroy()
    return found


def check(found: list[Any], cases: list[tuple[str, str, int]]) -> None:
    for (losses, weights), (name, kind, length) in zip(found, cases, strict=True):
        model = tiny(name)
        assert losses == pytest.approx(plain(model, kind, length), rel=1e-6), (name, kind)
        for ours, theirs in zip(weights, model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)


def test_models_in_chunks_train_as_whole_ones_on_one_rank() -> None:
    check(chunked(1, CASES, CHUNKS), CASES)


@pytest.mark.parametrize(
    ("sp", "cases"),
    [
        (2, [CASES[1], CASES[4], CASES[6]]),
        pytest.param(2, CASES, marks=pytest.mark.long),
        pytest.param(4, CASES, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_models_in_chunks_train_as_whole_ones_over_ranks(
    sp: int, cases: list[tuple[str, str, int]]
) -> None:
    for found in run_distributed(chunked, sp, sp, cases, CHUNKS):
        check(found, cases)


class Counted(nn.Module):
    """Counts the tokens that go through it at a time."""

    most = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counted.most = max(Counted.most, x.shape[1])
        return x


def test_no_more_tokens_than_a_chunk_go_through_a_block_at_a_time() -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp = nn.Sequential(Counted(), layer.mlp)
    engine = engine_of(model, sequence_parallel={"chunk": 8, "probe": False})
    train(engine, "plain")
    engine.destroy()
    assert Counted.most == 8


class Dropping(nn.Module):
    """Drops some of what goes through it, and notes what was left."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(x * self.weight, 0.5, self.training)
        self.seen.append(x.detach() != 0)
        return x


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_what_a_chunk_drops_it_drops_again_and_no_other_chunk_does(name: str) -> None:
    model = tiny(name)
    layers = model.model.layers if name == "llama" else model.bert.encoder.layer
    for layer in layers:
        place = layer.mlp if name == "llama" else layer.output
        inner = "down_proj" if name == "llama" else "dense"
        setattr(place, inner, nn.Sequential(getattr(place, inner), Dropping()))
    engine = engine_of(model, sequence_parallel={"chunk": 8, "probe": False})
    engine.train()
    kind = "plain" if name == "llama" else "masked"
    engine.backward(engine(**batch(0, kind)).loss)
    for part in (part for part in model.modules() if isinstance(part, Dropping)):
        forward, backward = part.seen[:3], part.seen[3:]
        assert all(map(torch.equal, forward, reversed(backward)))
        assert not torch.equal(forward[0], forward[1])
    engine.destroy()


class Twice(nn.Module):
    """Attends twice, the second time to what the first has made."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.project = nn.Linear(8, 24).double()
        self.shared: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            q, k, v = self.project(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            x = x + drivetrain.attention(self, q, k, v, causal=self.causal).flatten(2)
        return x if self.shared is None else x * self.shared


class Model(nn.Module):
    """Two of them."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Twice(causal), Twice(causal)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def test_blocks_that_attend_twice_are_right_or_refused() -> None:
    x = torch.randn(ROWS, LENGTH, 8, dtype=torch.float64)
    model, expected = Model(causal=True), Model(causal=True)
    engine = engine_of(model, sequence_parallel={"chunk": 9})
    for _ in range(2):
        loss = engine(x)
        engine.backward(loss)
        engine.step()
        other = expected(x)
        other.backward()
        with torch.no_grad():
            for parameter in expected.parameters():
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
        torch.testing.assert_close(loss, other)
    engine.destroy()
    engine = engine_of(Model(causal=False), sequence_parallel={"chunk": 9, "probe": False})
    with pytest.raises(TrainingError, match=r"attends twice, and not causally.*leave out"):
        engine(x)
    engine.destroy()


def refused(model: nn.Module, *args: Any, **kwargs: Any) -> str:
    engine = engine_of(model, sequence_parallel={"chunk": 8, "probe": False})
    with pytest.raises((ConfigError, TrainingError)) as raised:
        engine.backward(engine(*args, **kwargs))
    engine.destroy()
    return str(raised.value)


class Doubled(torch.autograd.Function):
    """A function that no mode of torch sees."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0] * 2


class Doubling(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return Doubled.apply(x)


def said_of_losses(custom: bool, x: torch.Tensor) -> str:
    """What a model is told whose loss has more than its blocks return: a loss of a hook."""
    model, collected = Model(causal=True), list[torch.Tensor]()
    part: nn.Module = model.blocks[1].project
    if custom:
        model.blocks[1].project = nn.Sequential(part, part := Doubling())
        part.register_forward_hook(lambda *given: collected.append(given[2]))
    else:
        part.register_forward_hook(lambda *given: collected.append(given[2].square().mean()))
    return refused(model, x)


def test_what_communication_lets_go_of_late_is_no_loss_of_a_hook(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may hold what it has sent until its thread gets a processor."""
    model, kept = Model(causal=True), list[torch.Tensor]()
    monkeypatch.setattr(
        "drivetrain_sequence.chunks.escapes.time.sleep",
        lambda seconds: kept.clear() if seconds else None,
    )
    model.blocks[1].project.register_forward_hook(lambda *given: kept.append(given[2]))
    engine = engine_of(model, sequence_parallel={"chunk": 8, "probe": False})
    engine.backward(engine(torch.randn(ROWS, LENGTH, 8, dtype=torch.float64)))
    engine.destroy()


def test_losses_of_routers_are_refused_and_their_absence_is_not() -> None:
    said = refused(tiny("mixtral", output_router_logits=True), **batch(0, "plain"))
    assert "that was computed inside of model.layers.0" in said
    check(chunked(1, [("mixtral", "plain", LENGTH)], CHUNKS), [("mixtral", "plain", LENGTH)])


def test_what_has_no_chunks_is_refused_by_name() -> None:
    x = torch.randn(ROWS, LENGTH, 8, dtype=torch.float64)
    model = Model(causal=True)
    model.shared = nn.Parameter(torch.ones(8, dtype=torch.float64))
    model.blocks[0].shared = model.shared
    del model.blocks[0]._parameters["shared"]
    object.__setattr__(model.blocks[0], "shared", model.shared)
    said = refused(model, x)
    assert "blocks.0 uses a tensor of shape (8,) that is trained" in said
    model = Model(causal=True)
    model.blocks[1].project.weight.register_hook(lambda gradient: gradient * 2)
    assert "a parameter of blocks.1 has a hook on its gradient" in refused(model, x)
    for custom in (False, True):
        assert "was computed inside of blocks.1, as hooks do" in said_of_losses(custom, x)
    with pytest.raises(ConfigError, match="Linear has no repeated blocks"):
        engine_of(nn.Linear(8, 8).double(), sequence_parallel={"chunk": 8})
    wrong: list[tuple[dict[str, int], str]] = [
        ({"chunk": 8, "ring_size": 2}, "chunks go with ranks that exchange heads"),
        ({"chunk": 7}, "7 tokens are not as many for each of 2 ranks"),
    ]
    for section, said in wrong:
        config = {"sequence_parallel_size": 2, "sequence_parallel": section}
        with pytest.raises(ConfigError, match=said):
            Plan.build(config, world_size=2, batch_required=False)

"""Random token dropping, against models that drop tokens by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_data_efficiency import DataEfficiency, consumed_layer_tokens
from drivetrain_data_efficiency.routing import random_ltd, tokens
from drivetrain_data_efficiency.routing.draw import draw, kept_tokens
from drivetrain_data_efficiency.section import LtdSchedule
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed
from drivetrain.testing.kernels import KernelConformance

SCHEDULE = {
    "min_value": 4,
    "max_value": 12,
    "schedule_config": {"require_steps": 4, "seq_per_step": 2},
}
KEPT = [4, 6, 8, 10, 12, 12]
LENGTH = 12


class TestTokenOps(KernelConformance):
    ops = (tokens.GATHER_TOKENS, tokens.SCATTER_TOKENS)


def test_gradients_of_any_order_are_right() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    kept = torch.tensor([[0, 3], [2, 4]])
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda h: tokens.gather_tokens(h, kept), (hidden,))
        assert check(lambda h, v: tokens.scatter_tokens(h, kept, v), (hidden, values))


def mixed(word: int) -> int:
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % 2**64
    return word ^ (word >> 31)


def drawn(place: tuple[int, ...], row: int, length: int, kept: int) -> list[int]:
    """The draw in whole numbers of Python."""
    digest = hashlib.sha256(repr(("random_ltd", *place)).encode()).digest()
    base = int.from_bytes(digest[:8], "little")
    key = mixed((row * 0x9E3779B97F4A7C15 + base) % 2**64)
    scores = [mixed((key + (t + 1) * 0x9E3779B97F4A7C15) % 2**64) for t in range(length)]
    signed = [s - 2**64 if s >= 2**63 else s for s in scores]
    return sorted(sorted(range(length), key=lambda t: signed[t])[:kept])


def test_draws_are_those_of_whole_numbers_and_even() -> None:
    rows = torch.tensor([0, 1, 7, -1])
    found = draw((3, 9, 2), rows, 17, 5)
    assert found.tolist() == [drawn((3, 9, 2), int(row), 17, 5) for row in rows]
    counts = torch.zeros(10)
    for step in range(400):
        counts += torch.bincount(draw((1, step), torch.arange(8), 10, 3).flatten(), minlength=10)
    assert (counts - 960).abs().max() < 4.5 * (3200 * 0.3 * 0.7) ** 0.5


def test_the_number_of_kept_tokens_follows_the_formula() -> None:
    schedule = LtdSchedule.model_validate(SCHEDULE)
    assert [kept_tokens(step, schedule) for step in range(6)] == KEPT
    odd = LtdSchedule.model_validate(
        {
            "min_value": 3,
            "max_value": 11,
            "schedule_config": {"require_steps": 4, "seq_per_step": 4},
        }
    )
    assert [kept_tokens(step, odd) for step in range(6)] == [3, 4, 4, 8, 8, 11]


# -- models ---------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor, table: Any = None, mask: Any = None) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, -1)
        if table is not None:
            q, k = q * table[0], k * table[0]
        if mask is not None:
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y[:, 0]).tanh()


class Model(nn.Module):
    """Four blocks; ``kind`` decides what they are given beside the hidden state."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(8, 40)
        self.kind = kind
        self.choose: Callable[[int, torch.Tensor, bool], torch.Tensor | None] | None = None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = self.embed(inputs)
        length = inputs.shape[1]
        table = torch.linspace(0.5, 1.5, length * 8, dtype=x.dtype).view(length, 8)
        blind = (inputs % 5 != 0) | (torch.arange(length) == 0)
        mask = (blind[:, None, None, :] & torch.ones(length, length).tril().bool()) | torch.eye(
            length
        ).bool()
        for number, block in enumerate(self.blocks):
            given: dict[str, Any] = {}
            if self.kind == "table":
                given["table"] = (table,)
            if self.kind == "mask":
                given["mask"] = mask
            kept = None
            if self.choose is not None:
                kept = self.choose(number, inputs, self.kind == "table")
            if kept is None:
                x = block(x, **given)
                continue
            # by hand, sample by sample
            rows = []
            for row, own in enumerate(kept):
                less = dict(given)
                if self.kind == "table":
                    less["table"] = (table[own],)
                if self.kind == "mask":
                    less["mask"] = mask[row : row + 1, :, own][..., own]
                new = x[row].clone()
                new[own] = block(x[row : row + 1, own], **less)[0]
                rows.append(new)
            x = torch.stack(rows)
        logits = self.head(x)[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), inputs[:, 1:].flatten())


def made(kind: str) -> Model:
    torch.manual_seed(0)
    return Model(kind).double()


def batches(steps: int, samples: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 40, (steps, samples, LENGTH), generator=generator)


def by_hand(kind: str, steps: int, micro: int, layers: tuple[int, ...]) -> Any:
    """Losses and weights of plain torch; the batch is seen in rounds of ``micro`` samples."""
    model = made(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step, batch in enumerate(batches(steps)):
        optimizer.zero_grad()
        total = 0.0
        for begin in range(0, len(batch), micro):

            def choose(layer: int, inputs: torch.Tensor, shared: bool) -> torch.Tensor | None:
                if layer not in layers or KEPT[step] >= LENGTH:  # noqa: B023
                    return None
                names = [begin + row for row in range(len(inputs))]  # noqa: B023
                names = [-1 - begin // micro] * len(inputs) if shared else names  # noqa: B023
                place = (7, step, layer)  # noqa: B023
                return torch.tensor([drawn(place, n, LENGTH, KEPT[step]) for n in names])  # noqa: B023

            model.choose = choose
            loss = model(batch[begin : begin + micro]) * micro / len(batch)
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    return losses, {n: p.detach() for n, p in model.named_parameters()}


def config(layers: tuple[int, ...] | None, **keys: Any) -> dict[str, Any]:
    ltd = {"enabled": True, "random_ltd_schedule": SCHEDULE, **keys.pop("ltd", {})}
    if layers is not None:
        ltd["random_ltd_layer_id"] = list(layers)
    return {
        "train_batch_size": 8,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "data_efficiency": {
            "enabled": True,
            "seed": 7,
            "data_routing": {"enabled": True, "random_ltd": ltd},
        },
        **keys,
    }


def start(model: nn.Module, settings: dict[str, Any]) -> drivetrain.Engine:
    registry = Registry.installed().with_plugins(DataEfficiency)
    engine, *_ = drivetrain.initialize(model=model, config=settings, registry=registry)
    return engine


def run(engine: drivetrain.Engine, first: int, last: int) -> list[float]:
    micro, mesh = engine.train_micro_batch_size_per_gpu(), engine.job.mesh
    losses = []
    for batch in batches(last)[first:]:
        own = batch.split(micro)[mesh.coordinate("dp") :: mesh.size("dp")]
        losses.append(float(engine.train_batch(iter(own))))
    return losses


def train(kind: str, settings: dict[str, Any]) -> Any:
    engine = start(made(kind), settings)
    losses = run(engine, 0, 5)
    weights = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    consumed = random_ltd.of_job[engine.job].consumed
    engine.destroy()
    return losses, weights, consumed


@pytest.mark.parametrize("kind", ["plain", "table", "mask"])
@pytest.mark.parametrize(("world", "micro"), [(1, 8), (1, 2), (2, 2)])
def test_training_equals_dropping_by_hand(kind: str, world: int, micro: int) -> None:
    layers = (1, 2)
    settings = config(layers, train_micro_batch_size_per_gpu=micro)
    expected, weights = by_hand(kind, 5, micro * world, layers)
    for losses, found, consumed in run_distributed(train, world, kind, settings):
        assert losses == pytest.approx(expected, rel=1e-10)
        for name, weight in weights.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-9, atol=1e-12)
        assert consumed == sum(8 * (k * 2 + LENGTH * 2) for k in KEPT[:5])


def test_without_ids_all_but_the_first_and_last_layer_drop() -> None:
    losses, _, _ = train("plain", config(None))
    assert losses == pytest.approx(by_hand("plain", 5, 8, (1, 2))[0], rel=1e-10)


def test_a_resume_keeps_the_same_tokens_and_counts_on(tmp_path: Path) -> None:
    whole, weights, consumed = train("plain", config((0, 3)))
    engine = start(made("plain"), config((0, 3)))
    first = run(engine, 0, 2)
    engine.save_checkpoint(str(tmp_path))
    engine.destroy()
    torch.manual_seed(99)  # the script's own streams have no say
    engine = start(made("plain"), config((0, 3), train_micro_batch_size_per_gpu=4))
    engine.load_checkpoint(str(tmp_path))
    assert first + run(engine, 2, 5) == pytest.approx(whole, rel=1e-10)
    assert random_ltd.of_job[engine.job].consumed == consumed
    for name, parameter in engine.module.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-9, atol=1e-12)
    engine.destroy()


class Recomputed(Model):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = self.embed(inputs)
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        logits = self.head(x)[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), inputs[:, 1:].flatten())


def test_recomputation_keeps_the_same_tokens_and_counts_once() -> None:
    torch.manual_seed(0)
    engine = start(Recomputed().double(), config((1, 2)))
    losses = run(engine, 0, 5)
    assert losses == pytest.approx(by_hand("plain", 5, 8, (1, 2))[0], rel=1e-10)
    assert consumed_layer_tokens(engine) == sum(8 * (k * 2 + 24) for k in KEPT[:5])
    engine.destroy()


def test_evaluation_sees_all_tokens_and_the_report_says_how_many_are_kept() -> None:
    engine = start(made("plain"), config((1, 2), steps_per_print=1))
    batch = batches(1)[0]
    loss = float(engine.eval_batch(iter([batch])))
    assert loss == pytest.approx(made("plain")(batch).item(), rel=1e-12)
    run(engine, 0, 2)
    assert engine.last_report is not None
    assert engine.last_report.values["random_ltd_kept_tokens"] == 6
    engine.destroy()


def test_the_rate_follows_layer_tokens() -> None:
    per_step = [8 * (k * 2 + 24) for k in KEPT]
    total = sum(per_step[:5])
    rate = {
        "enabled": True,
        "total_layer_tokens": total,
        "warmup_layer_tokens": per_step[0] * 2,
        "decay_type": "linear",
    }
    factors, before = [], 0
    for tokens_of_step in per_step:
        warmup = 2 * per_step[0]
        part = (before - warmup) / (total - warmup)
        factors.append(before / warmup if before < warmup else max(0.0, 1.0 - part))
        before += tokens_of_step
    assert factors[:2] == [0.0, 0.5]
    assert factors[-1] == 0.0
    engine = start(made("plain"), config((1, 2), ltd={"layer_token_lr_schedule": rate}))
    for batch, factor in zip(batches(6), factors, strict=True):
        before_step = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
        engine.backward(engine(batch))
        gradients = {n: p.grad for n, p in engine.module.named_parameters()}
        engine.step()
        del gradients
        moved = sum(
            float((p.detach() - before_step[n]).abs().sum())
            for n, p in engine.module.named_parameters()
        )
        assert (moved > 0) == (factor > 0)
        assert [group["lr"] for group in engine.optimizer.param_groups] == [0.5]
    engine.destroy()


# -- models of Transformers -----------------------------------------------------------------------


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    settings = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(settings).double()


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    settings = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(settings).double()


@pytest.mark.parametrize(("build", "padded"), [(llama, False), (llama, True), (bert, True)])
def test_a_model_of_transformers_equals_one_whose_layers_are_masked(
    build: Any, padded: bool
) -> None:
    """A layer that sees some tokens is one in which nobody sees the others, which pass it by."""
    batch = batches(1)[0]
    mask = torch.ones_like(batch)
    if padded:
        mask[::2, -3:] = 0
    given = {"input_ids": batch, "labels": batch, "attention_mask": mask if padded else None}
    engine = start(build(), config((1, 2)))
    loss = engine(**given).loss
    engine.backward(loss)
    engine.destroy()
    model = build().train()
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 4)
    for number in (1, 2):
        kept = torch.tensor([drawn((7, 0, number), row, LENGTH, 4) for row in range(8)])
        _mask_by_hand(blocks[number], kept, causal=build is llama, padding=mask)
    expected = model(**given).loss
    assert float(loss) == pytest.approx(float(expected), rel=1e-10)


def _mask_by_hand(block: nn.Module, kept: torch.Tensor, causal: bool, padding: Any) -> None:
    inner = block.forward
    seen = torch.zeros(8, LENGTH, dtype=torch.bool).scatter(1, kept, True)
    keys = (seen & padding.bool())[:, None, None, :]
    if causal:
        keys = keys & torch.ones(LENGTH, LENGTH).tril().bool()
    blind = ~keys.any(-1, keepdim=True)  # softmax needs one key

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            args = (keys | blind, *args[1:])
        else:
            kwargs["attention_mask"] = keys | blind
        output = inner(hidden_states, *args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        first = torch.where(seen[..., None], first, hidden_states)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    block.forward = forward  # type: ignore[method-assign]


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ltd", "message"),
    [
        ({"total_layer_num": 5}, "total_layer_num is 5, but the model has 4 layers"),
        ({"random_ltd_layer_id": [1, 4]}, r"\[1, 4\]: the model has the layers 0 to 3"),
        ({"random_ltd_layer_num": 3}, "random_ltd_layer_num is 3, but 2 layers drop"),
    ],
)
def test_layers_that_the_model_does_not_have_are_refused(ltd: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        start(made("plain"), config(None, ltd=ltd))


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has no repeated blocks"):
        start(nn.Linear(2, 2), config(None))


def test_sections_that_contradict_themselves_are_refused() -> None:
    for ltd, message in (
        ({"random_ltd_layer_id": [1, 1]}, "names a layer twice"),
        ({"random_ltd_layer_id": [1], "random_ltd_layer_num": 2}, "layer_num is 2"),
        ({"layer_token_lr_schedule": {"enabled": True}}, "needs total_layer_tokens"),
        ({"random_ltd_schedule": None}, "needs random_ltd_schedule"),
    ):
        with pytest.raises(ConfigError, match=message):
            start(made("plain"), config(None, ltd=ltd))


def test_layers_of_something_else_say_so_at_their_first_call() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            one = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
            self.layers = nn.ModuleList([one, nn.Sequential(nn.Linear(4, 4), nn.Tanh())])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x.sum()

    engine = start(Flat(), config((0, 1)))
    with pytest.raises(TrainingError, match=r"first argument of the layer layers.0 is no hidden"):
        engine(torch.ones(8, 4))
    engine.destroy()

"""Models of Transformers train over parts of sequences as they do over whole ones."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from drivetrain_sequence import HeadShare
from drivetrain_sequence.losses import TiledHead
from drivetrain_sequence.tiles import TiledModule
from sequence_models import LENGTH, batch, engine_of, plain, tiny, train
from torch.utils.flop_counter import FlopCounterMode

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


def parts(sp: int, cases: list[tuple[str, str, int]], section: dict[str, Any]) -> list[Any]:
    found = []
    for name, kind, length in cases:
        engine = engine_of(tiny(name), sequence_parallel_size=sp, sequence_parallel=section)
        losses = train(engine, kind, length=length)
        weights = [p.detach().clone() for p in engine.module.parameters()]
        found.append((losses, weights))
        engine.destroy()
    return found


def check(found: list[Any], cases: list[tuple[str, str, int]]) -> None:
    for (losses, weights), (name, kind, length) in zip(found, cases, strict=True):
        model = tiny(name)
        # Transformers computes losses in float32.
        assert losses == pytest.approx(plain(model, kind, length), rel=1e-6), (name, kind)
        for ours, theirs in zip(weights, model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("sp", "cases"),
    [
        (2, CASES),
        pytest.param(3, CASES, marks=pytest.mark.long),
        pytest.param(4, CASES, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_losses_and_weights_are_those_of_one_process(
    sp: int, cases: list[tuple[str, str, int]]
) -> None:
    for found in run_distributed(parts, sp, sp, cases, {}):
        check(found, cases)


@pytest.mark.parametrize(
    ("sp", "ring", "cases"),
    [
        (2, 2, [*CASES[:3], *CASES[4:]]),
        pytest.param(4, 2, CASES, marks=pytest.mark.long),
        pytest.param(3, 3, CASES, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_rings_train_to_the_weights_of_one_process(
    sp: int, ring: int, cases: list[tuple[str, str, int]]
) -> None:
    for found in run_distributed(parts, sp, sp, cases, {"ring_size": ring}):
        check(found, cases)


def test_losses_and_mlps_in_tiles_change_nothing() -> None:
    tiles = {"loss_tile": 5, "mlp_tile": 4}
    cases = [CASES[1], CASES[5]]
    check(parts(1, cases, tiles), cases)
    for found in run_distributed(parts, 2, 2, cases[:1], tiles):
        check(found, cases[:1])


class Convolved(torch.nn.Module):
    """Looks at the token before without attention."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


ANY = [("llama", "padded", LENGTH), ("bert", "masked", LENGTH)]


def in_any_tiles(sp: int) -> list[Any]:
    found = []
    for case in ANY:
        own = {"*.output": 5} if case[0] == "bert" else {"*_proj": 7}
        found += parts(sp, [case], {"norm_tile": 4, "tiled_modules": own})
    return found


def test_norms_and_modules_that_a_user_names_in_tiles_change_nothing() -> None:
    check(in_any_tiles(1), ANY)
    for found in run_distributed(in_any_tiles, 2, 2):
        check(found, ANY)


class Noting(torch.nn.LayerNorm):
    """Notes how many tokens go through it at a time."""

    def __init__(self) -> None:
        super().__init__(32, dtype=torch.float64)
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.shape[1])
        return super().forward(x)


def test_tiles_go_through_a_norm_one_by_one_and_again_in_backward() -> None:
    model = tiny("llama")
    model.model.norm = norm = Noting()
    engine = engine_of(model, sequence_parallel={"norm_tile": 10})
    train(engine, "plain", steps=1)
    engine.destroy()
    assert norm.seen[:3] == [4, 2, 2]  # compared once
    assert sorted(norm.seen[3:]) == [4, 4, 10, 10, 10, 10]
    train(engine_of(model), "plain", steps=1)
    assert norm.seen[9:] == [LENGTH]


class Averaged(torch.nn.Module):
    """Adds the mean over all tokens to each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.mean(1, keepdim=True)


def test_tokens_that_are_the_same_do_not_hide_that_a_module_mixes_them() -> None:
    model = torch.nn.Sequential(Averaged(), torch.nn.Linear(4, 4))
    engine = engine_of(model, sequence_parallel={"tiled_modules": {"0": 5}})
    with pytest.raises(ConfigError, match="tiled_modules: 0, a Averaged, is not one of single"):
        engine(torch.ones(2, 8, 4))  # as padding at the left of all rows is


class ChannelsFirst(torch.nn.LayerNorm):
    """A norm of [rows, channels, places, places], as convolutional models have it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ChannelsRMSNorm(torch.nn.Module):
    """The like, with a weight that fits any number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / x.square().mean(1, keepdim=True).sqrt()


@pytest.mark.parametrize("tile", [4, "measured"])
@pytest.mark.parametrize("norm", [lambda: ChannelsFirst(8), ChannelsRMSNorm])
def test_norms_of_another_dimension_than_the_last_have_no_tiles(norm: Any, tile: Any) -> None:
    engine = engine_of(torch.nn.Sequential(norm()), sequence_parallel={"norm_tile": tile})
    with pytest.raises(ConfigError, match=r"norm_tile: 0, a Channels\w+, is not one of single"):
        engine(torch.randn(2, 8, 3, 3))
    engine.destroy()


@pytest.mark.parametrize("tiled", [TiledModule, TiledHead])
def test_a_forward_that_a_module_had_before_is_given_back(tiled: Any) -> None:
    linear = torch.nn.Linear(4, 4)
    tiled(linear, 4).undo()
    assert "forward" not in vars(linear)
    own = linear.forward = lambda x: x
    tiled(linear, 4).undo()
    assert linear.forward is own
    replaced, later = tiled(linear, 4), lambda x: x
    linear.forward = later
    replaced.undo()
    assert linear.forward is later


@pytest.mark.parametrize("length", [2, 3])
def test_a_module_of_single_tokens_may_have_few_of_them(length: int) -> None:
    linear = torch.nn.Linear(4, 4)
    x = torch.randn(2, length, 4)
    expected = linear(x)
    engine = engine_of(torch.nn.Sequential(linear), sequence_parallel={"tiled_modules": {"0": 1}})
    torch.testing.assert_close(engine(x), expected)
    engine.destroy()


def test_modules_that_tiles_change_and_those_that_are_not_there_are_refused() -> None:
    model = tiny("llama")
    model.model.norm = torch.nn.Sequential(model.model.norm, Convolved())
    engine = engine_of(model, sequence_parallel={"tiled_modules": {"model.no*": 5}})
    with pytest.raises(ConfigError, match=r"model.norm, a Sequential, is not one of single tokens"):
        engine(**batch(0, "plain"))
    engine.destroy()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"norm_tile": 4}, r"sequence_parallel.norm_tile: Linear has no norm"),
        ({"mlp_tile": 4}, r"mlp_tile: Linear has no multi-layer perceptron among"),
        ({"tiled_modules": {"*.mlp": 4}}, r"Linear has no module that is called '\*.mlp'"),
    ]
    for section, said in wrong:
        with pytest.raises(ConfigError, match=said):
            engine_of(torch.nn.Linear(4, 4), sequence_parallel=section)


class Headed(torch.nn.Linear):
    """A head with a scale that it does not own, and a watcher of its weight's gradients."""

    scale: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


def headed(watched: bool) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
    model, seen = tiny("llama"), list[torch.Tensor]()
    head = Headed(32, 40, bias=False).double()
    head.load_state_dict(model.lm_head.state_dict())
    model.scale = torch.nn.Parameter(torch.ones(40, dtype=torch.float64))
    object.__setattr__(head, "scale", model.scale)
    model.lm_head = head
    if watched:
        head.weight.register_hook(seen.append)
    return model, model.scale, seen


@pytest.mark.parametrize("watched", [False, True])
def test_heads_whose_gradients_somebody_needs_give_them_once(watched: bool) -> None:
    model, scale, seen = headed(watched)
    engine = engine_of(model, sequence_parallel={"loss_tile": 5})
    train(engine, "padded", steps=1)
    engine.destroy()
    expected, other, theirs = headed(watched)
    plain(expected, "padded", steps=1)
    torch.testing.assert_close(scale.detach(), other.detach(), rtol=1e-6, atol=1e-7)
    assert len(seen) == len(theirs) == int(watched)
    for ours, reference in zip(seen, theirs, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-7)


def test_losses_in_tiles_compute_logits_once() -> None:
    found = []
    for section in ({}, {"loss_tile": 5}):
        engine = engine_of(tiny("llama"), sequence_parallel=section)
        with FlopCounterMode(display=False) as counter:
            train(engine, "plain", steps=1)
        found.append(counter.get_total_flops())
        engine.destroy()
    assert found[0] == found[1]


class Aside(torch.nn.Module):
    """Attention of a model's own, which asks nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(32, 96).double()

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        q, k, v = self.project(hidden_states).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).flatten(2), None


class Own(torch.nn.Module):
    """A model of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Linear(4, 4).double()

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.weight(x).mean()


def refused_or_not() -> list[str]:
    """What is said of batches and models that cannot be shared out."""
    found = []
    rank = int(os.environ["RANK"])
    packed, plain_ = batch(0, "packed"), batch(0, "plain")
    four = {"attention_mask": torch.ones(2, 1, LENGTH, LENGTH)}
    wrong: list[tuple[Any, dict[str, Any]]] = [
        (tiny("llama"), {**plain_, **four}),
        (tiny("llama"), {**packed, "position_ids": packed["position_ids"][:, :5]}),
        (tiny("llama"), {**plain_, "labels": plain_["labels"][:, 0]}),
        (tiny("llama"), {**plain_, "logits_to_keep": 1}),
        (tiny("llama"), batch(rank, "plain")),
        (tiny("llama"), {"labels": plain_["labels"]}),
    ]
    model = tiny("llama")
    model.model.norm = torch.nn.Sequential(model.model.norm, Convolved())
    wrong.append((model, plain_))
    wrong.append((tiny("mixtral", output_router_logits=True), plain_))
    aside = tiny("llama")
    aside.model.layers[1].self_attn = Aside()
    numbered = (packed.pop("position_ids").diff(dim=1, prepend=torch.zeros(2, 1)) < 1).cumsum(1)
    wrong += [
        (aside, plain_),
        (tiny("llama"), {**packed, "attention_mask": numbered}),
        (tiny("llama"), {**packed, "cu_seq_lens_q": torch.tensor([0, 5, 24])}),
        (tiny("llama"), {**plain_, "attention_mask": torch.ones(2, LENGTH - 1)}),
        (tiny("llama", num_attention_heads=1, num_key_value_heads=1), plain_),
        (Own(), {"x": torch.ones(2, LENGTH - 1, 4, dtype=torch.float64)}),
    ]
    for model, inputs in wrong:
        engine = engine_of(model, sequence_parallel_size=2)
        try:
            engine(**inputs)
            found.append("")
        except (ConfigError, TrainingError) as error:
            found.append(str(error))
        engine.destroy()
    return found


def test_what_cannot_be_shared_out_is_refused_by_name_on_every_rank() -> None:
    expected = [
        "an attention_mask of shape (2, 1, 24, 24) cannot be cut",
        "position_ids of shape (2, 5) are not one for each of 24 tokens of 2 rows",
        "labels of shape (2,) are not one for each of 24 tokens",
        "logits_to_keep picks tokens of whole sequences",
        "the ranks of one sequence (sequence_parallel_size) were given different batches",
        "a batch without input_ids or inputs_embeds cannot be cut",
        "LlamaForCausalLM computes something else when ranks share its sequences",
        "MixtralForCausalLM adds something of its own to the loss of its tokens",
        "(model.layers.1, a LlamaDecoderLayer, called none)",
        "an attention_mask has other values than 0 and 1",
        "cu_seq_lens_q say that rows are packed, and position_ids are missing",
        "an attention_mask of shape (2, 23) cannot be cut",
        "2 ranks cannot share out 1 heads",
        "23 tokens cannot be cut into 2 equal parts",
    ]
    for found in run_distributed(refused_or_not, 2):
        for said, begin in zip(found, expected, strict=True):
            assert begin in said, said


def test_ranks_of_a_ring_are_a_part_of_those_of_a_sequence() -> None:
    config = {"sequence_parallel_size": 4, "sequence_parallel": {"ring_size": 3}}
    with pytest.raises(ConfigError, match=r"3 ranks cannot be a part of 4 .*give a divisor of it"):
        Plan.build(config, world_size=4, batch_required=False)


def test_more_ranks_than_heads_need_a_ring() -> None:
    with pytest.raises(
        ConfigError, match=r"8 ranks cannot share out 4 heads: .*ring_size of at least 2"
    ):
        HeadShare.of(4, 2, 8)
    with pytest.raises(ConfigError, match="6 heads of queries do not share 4 of keys evenly"):
        HeadShare.of(6, 4, 2)

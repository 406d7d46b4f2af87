"""In which order exchanges are issued, and experts over ranks that have the same tokens."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from dense_experts import (
    EXPERTS,
    KINDS,
    RATE,
    TOKENS,
    WIDTH,
    Expert,
    Model,
    count_of,
    tokens,
    train_dense,
)
from drivetrain_moe import MoE
from drivetrain_moe.axes import ExpertAxes
from drivetrain_moe.exchange import way_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import drivetrain
from drivetrain.contracts import (
    Atom,
    AxisRequest,
    Box,
    Collective,
    CommunicatorWrapper,
    Handle,
    Placement,
    Plugin,
    PositiveInt,
    Purpose,
    Section,
    Sections,
    hookimpl,
)
from drivetrain.contracts.state.parameters import ParameterTable
from drivetrain.errors import ConfigError
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed

SEPARATE = {"cpu": {"shared_memory": False}} if find_spec("drivetrain_cpu") else {}
"""Ranks that read each other's shards where they lie could gather at any time."""


class AlikeSection(Section):
    ranks: PositiveInt = 1


class Alike(Plugin):
    """Ranks along ``tp`` that have the same tokens; every layer is whole on each of them."""

    name = "alike"
    sections: ClassVar[Sections] = {"alike": AlikeSection}

    @hookimpl
    def mesh_axes(self) -> list[AxisRequest]:
        return [Atom("tp", self.section(AlikeSection).ranks)]


def engine_of(model: nn.Module, tp: int = 1, **changes: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": RATE}},
        "alike": {"ranks": tp},
        **changes,
        "moe": {"over_tensor": True, **changes.get("moe", {})},
    }
    registry = Registry.installed().with_plugins(Alike)
    return drivetrain.initialize(model=model, config=config, registry=registry)[0]


# -- what overlaps ---------------------------------------------------------------------------------


class Noting(CommunicatorWrapper):
    """Notes when exchanges of rows start, and when they are waited for."""

    def __init__(self, inner: Any, notes: list[str]) -> None:
        super().__init__(inner)
        self.notes = notes

    def run(self, collective: Collective) -> Handle:
        handle = super().run(collective)
        if collective.input_splits is None:  # of counts
            return handle
        assert collective.asynchronous
        number = sum(note.startswith("start") for note in self.notes)
        self.notes.append(f"start {number}")
        return Noted(handle, self.notes, f"wait {number}")


class Noted:
    def __init__(self, handle: Handle, notes: list[str], note: str) -> None:
        self.handle, self.notes, self.note = handle, notes, note

    def wait(self) -> None:
        self.notes.append(self.note)
        self.handle.wait()


class Passing(torch.autograd.Function):
    """The identity, noted both ways."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, notes: list[str]) -> torch.Tensor:
        ctx.name, ctx.notes = name, notes
        notes.append(name)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.notes.append(ctx.name)
        return gradient, None, None


class Named(nn.Module):
    def __init__(self, name: str, notes: list[str]) -> None:
        super().__init__()
        self.expert, self.name, self.notes = Expert(), name, notes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = Passing.apply(self.expert(x), self.name, self.notes)
        return found


def noted(halves: bool) -> list[list[str]]:
    notes: list[str] = []
    layer = MoE(WIDTH, Expert(), EXPERTS, 2, 2, drop_tokens=False, use_residual=True)
    layer.residual, layer.shared_expert = Named("residual", notes), Named("shared", notes)
    engine = engine_of(layer.double(), moe={"halves": halves})
    assert layer.way.experts is not None
    layer.way.experts.communicator = Noting(layer.way.experts.communicator, notes)
    for expert in list(layer.experts.values())[:1]:
        expert.register_forward_hook(lambda *_: notes.append("experts"))
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    loss = engine(x)[0].square().mean()
    forward = notes.copy()
    notes.clear()
    engine.backward(loss)
    engine.destroy()
    return [forward, notes]


def test_dense_experts_compute_while_tokens_and_answers_travel() -> None:
    for forward, backward in run_distributed(noted, 2, False):
        assert forward == [
            *("start 0", "shared", "wait 0", "experts"),
            *("start 1", "residual", "wait 1"),
        ]
        assert backward == ["start 0", "residual", "wait 0", "start 1", "shared", "wait 1"]


def test_one_half_travels_while_experts_compute_the_other() -> None:
    for forward, backward in run_distributed(noted, 2, True):
        assert forward == [
            *("start 0", "start 1", "shared"),
            *("wait 0", "experts", "start 2"),
            *("wait 1", "experts", "start 3"),
            *("residual", "wait 2", "wait 3"),
        ]
        # The answers' adjoints start, then those of the tokens: each while the other half computes.
        assert backward == [
            *("start 0", "start 1", "residual"),
            *("wait 0", "start 2", "wait 1", "start 3"),
            *("shared", "wait 2", "wait 3"),
        ]


# -- ranks that have the same tokens ---------------------------------------------------------------


def train(kinds: list[str], tp: int, ep: int, changes: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for kind in kinds:
        engine = engine_of(Model(kind, ep), tp, **changes)
        shard, losses = engine.job.mesh.coordinate("dp"), []
        for step in range(2):
            loss = engine(*tokens(step, shard, count_of(kind, shard)))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        own = sum(1 for name, _ in engine.module.named_parameters() if "experts." in name)
        with drivetrain.whole(engine.module):
            state = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
        found[kind] = losses, state, own
        engine.destroy()
    return found


def claim(kinds: list[str], world: int, tp: int, ep: int, **changes: Any) -> None:
    ranks = run_distributed(train, world, kinds, tp, ep, changes)
    clipping = changes.get("gradient_clipping", 0.0)
    for kind in kinds:
        losses, state = train_dense(kind, 2, world // tp, clipping=clipping)
        got = torch.tensor([found[kind][0] for found in ranks], dtype=torch.float64).mean(0)
        assert got.tolist() == pytest.approx(losses, rel=1e-9), kind
        for found in ranks:
            assert kind == "grouped" or found[kind][2] == 4 * EXPERTS // ep
            for name, value in found[kind][1].items():
                torch.testing.assert_close(
                    value, state[name], rtol=1e-8, atol=1e-10, msg=f"{kind} {name}"
                )


def test_experts_over_ranks_with_the_same_tokens_train_like_a_dense_loop() -> None:
    kinds = ["top-1", "dropless top-2", "shared", "sigmoid in groups", "experts choose", "grouped"]
    claim(kinds, 2, 2, 2, gradient_clipping=0.1)


@pytest.mark.long
def test_so_does_every_kind_of_routing() -> None:
    claim(list(KINDS), 2, 2, 2)


def train_transformers(
    families: list[str], tp: int, ep: int, recomputes: bool, changes: dict[str, Any]
) -> dict[str, Any]:
    import test_automatic_experts as automatic

    found = {}
    for family in families:
        model = automatic.build(family)
        if recomputes:
            model.gradient_checkpointing_enable()
        engine = engine_of(
            model,
            tp,
            train_micro_batch_size_per_gpu=2,
            optimizer={"type": "SGD", "params": {"lr": automatic.RATE}},
            expert_parallel={"enabled": True, "autoep_size": ep},
            **changes,
        )
        for step in range(automatic.STEPS):
            shard = engine.job.mesh.coordinate("dp")
            engine.backward(engine(**automatic.batch(step, shard)).loss)
            engine.step()
        with drivetrain.whole(engine.module):
            found[family] = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
        engine.destroy()
    return found


def claim_transformers(
    families: list[str], world: int, tp: int, ep: int, recomputes: bool = False, **changes: Any
) -> None:
    automatic = pytest.importorskip("test_automatic_experts")
    ranks = run_distributed(train_transformers, world, families, tp, ep, recomputes, changes)
    for family in families:
        _, state = automatic.reference(family, world // tp)
        for found in ranks:
            assert set(found[family]) == set(state)
            for name, value in found[family].items():
                torch.testing.assert_close(
                    value, state[name], rtol=1e-4, atol=1e-6, msg=f"{family} {name}"
                )


def test_experts_of_transformers_do_so_in_halves_and_once_more_in_backward() -> None:
    claim_transformers(["mixtral"], 2, 2, 2, recomputes=True, moe={"halves": True})


@pytest.mark.long
@pytest.mark.parametrize(("tp", "ep"), [(1, 2), (2, 2), (2, 4), (4, 2)])
@pytest.mark.parametrize("halves", [False, True])
def test_all_kinds_of_transformers_do_so(tp: int, ep: int, halves: bool) -> None:
    claim_transformers(["mixtral", "deepseek_v3", "gpt_oss"], 4, tp, ep, moe={"halves": halves})


@pytest.mark.long
@pytest.mark.parametrize("in_parts", [False, True])
def test_so_they_do_beside_layers_that_are_cut(in_parts: bool) -> None:
    pytest.importorskip("drivetrain_tensor")
    cut = {"autotp_size": 2, "sequence_parallel": in_parts}
    claim_transformers(["mixtral"], 2, 2, 2, tensor_parallel=cut)


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize(("tp", "ep"), [(2, 2), (2, 4), (4, 2), (4, 4)])
def test_so_they_do_beside_data_shards_and_copies(tp: int, ep: int, stage: int) -> None:
    kinds = ["top-2", "dropless top-2", "grouped", "shared", "experts choose"]
    zero = {"zero_optimization": {"stage": stage}}
    claim(kinds, 4, tp, ep, moe={"halves": stage > 0}, gradient_clipping=0.1, **zero, **SEPARATE)


def test_experts_that_are_gathered_each_by_itself_are_so_for_each_half() -> None:
    pytest.importorskip("drivetrain_zero")
    # Ranks have other experts in no repeated block, and one has rows for one half alone.
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    kinds = ["dropless top-2", "idle experts"]
    claim(kinds, 2, 1, 2, moe={"halves": True}, zero_optimization=zero, **SEPARATE)


@pytest.mark.long
def test_so_they_do_where_each_rank_sends_all_of_its_tokens() -> None:
    claim(["top-2", "grouped"], 4, 2, 2, moe={"over_tensor": False})


def moved(kind: str) -> tuple[dict[str, int], list[int]]:
    engine = engine_of(Model(kind, 2), 2)
    log, (x, y) = engine.job.byte_log, tokens(0, 0, 7)
    wanted = engine.module.moe(torch.tanh(engine.module.stem(x)))[2]
    log.reset()
    loss = engine(x, y)
    asked = {"ep": log.total(Purpose.ACTIVATION, "ep", key="moe").payload_bytes}
    asked["tp"] = log.total(Purpose.ACTIVATION, "tp", key="moe").payload_bytes
    engine.backward(loss)
    asked["ep both"] = log.total(Purpose.ACTIVATION, "ep", key="moe").payload_bytes
    asked["tp both"] = log.total(Purpose.ACTIVATION, "tp", key="moe").payload_bytes
    asked["counts"] = log.total(Purpose.CONTROL, "ep", key="moe").payload_bytes
    engine.destroy()
    return asked, wanted.tolist()


def test_each_of_these_ranks_sends_its_share_and_results_are_gathered_once() -> None:
    (first, wanted), (second, again) = run_distributed(moved, 2, "dropless top-2")
    assert wanted == again
    assert sum(wanted) == 2 * 7
    # Both ranks together send every choice of a token once, there and back, and once more each way
    # in backward. Without shares both would send all of them.
    assert first["ep"] + second["ep"] == 2 * 2 * 7 * WIDTH * 8
    assert first["ep both"] + second["ep both"] == 2 * 2 * 2 * 7 * WIDTH * 8
    for found in (first, second):
        assert found["counts"] == 2 * (EXPERTS // 2 + 1) * 8
        assert found["tp"] == 8 * WIDTH * 8  # 7 tokens, padded to shares of 4
        # In backward, gradients of tokens and of the router's scores.
        assert found["tp both"] == found["tp"] + 8 * (WIDTH + EXPERTS) * 8


def test_ranks_that_do_not_nest_say_what_they_are_made_of() -> None:
    registry = Registry.installed().with_plugins(Alike)
    config: dict[str, Any] = {"train_batch_size": 3, "alike": {"ranks": 2}, "moe": {"ep_size": 3}}
    config["moe"]["over_tensor"] = True
    with pytest.raises(ConfigError, match="ep 3 does not nest in tp 2 x sp 1 x dp 3 = 6 ranks"):
        drivetrain.Plan.build(config, world_size=6, registry=registry)
    config["moe"] = {"ep_size": 3}
    drivetrain.Plan.build(config, world_size=6, registry=registry)


def test_ranks_that_have_parts_of_an_expert_cannot_have_other_experts() -> None:
    expert, table = nn.Linear(2, 2), ParameterTable()
    table.register(expert, "data")
    boxes = (Box((0, 0), (2, 2), 0),)
    table.info(expert.weight).placement = Placement((4, 2), boxes, "tp")
    job: Any = SimpleNamespace(parameters=table, mesh=SimpleNamespace(size=lambda _axis: 2))
    with pytest.raises(ConfigError, match=r"moe.over_tensor: ranks along tp have parts of a\.wei"):
        way_of(job, "a", ExpertAxes(2, "ep", "edp", "tp"), expert, halves=False)


class Dropping(nn.Module):
    """An expert that draws in a call, which no look at its modules would find."""

    def __init__(self, notes: list[torch.Tensor]) -> None:
        super().__init__()
        self.up, self.notes = nn.Linear(WIDTH, WIDTH), notes

    def __deepcopy__(self, _memo: Any) -> Dropping:
        return Dropping(self.notes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = nn.functional.dropout(torch.ones_like(x), 0.5, self.training)
        self.notes.append(kept.flatten()[:64] != 0)
        found: torch.Tensor = self.up(x) * kept
        return found


def drawn() -> tuple[list[list[bool]], list[float]]:
    notes: list[torch.Tensor] = []
    layer = MoE(WIDTH, Dropping(notes), EXPERTS, 2, drop_tokens=False).double()
    engine = engine_of(layer, 2)
    x = torch.randn(64, WIDTH, dtype=torch.float64, requires_grad=True)

    def forward(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = engine.module(x)[0]
        return out

    torch.manual_seed(5)
    before = forward(x)
    next_ones = torch.rand(3).tolist()
    torch.manual_seed(5)
    again = checkpoint(forward, x, use_reentrant=False)
    torch.testing.assert_close(again, before)
    first = [note.tolist() for note in notes[: EXPERTS // 2]]
    notes.clear()
    again.square().sum().backward()
    repeated = [note.tolist() for note in notes]
    gradient = x.grad.clone()
    x.grad = None
    before.square().sum().backward()
    torch.testing.assert_close(gradient, x.grad)
    engine.destroy()
    assert repeated == first
    return first, next_ones


def test_experts_that_draw_for_other_tokens_draw_apart_and_nothing_else_does() -> None:
    (first, after), (other, after_other) = run_distributed(drawn, 2)
    assert after == after_other
    assert sum(len(note) for note in first)
    assert sum(len(note) for note in other)
    assert first != other

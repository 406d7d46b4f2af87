"""Bytes on the wire, reports, biases that move, noise, capacity, and bad input."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from dense_experts import BALANCE, EXPERTS, RATE, TOKENS, WIDTH, Expert, Model, tokens
from drivetrain_moe import GroupedMLP, MoE, Routing, grouped_linear, route
from drivetrain_moe.grouped import Shape, grouped_mlp
from drivetrain_moe.plugin import MixtureOfExperts
from drivetrain_moe.utils import (
    get_expert_data_parallel_group,
    get_expert_parallel_rank,
    get_expert_parallel_world_size,
    has_moe_layers,
    is_moe_param,
    split_params_into_different_moe_groups_for_optimizer,
    split_params_into_shared_and_expert_params,
)
from torch import nn

import drivetrain
from drivetrain.contracts import Plugin, Purpose, Sections, StepReport, hookimpl
from drivetrain.contracts.plugin.section import Section
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.plan.registry import Registry
from drivetrain.testing import PluginConformance, run_distributed


class WatchingSection(Section):
    pass


class Watching(Plugin):
    """Keeps the values of reports."""

    name = "watching"
    sections: ClassVar[Sections] = {"watching": WatchingSection}
    values: ClassVar[list[dict[str, Any]]] = []

    @hookimpl
    def step_end(self, report: StepReport) -> None:
        self.values.append(dict(report.values))


CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
    "optimizer": {"type": "SGD", "params": {"lr": RATE}},
    "watching": {},
}


def registry() -> Registry:
    return Registry.installed().with_plugins(Watching)


def engine_of(model: nn.Module, **changes: Any) -> Any:
    return drivetrain.initialize(model=model, config={**CONFIG, **changes}, registry=registry())[0]


class TestPlugin(PluginConformance):
    plugin = MixtureOfExperts
    config: ClassVar[dict[str, Any]] = {"moe": {}}


# -- what travels, and what is told ----------------------------------------------------------------


def moved(kind: str) -> tuple[list[int], dict[str, Any], list[int]]:
    Watching.values.clear()
    engine = engine_of(Model(kind, 2))
    log = engine.job.byte_log
    before = log.total(Purpose.CONTROL, "ep", key="moe").payload_bytes
    x, y = tokens(0, engine.job.mesh.coordinate("dp"))
    wanted = engine.module.moe(torch.tanh(engine.module.stem(x)))[2]  # forward alone
    log.reset()
    engine.backward(engine(x, y))
    found = [
        log.total(purpose, "ep", key="moe").payload_bytes
        for purpose in (Purpose.ACTIVATION, Purpose.CONTROL)
    ]
    engine.step()
    values = Watching.values[0]
    engine.destroy()
    assert before == 0
    return found, values, wanted.tolist()


def test_bytes_are_those_of_the_rows_and_reports_tell_the_load() -> None:
    ranks = run_distributed(moved, 2, "dropless top-2")
    wanted = torch.tensor([wanted for _, _, wanted in ranks], dtype=torch.float64)
    assert wanted.sum(1).tolist() == [2 * TOKENS, 2 * TOKENS]
    own = EXPERTS // 2
    for rank, ((rows, counts), values, _) in enumerate(ranks):
        came = wanted[:, rank * own : (rank + 1) * own].sum().item()
        # There and back, in forward and in backward: this rank sends both kinds of rows twice.
        assert rows == 2 * (2 * TOKENS + came) * WIDTH * 8
        assert counts == 2 * (own + 1) * 8
        load = (wanted / wanted.sum(1, keepdim=True)).mean(0)
        assert values["moe/moe/load"] == pytest.approx(load.tolist(), rel=1e-6)
        each = wanted / wanted.sum(1, keepdim=True)
        entropy = -(torch.xlogy(each, each).sum(1) / math.log(EXPERTS)).mean()
        assert values["moe/moe/entropy"] == pytest.approx(entropy.item(), rel=1e-6)
        assert values["moe/moe/dropped"] == 0


def test_reports_tell_what_was_dropped() -> None:
    (_, values, _), _ = run_distributed(moved, 2, "top-1")
    assert values["moe/moe/dropped"] > 0


def balanced() -> tuple[list[float], list[list[float]]]:
    torch.manual_seed(0)
    layer = MoE(
        WIDTH, Expert(), EXPERTS, 2, drop_tokens=False, score="sigmoid", bias_update_rate=0.01
    )
    Watching.values.clear()
    engine = engine_of(layer.double(), optimizer={"type": "SGD", "params": {"lr": 1e-9}})
    generator = torch.Generator().manual_seed(engine.job.rank)
    x = torch.randn(200, WIDTH, generator=generator, dtype=torch.float64) + 0.5
    biases = []
    for _ in range(60):
        engine.backward(engine(x)[0].square().mean())
        engine.step()
        biases.append(layer.bias.tolist())
    loads = [values["moe/MoE/load"] for values in Watching.values]
    engine.destroy()
    assert biases[0] == pytest.approx(
        [math.copysign(0.01, 1 / EXPERTS - share) for share in loads[0]]
    )
    return biases[-1], loads


def test_a_bias_brings_experts_to_equal_load_on_all_ranks() -> None:
    (first, loads), (second, _) = run_distributed(balanced, 2)
    assert first == second
    assert max(loads[0]) > 0.35
    assert max(loads[-1]) < 0.3


# -- losses that enter by themselves ---------------------------------------------------------------


class ByHand(Model):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.stem(x))
        logits = self.moe.gate(hidden)
        z = logits.logsumexp(-1).square().mean()
        return super().forward(x, y) + 0.2 * z


class ByItself(Model):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.stem(x))
        out, balance, _ = self.moe(hidden)
        assert not balance.requires_grad
        return self.loss(hidden + out, y)


def test_losses_of_the_layer_enter_once() -> None:
    alone = ByHand("dropless top-2")
    alone(*tokens(0, 0)).backward()
    engine = engine_of(ByItself("dropless top-2", balance_loss=BALANCE, z_loss=0.2))
    before = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    engine.backward(engine(*tokens(0, 0)))
    engine.step()
    for name, parameter in alone.named_parameters():
        after = dict(engine.module.named_parameters())[name]
        torch.testing.assert_close((before[name] - after) / RATE, parameter.grad, msg=name)
    assert engine.last_report.loss == pytest.approx(alone(*tokens(0, 0)).item(), rel=1e-6)
    engine.destroy()


# -- routing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("priority", ["random", "position", "probability"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_no_expert_takes_more_than_it_has_room_for(k: int, priority: Any) -> None:
    routing = Routing(EXPERTS, k, priority=priority, capacity_factor=0.7, min_capacity=2)
    logits = torch.randn(50, EXPERTS, generator=torch.Generator().manual_seed(k))
    routed = route(logits, routing, training=True)
    counts = torch.bincount(routed.expert, minlength=EXPERTS)
    room = routing.capacity(50)
    assert room == max(math.ceil(50 / EXPERTS * 0.7 * k), 2)
    assert counts.tolist() == [min(room, n) for n in routed.wanted.tolist()]
    assert int(routed.dropped) == 50 * k - len(routed.token)
    pairs = set(zip(routed.token.tolist(), routed.expert.tolist(), strict=True))
    assert len(pairs) == len(routed.token)


def test_noise_is_drawn_in_training_only() -> None:
    logits = torch.zeros(4000, EXPERTS)
    logits[:, 0] = 1.0
    for routing in (
        Routing(EXPERTS, drops=False, noise="RSample"),
        Routing(EXPERTS, 2, drops=False, second_noise=True),
    ):
        torch.manual_seed(0)
        noisy = route(logits, routing, training=True).wanted / 4000
        plain = route(logits, routing, training=False).wanted / 4000
        assert sorted(plain.tolist())[:2] == [0, 0]
        if routing.k == 1:  # Gumbel noise draws from the softmax
            expected = logits[0].softmax(-1)
            torch.testing.assert_close(noisy, expected, rtol=0.1, atol=0.01)
        else:
            torch.testing.assert_close(noisy[1:], torch.full((3,), 1 / 3), rtol=0.1, atol=0.01)


def test_unused_tokens_are_computed_by_nobody() -> None:
    layer = MoE(WIDTH, Expert(), EXPERTS, k=2, drop_tokens=False)
    x, used = torch.randn(2, 5, WIDTH), torch.ones(2, 5)
    used[1, 3:] = 0
    out, _, counts = layer(x, used)
    assert counts.sum() == 16
    assert bool((out[1, 3:] == 0).all())
    assert bool((out[used.bool()] != 0).any(-1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_grouped_products_are_those_of_a_loop(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([3, 0, 5, 1])
    x = torch.randn(9, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(4, 16, 24, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(4, 24, generator=generator).to(dtype).requires_grad_()
    y = grouped_linear(x, weight, counts, bias)
    gradient = torch.randn(y.shape, generator=generator).to(dtype)
    got = torch.autograd.grad(y, (x, weight, bias), gradient)
    pieces = [rows @ weight[e] + bias[e] for e, rows in enumerate(torch.split(x, counts.tolist()))]
    expected = torch.cat(pieces)
    torch.testing.assert_close(y, expected)
    wanted = torch.autograd.grad(expected, (x, weight, bias), gradient)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("gated", [True, False])
def test_fused_experts_are_differentiated_twice(gated: bool) -> None:
    torch.manual_seed(0)
    experts = GroupedMLP(4, 6, 5, gated=gated, bias=True).double()
    counts = torch.tensor([3, 0, 4, 2])
    inputs = torch.randn(9, 6, dtype=torch.float64, requires_grad=True), *experts.parameters()
    assert torch.autograd.gradgradcheck(lambda x, *_: experts(x, counts), inputs)


def test_gradients_to_be_differentiated_again_are_counted_once_where_inputs_hang_together() -> None:
    generator = torch.Generator().manual_seed(0)
    x, counts = torch.randn(6, 4, dtype=torch.float64, generator=generator), torch.tensor([4, 2])
    up = torch.randn(2, 4, 4, dtype=torch.float64, generator=generator)
    x.requires_grad_()
    up.requires_grad_()
    shape = Shape("silu", gated=False)
    inputs = (x, up)
    y = grouped_mlp(x, up * x.sum(), up, counts, shape)  # one is made of x, and both of one tensor
    once = torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)
    again = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    pieces = [
        nn.functional.silu(rows @ (up[e] * x.sum())) @ up[e]
        for e, rows in enumerate(torch.split(x, counts.tolist()))
    ]
    expected = torch.autograd.grad(torch.cat(pieces).square().sum(), inputs, create_graph=True)
    for one, other, right in zip(once, again, expected, strict=True):
        torch.testing.assert_close(one, right)
        torch.testing.assert_close(other, right)
    second, right = (
        torch.autograd.grad(sum(g.sum() for g in of), x)[0] for of in (again, expected)
    )
    torch.testing.assert_close(second, right)


# -- scripts ---------------------------------------------------------------------------------------


def ask() -> list[Any]:
    engine = engine_of(Model("top-1", 2))
    shared, experts = split_params_into_shared_and_expert_params(engine.module.parameters())
    group = {"params": experts, "lr": 0.1}
    found = [
        has_moe_layers(engine.module),
        get_expert_parallel_world_size("ep_size_2"),
        get_expert_parallel_rank("ep_size_2"),
        all(is_moe_param(p) for p in experts),
        any(is_moe_param(p) for p in shared),
        len(experts),
        split_params_into_different_moe_groups_for_optimizer(group) == [group],
        get_expert_data_parallel_group("ep_size_2") is not None,
    ]
    with pytest.raises(ConfigError, match="no expert group 'ep_size_3'; known: ep_size_1, ep_size"):
        get_expert_parallel_rank("ep_size_3")
    engine.destroy()
    return found


def test_functions_of_scripts_tell_experts_from_the_rest() -> None:
    for rank, found in enumerate(run_distributed(ask, 2)):
        assert found[:7] == [(True, EXPERTS), 2, rank, True, False, 4 * EXPERTS // 2, True]


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 5}, "k = 5 is not from 1 to num_experts = 4"),
        ({"ep_size": 3}, "4 experts do not divide by ep_size 3"),
        ({"noisy_gate_policy": "Loud"}, "noisy_gate_policy 'Loud' is not 'Jitter' or 'RSample'"),
        ({"capacity_factor": 0.0}, "capacity_factor 0.0 leaves no room for a token"),
        ({"min_capacity": 0}, "min_capacity 0 is below one token"),
        ({"groups": (3, 1)}, "4 experts do not divide by 3 groups"),
        ({"groups": (2, 1), "k": 3}, "k = 3 experts are not in 1 groups of 2"),
        ({"enable_expert_tensor_parallelism": True}, "an expert is whole on a rank"),
        ({"bias_update_rate": 0.1}, "bias_update_rate is for score='sigmoid'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MoE(WIDTH, Expert(), EXPERTS, **changes)
    assert message in str(caught.value)


def test_fused_experts_of_another_number_are_refused() -> None:
    with pytest.raises(ConfigError, match="the GroupedMLP has 2 experts, num_experts is 4"):
        MoE(WIDTH, GroupedMLP(2, WIDTH, 8), EXPERTS)
    with pytest.raises(ConfigError, match="activation 'swish' of experts is not one of gelu"):
        GroupedMLP(2, WIDTH, 8, activation="swish")


def test_logits_that_are_not_finite_name_the_layer() -> None:
    engine = engine_of(Model("top-1"))
    with pytest.raises(TrainingError, match="router of moe has logits that are not finite"):
        engine(torch.full((3, 3), float("nan"), dtype=torch.float64), torch.zeros(3).double())
    engine.destroy()


def test_ranks_that_do_not_nest_are_refused_with_the_arithmetic() -> None:
    with pytest.raises(ConfigError, match=r"moe.ep_size: ep 3 does not nest in sp 1 x dp 4 = 4"):
        drivetrain.Plan.build({"train_batch_size": 4, "moe": {"ep_size": 3}}, world_size=4)
    config = {"train_batch_size": 4, "moe": {}, "use_data_before_expert_parallelism": True}
    with pytest.raises(ConfigError, match="must be false: ranks that share out experts are neigh"):
        drivetrain.Plan.build(config)


def of_plans_without_the_model(sections: list[dict[str, Any]]) -> list[str]:
    said = []
    for own in sections:
        plan = drivetrain.Plan.build({**CONFIG, **own}, registry=registry())
        with drivetrain.Job.open(plan) as job:
            try:
                job.engine(Model("dropless top-1", 2)).destroy()
            except ConfigError as error:
                said.append(str(error))
            else:
                said.append("")
    return said


def test_a_plan_without_the_model_says_how_many_ranks_to_write_into_the_config() -> None:
    off = {"expert_parallel": {"enabled": False, "autoep_size": 2}}
    sections = [{"moe": {}}, {"moe": {"ep_size": 2}, **off}, {"moe": {"ep_size": 1}, **off}]
    for refused, *others in run_distributed(of_plans_without_the_model, 2, sections):
        assert refused.startswith("moe has ep_size = 2, and the mesh has no axis of so many ranks")
        assert '"moe": {"ep_size": 2}' in refused
        assert others == ["", ""]

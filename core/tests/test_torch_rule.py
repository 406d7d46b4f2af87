"""Every elementwise torch optimizer, run over flat buckets, is the optimizer itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from drivetrain.errors import ConfigError, TrainingError
from drivetrain.optimization import spans as spans_module
from drivetrain.optimization import torch_rule
from drivetrain.optimization.factory import TorchRule, rule_from_optimizer
from drivetrain.testing.rules import place

SHAPES = {"a": (7, 5), "b": (3,), "c": (), "d": (40, 31)}
SIZES = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
NUMEL = sum(SIZES.values())

CASES = [
    ("ASGD", {}),
    ("ASGD", {"t0": 3, "lambd": 0.1, "weight_decay": 0.1}),
    ("Adadelta", {"weight_decay": 0.1}),
    ("Adagrad", {"lr_decay": 0.1}),
    ("Adagrad", {"initial_accumulator_value": 0.5, "weight_decay": 0.1}),
    ("Adam", {"weight_decay": 0.1}),
    ("Adam", {"amsgrad": True, "maximize": True}),
    ("AdamW", {"betas": (0.5, 0.7)}),
    ("AdamW", {"foreach": True}),
    ("AdamW", {"fused": False}),
    ("Adamax", {}),
    ("NAdam", {}),
    ("RAdam", {"lr": 0.1}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("Rprop", {"lr": 0.003}),
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "dampening": 0.3}),
]


def home_of(rule, *, dtype=torch.float32, originals, **dtypes):
    """A home over one bucket of all shapes with three elements of padding."""
    pieces = originals[:NUMEL].split(list(SIZES.values()))
    tensors = {
        name: piece.view(shape) for (name, shape), piece in zip(SHAPES.items(), pieces, strict=True)
    }
    home, flat, _ = place(rule, tensors, master_dtype=dtype, **dtypes)
    return home, flat


def numbers(seed, dtype=torch.float32):
    """Random numbers and zeros for the padding."""
    values = torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed))
    return torch.cat([values, torch.zeros(3)]).to(dtype)


def parameters_of(flat):
    pieces = flat[:NUMEL].split(list(SIZES.values()))
    return [
        nn.Parameter(piece.clone().view(shape))
        for piece, shape in zip(pieces, SHAPES.values(), strict=True)
    ]


def step_reference(optimizer, parameters, flat_gradient):
    for parameter, piece in zip(
        parameters, flat_gradient[:NUMEL].split(list(SIZES.values())), strict=True
    ):
        parameter.grad = piece.clone().view_as(parameter)
    optimizer.step()


def flat_of(parameters):
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def tolerance(dtype):
    return {"rtol": 2e-6, "atol": 2e-7} if dtype == torch.float32 else {"rtol": 1e-13, "atol": 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("name", "params"), CASES)
def test_ten_steps_equal_the_class_on_separate_parameters(name, params, dtype):
    kind = getattr(torch.optim, name)
    start = numbers(0, dtype)
    parameters = parameters_of(start)
    reference = kind(parameters, **params)
    rule = TorchRule(kind, params)
    home, flat = home_of(rule, dtype=dtype, originals=start)
    hyper = dict(rule.defaults)
    for step in range(10):
        # A schedule at work: what the rule reads must be the live values.
        hyper["lr"] = reference.param_groups[0]["lr"] = rule.defaults["lr"] * (1 - step / 20)
        gradient = numbers(step + 1, dtype)
        step_reference(reference, parameters, gradient)
        home.update(gradient, hyper, 1.0)
    assert not torch.equal(flat, start)
    torch.testing.assert_close(flat[:NUMEL], flat_of(parameters), **tolerance(dtype))


@pytest.mark.parametrize("scale", [0.25, 1 / 3, torch.tensor(0.3)], ids=["1/4", "1/3", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", ["Adam", "SGD", "Adagrad", "RMSprop", "Rprop"])
def test_scale_is_a_factor_of_the_gradient(name, dtype, scale):
    kind = getattr(torch.optim, name)
    # A large eps: otherwise Adam and Adagrad do not feel a scale.
    params = {"eps": 1.0} if name in ("Adam", "Adagrad", "RMSprop") else {}
    start = numbers(0, dtype)
    parameters = parameters_of(start)
    reference = kind(parameters, **params)
    rule = TorchRule(kind, params)
    home, flat = home_of(rule, dtype=dtype, originals=start)
    for step in range(4):
        gradient = numbers(step + 1, dtype)
        step_reference(reference, parameters, gradient * float(scale))
        home.update(gradient, rule.defaults, scale)
    torch.testing.assert_close(flat[:NUMEL], flat_of(parameters), **tolerance(dtype))


def test_a_power_of_two_scale_changes_no_bit():
    rule = TorchRule(torch.optim.AdamW, {"weight_decay": 0.1})
    start = numbers(0)
    (one, one_flat), (two, two_flat) = (home_of(rule, originals=start) for _ in range(2))
    for step in range(5):
        one.update(numbers(step), rule.defaults, 1.0)
        two.update(numbers(step) * 1024, rule.defaults, 1 / 1024)
    assert torch.equal(one_flat, two_flat)


@pytest.mark.parametrize(("name", "params"), [("AdamW", {}), ("RMSprop", {}), ("SGD", {"lr": 0.1})])
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
def test_low_precision_parameters_are_the_rounded_masters(name, params, gradient_dtype):
    kind = getattr(torch.optim, name)
    start = numbers(0)
    parameters = parameters_of(start)
    reference = kind(parameters, **params)
    rule = TorchRule(kind, params)
    home, flat = home_of(
        rule,
        parameter_dtype=torch.bfloat16,
        gradient_dtype=gradient_dtype,
        originals=start,
    )
    for step in range(5):
        gradient = numbers(step + 1, gradient_dtype)
        step_reference(reference, parameters, gradient.float() * 0.3)
        home.update(gradient, rule.defaults, 0.3)
    masters = flat_of(parameters)
    torch.testing.assert_close(
        home.states.tensors["master"][:NUMEL], masters, **tolerance(torch.float32)
    )
    assert torch.equal(flat, home.states.tensors["master"].bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["AdamW", "RMSprop", "NAdam"])
def test_narrow_masters_with_wide_states_compute_in_fp32(name, dtype):
    rule = TorchRule(getattr(torch.optim, name), {"lr": 0.01}, state_dtype=torch.float32)
    start = numbers(0, dtype)
    home, flat = home_of(rule, dtype=dtype, originals=start)
    weights = nn.Parameter(start.float())
    reference = getattr(torch.optim, name)([weights], lr=0.01)
    for step in range(5):
        gradient = numbers(step + 1, dtype)
        weights.grad = gradient.float() * 0.3
        reference.step()
        weights.data = weights.data.to(dtype).float()
        home.update(gradient, rule.defaults, 0.3)
    assert all(state.dtype == torch.float32 for state in home.states.tensors.values())
    # One rounding may fall to the other side where the fp32 results differ in the last bit.
    torch.testing.assert_close(flat.float(), weights.data, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert (flat.float() != weights.data).float().mean() < 0.01


def test_narrow_states_are_rounded_once_per_step():
    rule = TorchRule(torch.optim.AdamW, {"lr": 0.01}, state_dtype=torch.bfloat16)
    start, gradient = numbers(0), numbers(1)
    home, _ = home_of(rule, originals=start)
    for _ in range(2):
        home.update(gradient.clone(), rule.defaults, 1.0)
    first = (0.1 * gradient.double()).bfloat16()
    second = (0.9 * first.double() + 0.1 * gradient.double()).bfloat16()
    torch.testing.assert_close(home.states.tensors["exp_avg"], second, rtol=2**-7, atol=0)
    assert (home.states.tensors["exp_avg"] != second).float().mean() < 0.01


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "Rprop", "ASGD"])
def test_states_cut_into_spans_give_the_same_weights(name, monkeypatch):
    rule = TorchRule(getattr(torch.optim, name), {"fused": False} if name == "AdamW" else {})
    start = numbers(0)
    results = []
    for size in (1 << 20, 100):
        monkeypatch.setattr(torch_rule, "span_size", lambda device, size=size: size)
        home, flat = home_of(rule, originals=start)
        for step in range(4):
            home.update(numbers(step), rule.defaults, 0.5)
        results.append(flat)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
    assert spans_module.span_size(torch.device("cpu")) >= 1 << 16


@pytest.mark.parametrize(("name", "params"), CASES)
def test_states_saved_in_the_middle_and_restored_change_nothing(name, params):
    rule = TorchRule(getattr(torch.optim, name), params)
    start = numbers(0)
    straight, straight_flat = home_of(rule, originals=start)
    for step in range(10):
        straight.update(numbers(step), rule.defaults, 1.0)
        if step == 4:
            saved = {(f.name, f.kind): f.read().clone() for f in straight.fragments()}
            weights = straight_flat.clone()
    again = TorchRule(getattr(torch.optim, name), params)
    resumed, resumed_flat = home_of(again, originals=weights)
    resumed.step = 5
    for fragment in resumed.fragments():
        fragment.write(saved[fragment.name, fragment.kind])
    for step in range(5, 10):
        resumed.update(numbers(step), again.defaults, 1.0)
    assert torch.equal(resumed_flat[:NUMEL], straight_flat[:NUMEL])


def test_every_state_belongs_to_parameters_so_it_survives_another_layout():
    for name, params in CASES:
        rule = TorchRule(getattr(torch.optim, name), params)
        assert all(state.numel is None for state in rule.states(None))


def test_adam_without_bias_correction():
    rule = TorchRule(torch.optim.Adam, {"lr": 0.1, "eps": 0.5}, bias_correction=False)
    start = numbers(0, torch.float64)
    home, flat = home_of(rule, dtype=torch.float64, originals=start)
    expected, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(3):
        gradient = numbers(step + 1, torch.float64)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        expected -= 0.1 * mean / (square.sqrt() + 0.5)
        home.update(gradient, rule.defaults, 1.0)
    torch.testing.assert_close(flat, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_classes_with_a_fused_kernel_use_it(name, monkeypatch):
    rule = TorchRule(getattr(torch.optim, name))
    home, _ = home_of(rule, originals=numbers(0))
    home.update(numbers(1), rule.defaults, 1.0)  # finds out what is fused
    used = []
    step = torch_rule.inner_step

    def spy(template, hyper, *args, **kwargs):
        used.append((hyper["fused"], kwargs["grad_scale"].item()))
        return step(template, hyper, *args, **kwargs)

    monkeypatch.setattr(torch_rule, "inner_step", spy)
    home.update(numbers(1), rule.defaults, 0.25)
    assert used == [(True, 4.0)]


class Counters(torch.optim.Optimizer):
    """Keeps single numbers in the ways of third-party classes, and slows down by them."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(turns=0, rate=1.0, seen=torch.full((1,), 3.0))
                p.sub_(
                    p.grad * (group["lr"] * state["rate"] / (state["turns"] + state["seen"].item()))
                )
                state["turns"] += 1
                state["rate"] *= 0.5
                state["seen"] += 2


def test_single_numbers_are_kept_as_the_class_has_them():
    start = numbers(0, torch.float64)
    parameters = parameters_of(start)
    reference = Counters(parameters)
    rule = TorchRule(Counters)
    home, flat = home_of(rule, dtype=torch.float64, originals=start)
    for step in range(6):
        if step == 3:  # go on from what is saved
            saved = {(f.name, f.kind): f.read().clone() for f in home.fragments()}
            home, flat = home_of(rule, dtype=torch.float64, originals=flat.clone())
            home.step = 3
            for fragment in home.fragments():
                fragment.write(saved[fragment.name, fragment.kind])
        step_reference(reference, parameters, numbers(step + 1, torch.float64))
        home.update(numbers(step + 1, torch.float64), rule.defaults, 1.0)
    torch.testing.assert_close(flat[:NUMEL], flat_of(parameters), rtol=1e-13, atol=0)


class GradScaleIgnored(torch.optim.SGD):
    """Says that it is fused, and does not divide by ``grad_scale``."""

    def step(self, closure=None):
        self.grad_scale = None
        return super().step(closure)


def test_a_fused_class_that_ignores_the_scale_gets_scaled_gradients():
    rule = TorchRule(GradScaleIgnored, {"lr": 0.5})
    home, flat = home_of(rule, originals=torch.zeros(NUMEL + 3))
    home.update(torch.ones(NUMEL + 3), rule.defaults, 0.5)
    assert torch.equal(flat, torch.full_like(flat, -0.25))


class RowNorm(torch.optim.Optimizer):
    """Elementwise on vectors, but normalises the rows of matrices."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                grad = p.grad if p.ndim < 2 else p.grad / p.grad.norm(dim=1, keepdim=True)
                p.add_(grad, alpha=-group["lr"])


class GroupCounter(torch.optim.SGD):
    """Counts its steps in the group, where a rule would lose the count."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
        return super().step(closure)


class SelfCounter(torch.optim.SGD):
    """Counts its steps in an attribute."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)


class ListState(torch.optim.SGD):
    """Keeps a state that no bucket can hold."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["history"] = [p.grad.norm()]
        return super().step(closure)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (torch.optim.LBFGS, "LBFGS cannot update flat parts.*closure"),
        (torch.optim.Adafactor, "Adafactor is not elementwise"),
        (torch.optim.Muon, "Muon cannot update flat parts.*2D"),
        (torch.optim.SparseAdam, "SparseAdam cannot update flat parts.*dense gradients"),
        (RowNorm, "RowNorm is not elementwise"),
        (GroupCounter, "GroupCounter cannot update flat parts.*in its param_groups"),
        (SelfCounter, "SelfCounter cannot update flat parts.*in its own attributes"),
        (ListState, "ListState keeps a state 'history' that is neither elementwise.*list"),
    ],
)
def test_a_class_that_cannot_run_on_flat_buckets_is_refused_by_name(kind, reason):
    with pytest.raises(ConfigError, match=reason):
        TorchRule(kind)


def test_a_clients_optimizer_becomes_a_rule_over_its_own_groups():
    parameters = parameters_of(numbers(0))
    client = torch.optim.SGD(
        [{"params": parameters[:2]}, {"params": parameters[2:], "momentum": 0.9}], lr=0.1
    )
    torch.optim.lr_scheduler.StepLR(client, 1)  # wraps client.step, which must not run
    plan = rule_from_optimizer(client)
    assert all(
        mine is theirs for mine, theirs in zip(plan.groups, client.param_groups, strict=True)
    )
    assert [state.name for state in plan.rule.states(None)] == ["momentum_buffer"]
    home, flat = home_of(plan.rule, originals=numbers(0))
    for step in range(3):
        home.update(numbers(step), plan.groups[1], 1.0)
    expected = parameters_of(numbers(0))
    reference = torch.optim.SGD(expected, lr=0.1, momentum=0.9)
    for step in range(3):
        step_reference(reference, expected, numbers(step))
    torch.testing.assert_close(flat[:NUMEL], flat_of(expected), **tolerance(torch.float32))
    assert torch.equal(flat_of(parameters), numbers(0)[:NUMEL])


class Unusual(torch.optim.SGD):
    """A client's class whose constructor takes other arguments than its defaults are called."""

    def __init__(self, model, speed):
        super().__init__(model.parameters(), lr=speed)


def test_a_clients_optimizer_is_never_constructed_again():
    plan = rule_from_optimizer(Unusual(nn.Linear(2, 2), speed=0.5))
    home, flat = home_of(plan.rule, originals=torch.zeros(NUMEL + 3))
    home.update(torch.ones(NUMEL + 3), plan.groups[0], 1.0)
    assert torch.equal(flat, torch.full_like(flat, -0.5))


def test_an_optimizer_that_has_taken_steps_is_refused():
    weights = nn.Parameter(torch.zeros(2))
    client = torch.optim.AdamW([weights])
    weights.grad = torch.ones(2)
    client.step()
    with pytest.raises(ConfigError, match="AdamW already holds states of 1 parameters"):
        rule_from_optimizer(client)
    rule_from_optimizer(torch.optim.Adagrad([weights]))  # makes its state in the constructor


def test_hyper_parameters_that_need_a_new_state_are_an_error_not_a_wrong_step():
    rule = TorchRule(torch.optim.SGD)
    home, _ = home_of(rule, originals=numbers(0))
    with pytest.raises(TrainingError, match=r"b0.*SGD keep a state 'momentum_buffer'"):
        home.update(numbers(1), {**rule.defaults, "momentum": 0.9}, 1.0)


def test_probing_leaves_the_clients_optimizer_and_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    client = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    rule_from_optimizer(client)
    assert torch.equal(torch.get_rng_state(), before)
    assert not client.state
    assert torch.equal(client.param_groups[0]["params"][0], torch.ones(2))


def test_updates_from_several_threads_do_not_mix():
    from concurrent.futures import ThreadPoolExecutor

    rule = TorchRule(torch.optim.AdamW)

    def train(seed):
        home, flat = home_of(rule, originals=numbers(seed))
        for step in range(30):
            home.update(numbers(seed + step), rule.defaults, 0.5)
        return flat

    alone = [train(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(train, range(4)))
    assert all(torch.equal(x, y) for x, y in zip(alone, together, strict=True))

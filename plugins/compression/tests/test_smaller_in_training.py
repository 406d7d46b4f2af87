"""Each method in training against a plain loop in which the weight is changed by hand."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compressed_models import Net, batches, group, method, net, quantised, straight
from drivetrain_compression.quantisers import integer
from drivetrain_compression.training.chain import chain_of
from drivetrain_compression.training.schedule import BitSchedule
from torch import nn
from torch.func import functional_call

import drivetrain
from drivetrain.errors import ConfigError

STEPS = 6
BASE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "SGD", "params": {"lr": 0.3}},
    "gradient_clipping": 0.0,
}

Change = Callable[[int, str, torch.Tensor, nn.Module], torch.Tensor]


def engine_of(section: dict[str, Any], model: nn.Module | None = None, **more: Any) -> Any:
    config = {**BASE, "compression_training": section, **more}
    return drivetrain.initialize(model=model or net(), config=config)[0]


def train(engine: Any, steps: int = STEPS) -> list[float]:
    losses = []
    for tokens, targets in batches(steps):
        loss = engine(tokens, targets)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def plain(model: Net, change: Change, steps: int = STEPS) -> list[float]:
    """Train with ``change(step, name, parameter, model)`` in place of each parameter."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for step, (tokens, targets) in enumerate(batches(steps)):
        shown = {n: change(step, n, p, model) for n, p in model.named_parameters()}
        loss = functional_call(model, shown, (tokens, targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def compare(section: dict[str, Any], change: Change, **more: Any) -> Any:
    engine, reference = engine_of(section, **more), net()
    assert train(engine) == pytest.approx(plain(reference, change), rel=1e-12)
    for name, value in reference.state_dict().items():
        found = engine.module.state_dict()[name]
        torch.testing.assert_close(found, value, rtol=1e-11, atol=1e-13)
    return engine


def bits_by_step(start: int, target: int, period: int, offset: int) -> list[int | None]:
    """Bits at each step, by the rule as it is written down."""
    found: list[int | None] = []
    bits, calls = start, 0
    for step in range(STEPS):
        if step < offset:
            found.append(None)
            continue
        calls += 1
        if bits != target and calls >= period:
            bits, period = bits - 1, 2 * period
        found.append(bits)
    return found


@pytest.mark.parametrize(
    ("kind", "start", "target", "period", "offset", "groups"),
    [
        ("symmetric", 8, 8, 1, 0, 1),
        ("asymmetric", 6, 3, 1, 0, 4),
        ("symmetric", 4, 1, 1, 0, 8),
        ("symmetric", 5, 2, 2, 2, 2),
        ("symmetric", 2, 1, 3, 1, 1),
    ],
)
def test_weights_are_quantised_in_forward_by_the_schedule(
    kind: str, start: int, target: int, period: int, offset: int, groups: int
) -> None:
    bits = bits_by_step(start, target, period, offset)
    shared = {"schedule_offset": offset, "quantization_type": kind, "quantize_groups": groups}
    params = {"start_bits": start, "target_bits": target, "quantization_period": period}
    section = {"weight_quantization": method(shared, {"g": group(["up", "embed"], **params)})}

    def change(step: int, name: str, weight: torch.Tensor, model: nn.Module) -> torch.Tensor:
        now = bits[step]
        if now is None or not ("up.weight" in name or "embed" in name):
            return weight
        return quantised(weight, now, 12 if "embed" in name else groups, kind)

    compare(section, change)


def test_exact_weights_are_mixed_in_at_a_falling_share() -> None:
    mixed = {"enabled": True, "quantize_change_ratio": 0.3}
    params = {"start_bits": 5, "target_bits": 4, "quantization_period": 3}
    section = {
        "weight_quantization": method(
            {"fp16_mixed_quantize": mixed}, {"g": group(["up"], **params)}
        )
    }
    # 1 less 0.3 each step; begun again when bits fall, in the third; then nothing is left
    shares = [0.7, 0.4, 1.0, 0.7, 0.4, 0.1]

    def change(step: int, name: str, weight: torch.Tensor, model: nn.Module) -> torch.Tensor:
        if "up.weight" not in name:
            return weight
        changed = integer.symmetric(weight.detach().reshape(1, -1), 5 if step < 2 else 4)
        share = shares[step]
        return straight(weight, share * weight + (1 - share) * changed.view(weight.shape))

    compare(section, change)


def test_bits_fall_when_periods_are_over_and_periods_double() -> None:
    schedule = BitSchedule(8, 5, 3)
    seen = []
    for _ in range(14):
        schedule.advance()
        seen.append(schedule.bits)
    assert seen == [8, 8, 7, 7, 7, 6, 6, 6, 6, 6, 6, 5, 5, 5]
    slow = BitSchedule(8, 5, 2)
    slow.advance(5)
    slow.advance(5)
    assert (slow.bits, slow.period) == (7, 20)


def largest(scores: torch.Tensor, ratio: float) -> torch.Tensor:
    """The kept ones, found one by one."""
    flat = scores.flatten().tolist()
    ranked = sorted(range(len(flat)), key=lambda i: (-flat[i], i))
    kept = set(ranked[: math.ceil(ratio * len(flat))])
    return torch.tensor([float(i in kept) for i in range(len(flat))]).view(scores.shape).double()


def test_small_weights_are_left_out_from_the_offset_on() -> None:
    section = {
        "sparse_pruning": method({"schedule_offset": 2}, {"g": group(["down"], dense_ratio=0.3)})
    }
    masks: dict[str, torch.Tensor] = {}

    def change(step: int, name: str, weight: torch.Tensor, model: nn.Module) -> torch.Tensor:
        if "down.weight" not in name or step < 2:
            return weight
        masks.setdefault(name, largest(weight.detach().abs(), 0.3))
        return weight * masks[name]

    compare(section, change)
    assert len(masks) == 2


def test_rows_are_left_out_with_their_bias() -> None:
    section = {"row_pruning": method({"schedule_offset": 1}, {"g": group(["up"], dense_ratio=0.5)})}
    masks: dict[str, torch.Tensor] = {}

    def change(step: int, name: str, weight: torch.Tensor, model: nn.Module) -> torch.Tensor:
        if ".up." not in name or step < 1:
            return weight
        prefix = name.rpartition(".")[0]
        own = model.get_submodule(prefix).weight
        masks.setdefault(prefix, largest(own.detach().abs().sum(1), 0.5))
        mask = masks[prefix]
        return weight * (mask[:, None] if weight.dim() == 2 else mask)

    compare(section, change)


@pytest.mark.parametrize("key", ["sparse_pruning", "row_pruning", "head_pruning"])
def test_learned_scores_get_the_gradient_of_the_mask_that_they_make(key: str) -> None:
    modules = {"sparse_pruning": "down", "row_pruning": "up", "head_pruning": "output"}[key]
    shared: dict[str, Any] = {"method": "topk", "schedule_offset": 0}
    if key == "head_pruning":
        shared["num_heads"] = 2
    section = {key: method(shared, {"g": group([modules], dense_ratio=0.5)})}
    engine = engine_of(section)
    names = [n for n, _ in engine.module.named_parameters() if "scores" in n]
    assert len(names) == 2
    reference = net()
    scores = {n: p.detach().clone() for n, p in engine.module.named_parameters() if n in names}
    tokens, targets = batches(1)[0]
    shown, leaves = {}, {}
    for n, p in reference.named_parameters():
        prefix, _, kind = n.rpartition(".")
        own = next((s for s in scores if s.rpartition(".")[0] == prefix), None)
        if own is None or (kind == "bias" and key != "row_pruning"):
            shown[n] = p
            continue
        leaf = leaves.setdefault(own, scores[own].clone().requires_grad_())
        mask = straight(leaf, largest(scores[own], 0.5).view(scores[own].shape))
        if key == "head_pruning":
            mask = mask.repeat_interleave(4, dim=1)
        shown[n] = p * (mask.view(-1) if kind == "bias" else mask)
    loss = functional_call(reference, shown, (tokens, targets))
    loss.backward()
    found = engine(tokens, targets)
    engine.backward(found)
    assert found.item() == pytest.approx(loss.item(), rel=1e-13)
    engine.step()
    for n, p in engine.module.named_parameters():
        before = scores[n] if n in scores else dict(net().named_parameters())[n]
        wanted = leaves[n].grad if n in leaves else dict(reference.named_parameters())[n].grad
        torch.testing.assert_close(
            p.detach(), (before - 0.3 * wanted).detach(), rtol=1e-11, atol=1e-13
        )


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_inputs_are_quantised_by_token_and_pass_gradients(kind: str) -> None:
    shared = {"quantization_type": kind, "schedule_offset": 0}
    section = {"activation_quantization": method(shared, {"g": group(["up"], bits=4)})}
    engine, reference = engine_of(section), net()
    for layer in reference.layers:
        layer.up.register_forward_pre_hook(
            lambda _m, args: straight(args[0], getattr(integer, kind)(args[0].detach(), 4))
        )
    assert train(engine) == pytest.approx(plain(reference, lambda _s, _n, w, _m: w), rel=1e-12)


def test_a_static_range_runs_behind_and_stays_in_evaluation() -> None:
    shared = {"range_calibration": "static", "schedule_offset": 0}
    section = {"activation_quantization": method(shared, {"g": group(["up"], bits=8)})}
    engine, reference = engine_of(section), net()
    ranges: dict[int, list[float]] = {}
    seen: dict[int, list[float]] = {}

    def hook(number: int) -> Callable[[Any, Any], torch.Tensor]:
        def change(_module: nn.Module, args: Any) -> torch.Tensor:
            x = args[0]
            seen[number] = [x.min().item(), x.max().item()]
            low, high = ranges.get(number, seen[number])
            scale = 2 * max(abs(low), high) / 2**8
            return straight(x, scale * (x / scale).round().clamp(-128, 127))

        return change

    for number, layer in enumerate(reference.layers):
        layer.up.register_forward_pre_hook(hook(number))

    def after_step(step: int, name: str, weight: torch.Tensor, model: nn.Module) -> torch.Tensor:
        if step and name == "embed.weight":
            for number, new in seen.items():
                old = ranges.get(number, new)
                ranges[number] = [0.95 * a + 0.05 * b for a, b in zip(old, new, strict=True)]
        return weight

    assert train(engine) == pytest.approx(plain(reference, after_step), rel=1e-6)
    engine.eval()
    before = [
        m.activation_range.clone()
        for m in engine.module.modules()
        if hasattr(m, "activation_range")
    ]
    engine(*batches(1)[0])
    after = [m.activation_range for m in engine.module.modules() if hasattr(m, "activation_range")]
    assert len(after) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def everything() -> dict[str, Any]:
    bits = {"start_bits": 8, "target_bits": 3, "quantization_period": 2}
    return {
        "weight_quantization": method(
            {"schedule_offset": 1, "rounding": "stochastic"}, {"g": group(["query", "up"], **bits)}
        ),
        "activation_quantization": method(
            {"schedule_offset": 0, "range_calibration": "static"}, {"g": group(["up"], bits=8)}
        ),
        "sparse_pruning": method({"schedule_offset": 2}, {"g": group(["query"], dense_ratio=0.4)}),
        "row_pruning": method(
            {"schedule_offset": 3, "method": "topk"}, {"g": group(["up"], dense_ratio=0.5)}
        ),
    }


@pytest.mark.parametrize("at", [2, 4])
def test_a_resumed_run_goes_on_bit_for_bit(at: int, tmp_path: Any) -> None:
    straight_on = engine_of(everything())
    losses = train(straight_on)
    first = engine_of(everything())
    assert train(first, at) == losses[:at]
    first.save_checkpoint(str(tmp_path))
    second = engine_of(everything())
    second.load_checkpoint(str(tmp_path))
    found = []
    for tokens, targets in batches(STEPS)[at:]:
        loss = second(tokens, targets)
        second.backward(loss)
        second.step()
        found.append(loss.item())
    assert found == losses[at:]
    for (name, a), b in zip(
        straight_on.module.state_dict().items(), second.module.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_checkpoint_of_other_modifiers_is_refused(tmp_path: Any) -> None:
    from drivetrain.errors import CheckpointError

    engine = engine_of(everything())
    train(engine, 1)
    engine.save_checkpoint(str(tmp_path))
    section = everything()
    del section["row_pruning"]
    other = engine_of(section)
    with pytest.raises(CheckpointError):
        other.load_checkpoint(str(tmp_path))


def test_backward_makes_the_weight_again_and_keeps_no_copy_of_it() -> None:
    bits = {"start_bits": 8, "target_bits": 8}
    engine = engine_of({"weight_quantization": method({}, {"g": group(["up"], **bits)})})
    up = engine.module.layers[0].up
    engine(*batches(1)[0])  # begins
    chain, made = chain_of(up), []
    value = chain.value

    def watched(module: nn.Module, name: str) -> Any:
        found = value(module, name)
        if name == "weight":
            made.append(weakref.ref(found))
        return found

    chain.value = watched
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    out = up(x)
    assert [ref() for ref in made] == [None]
    wanted = quantised(up.weight, 8)
    (found,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(found, wanted.detach().sum(0).expand(3, -1), rtol=1e-12, atol=0)
    assert len(made) == 2


def test_gradients_of_gradients_pass_a_quantised_layer() -> None:
    bits = {"start_bits": 4, "target_bits": 4}
    engine = engine_of({"weight_quantization": method({}, {"g": group(["up"], **bits)})})
    engine(*batches(1)[0])
    up = engine.module.layers[0].up
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    def second(call: Callable[[torch.Tensor], torch.Tensor], weight: Any) -> torch.Tensor:
        (first,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        (found,) = torch.autograd.grad(first.square().sum(), weight)
        return found

    weight = up.weight
    expected = second(
        lambda v: torch.nn.functional.linear(v, quantised(weight, 4), up.bias), weight
    )
    torch.testing.assert_close(second(up, weight), expected, rtol=1e-11, atol=1e-12)


def test_a_weight_that_changed_before_backward_is_refused() -> None:
    from drivetrain.errors import TrainingError

    bits = {"start_bits": 8, "target_bits": 8}
    engine = engine_of({"weight_quantization": method({}, {"g": group(["up"], **bits)})})
    engine(*batches(1)[0])
    up = engine.module.layers[0].up
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    out = up(x)
    with torch.no_grad():
        up.weight.add_(1)
    with pytest.raises(
        TrainingError, match="changed in place between its forward and its backward"
    ):
        out.sum().backward()


def test_compressed_modules_are_copied_and_stay_what_they_were() -> None:
    engine = engine_of(everything())
    train(engine, 4)
    model = engine.module
    assert isinstance(model.layers[0].up, nn.Linear)
    copied = copy.deepcopy(model)
    tokens, targets = batches(1)[0]
    model.eval()
    copied.eval()
    wanted = model(tokens, targets)
    assert torch.equal(copied(tokens, targets), wanted)
    with torch.no_grad():
        copied.layers[0].up.weight.zero_()
    assert not torch.equal(copied(tokens, targets), wanted)
    assert torch.equal(model(tokens, targets), wanted)


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"weight_quantization": method({}, {"g": group(["upp"], start_bits=8, target_bits=8)})},
        r"compression_training.weight_quantization.different_groups.g: no Linear .* 'upp'",
    ),
    (
        {"weight_quantization": method({}, {"g": group(["up"], start_bits=17, target_bits=8)})},
        r"different_groups.g: start_bits is 17; there are formats of 1 to 16 bits",
    ),
    (
        {"weight_quantization": method({}, {"g": group(["up"], start_bits=4, target_bits=8)})},
        "target_bits 8 are more than start_bits 4",
    ),
    (
        {
            "weight_quantization": method(
                {"rounding": "stochastic"}, {"g": group(["up"], start_bits=4, target_bits=2)}
            )
        },
        r"2 bits \(ternary, binary\) are symmetric and rounded to nearest",
    ),
    (
        {
            "weight_quantization": method(
                {"quantize_groups": 7}, {"g": group(["up"], start_bits=4, target_bits=4)}
            )
        },
        r"layers.0.up.weight: 256 numbers \[32, 8\] are not divided into 7 .*none is padded",
    ),
    (
        {
            "weight_quantization": method(
                {},
                {
                    "a": group(["up"], start_bits=4, target_bits=4),
                    "b": group([r"layers\.1"], start_bits=4, target_bits=4),
                },
            )
        },
        r"groups.a \(layers.1.up\) and .*groups.b \(layers.1.up\) both decide the weight bits",
    ),
    (
        {"sparse_pruning": method({}, {"g": group(["up"], dense_ratio=0.0)})},
        "sparse_pruning.different_groups.g.params.dense_ratio",
    ),
    (
        {"head_pruning": method({"num_heads": 3}, {"g": group(["output"], dense_ratio=0.5)})},
        "layers.0.output has 8 inputs, which 3 heads do not divide; nothing is padded",
    ),
    (
        {"row_pruning": method({}, {"g": group(["up"], [["down", "head"]], dense_ratio=0.5)})},
        r"'up' matches 2 modules and its related 'head' matches 1",
    ),
    ({"activation_quantization": method({}, {"g": group(["up"], bits=5)})}, "bits"),
    ({"sparse_pruning": {"shared_parameters": {"enabled": True}}}, "needs at least one group"),
    ({"head_pruning": method({}, {"g": group(["up"], dense_ratio=1)})}, "num_heads is required"),
]


@pytest.mark.parametrize(("section", "message"), WRONG, ids=lambda value: str(value)[:50])
def test_a_section_that_cannot_be_is_refused_by_name(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_of(section)


def test_scores_that_no_optimizer_trains_are_refused() -> None:
    section = {
        "row_pruning": method(
            {"method": "topk", "schedule_offset": 0}, {"g": group(["up"], dense_ratio=0.5)}
        )
    }
    model = net()
    engine = drivetrain.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        config={**BASE, "compression_training": section},
    )[0]
    with pytest.raises(ConfigError, match=r"layers.0.up.row_mask_scores was there"):
        engine(*batches(1)[0])

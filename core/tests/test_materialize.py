"""Modules without memory get their own part of values that are the same on any layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from halves import Halves, Net
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed

Tensors = dict[str, torch.Tensor]
SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "gradient_clipping": 0}


def empty_net(width: int = 8) -> Net:
    with torch.device("meta"):
        return Net(width)


def open_job(world: int = 1, tp: int = 1, **config: Any) -> Job:
    given = {"train_batch_size": world // tp, **config}
    registry = Registry.installed()
    if tp > 1:
        given["halves"] = {"tp": tp}
        registry = registry.with_plugins(Halves)
    return Job.open(Plan.build(given, world_size=world, registry=registry))


# -- functions that run on every rank --------------------------------------------------------------


def part_of(job: Job, module: nn.Module, weights: Any) -> tuple[Tensors, Tensors]:
    """What the module of this rank has in the end, and its cut of the same in one process."""
    engine = job.engine(module, weights=weights)
    cuts: dict[str, Any] = {}
    for parameter in engine.module.parameters():
        info = job.parameters.info(parameter)
        cuts[info.name] = info.placement.boxes[0].of if info.placement else torch.clone
    module = engine.module
    everything = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert module.head.weight is module.tokens.weight
    found = {name: tensor.detach().clone() for name, tensor in everything.items()}
    return found, cuts


def made_in_parts(weights: Any, world: int) -> Tensors:
    """The whole tensors, put together from parts of ``world`` tensor-parallel ranks."""
    with open_job(world, world) as job:
        found, cuts = part_of(job, empty_net(), weights)
        for name, own in found.items():
            cut = cuts.get(name, torch.clone)
            whole = torch.zeros(Net().state_dict(keep_vars=True).get(name, own).shape).to(own.dtype)
            if cut is not torch.clone:
                cut(whole).copy_(own)
                job.communicator.all_reduce(whole, "tp", tag())
            else:
                whole = own
            found[name] = whole
    return found


def tag() -> Any:
    from drivetrain.contracts import Purpose, Tag

    return Tag(Purpose.STATE, site="test")


def by_name(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """An initialiser that knows of fan-in only what a whole tensor tells."""
    if tensor.is_floating_point():
        tensor.normal_(generator=generator).div_(max(tensor.shape))
    else:
        tensor.zero_()


# -- drawn values ----------------------------------------------------------------------------------


def made_in_one(weights: Any) -> Tensors:
    with open_job() as job:
        module = empty_net()
        drivetrain.materialize(module, weights, job=job)
        assert module.head.weight is module.tokens.weight
        return {
            name: tensor.detach().clone()
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        }


@pytest.mark.parametrize("weights", [None, by_name], ids=["reset_parameters", "initialiser"])
def test_drawn_values_are_the_same_on_any_layout(weights: Any) -> None:
    expected = made_in_one(weights)
    for found in run_distributed(made_in_parts, 2, weights, 2):
        assert set(found) == set(expected)
        for name, values in expected.items():
            assert torch.equal(found[name], values), name


def test_reset_parameters_has_the_distributions_of_the_constructor() -> None:
    found, fresh = made_in_one(None), Net(8)
    bound = 4**-0.5  # of both, for 4 inputs
    assert 0.5 * bound < found["first.weight"].abs().max() <= bound
    assert found["first.weight"].abs().max() != fresh.first.weight.abs().max()
    assert torch.equal(found["norm.running_var"], torch.ones(8))
    assert torch.equal(found["angles.table"], fresh.angles.table)
    assert not torch.equal(found["first.bias"][:4], found["second.bias"])


def test_drawing_leaves_the_streams_of_the_script_alone() -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    made_in_one(None)
    assert torch.equal(torch.rand(3), expected)


def test_what_has_memory_keeps_its_values_and_its_identity() -> None:
    module = empty_net()
    module.first.bias = kept = nn.Parameter(torch.full((8,), 3.0))
    with open_job() as job:
        drivetrain.materialize(module, job=job)
    assert module.first.bias is kept
    assert torch.equal(kept, torch.full((8,), 3.0))
    assert not module.first.weight.is_meta


def test_attributes_and_classes_of_parameters_survive() -> None:
    class Marked(nn.Parameter):
        pass

    with torch.device("meta"):
        module = nn.LSTM(3, 4)
        module.weight_hh_l0 = Marked(torch.empty(16, 4), requires_grad=False)
    module.weight_hh_l0.is_expert = True
    with open_job() as job:
        drivetrain.materialize(module, job=job)
    assert type(module.weight_hh_l0) is Marked
    assert module.weight_hh_l0.is_expert
    assert not module.weight_hh_l0.requires_grad
    output, _ = module(torch.ones(2, 3))  # uses the list that it keeps of its parameters
    assert torch.isfinite(output).all()


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(3))


class Forgetful(Bare):
    def reset_parameters(self) -> None:
        pass


class Masked(Bare):
    """Has a constant beside its weights, which is no number and so cannot be NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool), persistent=False)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)


class Remasked(Masked):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.arange(3))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.mask = torch.zeros(3, dtype=torch.bool)
        self.positions.fill_(0)


def test_a_mask_may_be_given_false_alone() -> None:
    with torch.device("meta"):
        module = Remasked()
    with open_job() as job:
        drivetrain.materialize(module, job=job)
    assert not module.mask.any()
    assert module.positions.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("kind", "weights", "hint"),
    [
        (Masked, None, r"Masked.reset_parameters\(\) gave layer.mask no values"),
        (Masked, {"layer.scale": torch.ones(3)}, r"gave layer.mask no values"),
        (
            Masked,
            lambda name, tensor, generator: tensor.fill_(1) if tensor.is_floating_point() else None,
            r"the initialiser gave layer.mask no values",
        ),
        (Bare, None, r"layer\.scale is on the meta device, and layer \(Bare\) has no reset_param"),
        (Forgetful, None, r"Forgetful.reset_parameters\(\) gave layer.scale no values"),
        (Bare, lambda name, tensor, generator: None, "the initialiser gave layer.scale no values"),
        (Bare, 3, r"weights must be a path, a mapping .* got int"),
        (nn.LazyLinear, None, r"layer\.weight is lazy"),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(kind: Any, weights: Any, hint: str) -> None:
    with torch.device("meta"):
        module = nn.ModuleDict({"layer": kind(2) if kind is nn.LazyLinear else kind()})
    with open_job() as job, pytest.raises(ConfigError, match=hint):
        drivetrain.materialize(module, weights, job=job)

"""Experts of any model, found by structure and shared out over ranks.

A module has the experts of a layer if all its parameters have one row, or an equal number of rows,
for each of them, and its forward takes tokens, the numbers of their experts and weights. That is
how Transformers builds every mixture of experts since version 5. The model's router stays as it
is, and so does the computation of an expert: the module's own forward computes this rank's experts.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain_moe.exchange import HERE, Way, of_all_shares, through_experts, way_of
from drivetrain_moe.experts import keep_rows
from drivetrain_moe.load import Load
from drivetrain_moe.routing import Routed
from drivetrain_moe.section import EXPERT_PARALLEL, ExpertParallelSection

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain_moe.axes import ExpertAxes

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""By dtype of parameters, of the largest element; others have 3e-2."""


@dataclass(frozen=True)
class FoundExperts:
    """A module with the experts of a layer.

    Args:
        name: its path in the model.
        module: itself.
        counter: name of its attribute that has the number of experts.
        count: that number.
        parent: the module that it is in, with the router.
    """

    name: str
    module: nn.Module
    counter: str
    count: int
    parent: nn.Module


def find_experts(model: nn.Module, pattern: str | None = None) -> list[FoundExperts]:
    """Find the modules of ``model`` that have the experts of a layer.

    Args:
        model: whose modules are looked at; nothing inside of one that is found.
        pattern: regular expression that their names match as a whole.

    Raises:
        ConfigError: ``pattern`` names a module that has another structure; says which.
    """
    found: list[FoundExperts] = []
    modules = dict(model.named_modules())
    for name, module in modules.items():
        inside = any(name.startswith(f"{other.name}.") for other in found)
        if not name or inside or (pattern and not re.fullmatch(pattern, name)):
            continue
        counter, reason = _counter(module)
        if counter:
            parent = modules[name.rpartition(".")[0]]
            count = getattr(module, counter)
            found.append(FoundExperts(name, module, counter, count, parent))
        elif pattern:
            raise ConfigError(f"{EXPERT_PARALLEL}.expert_pattern: {name} {reason}")
    return found


def share_out(
    job: Job,
    model: nn.Module,
    section: ExpertParallelSection,
    axes: ExpertAxes,
    *,
    halves: bool = False,
) -> nn.Module:
    """Leave each rank its part of the experts of every layer, and have tokens travel.

    Raises:
        ConfigError: there are no experts, their number does not divide, or a layer computes
            something else than it did before.
    """
    found = find_experts(model, section.expert_pattern)
    if not found:
        raise ConfigError(_nothing_found(model))
    for experts in found:
        if experts.count % axes.size:
            raise ConfigError(
                f"{EXPERT_PARALLEL}.autoep_size: the {experts.count} experts of {experts.name} "
                f"cannot be shared out over {axes.size} ranks: {experts.count} / {axes.size} "
                f"leaves {experts.count % axes.size}"
            )
        load = Load(job, experts.name, experts.count, reports=True)
        shared = SharedExperts(experts, load, section.bias_update_rate)
        if axes.size > 1:
            _refuse_shards(experts)
            expected = _probe(job, experts, axes) if section.check else None
            keep_rows(experts.module, job, axes)
            setattr(experts.module, experts.counter, experts.count // axes.size)
            if expected is not None:
                shared.compare(*expected)
            shared.way = way_of(job, experts.name, axes, experts.module, halves=halves)
        experts.module.forward = shared
        job.on_close(shared.leave)
    return model


class SharedExperts:
    """Stands in the place of the forward of a module with experts.

    Args:
        found: the module.
        load: counts its tokens.
        rate: step of the router's correction bias.
    """

    def __init__(self, found: FoundExperts, load: Load, rate: float) -> None:
        self.load: Load | None = load
        self.way = HERE
        self.module = found.module
        self.rate = rate
        self.bias = _correction_bias(found) if rate else None
        load.follows = self.bias is not None
        self._found = found
        before = found.module.__dict__.get("forward")
        if isinstance(before, SharedExperts):
            raise ConfigError(f"the experts of {found.name} are shared out by another engine")
        self._own = before
        self._inner: Callable[..., torch.Tensor] = found.module.forward
        self.__signature__ = inspect.signature(self._inner)

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute tokens [..., d] with experts [S, k] and weights [S, k], in either order."""
        bound = self.__signature__.bind(hidden, *args, **kwargs)
        first, second = list(bound.arguments.values())[1:3]
        swapped = first.is_floating_point()
        index, weights = (second, first) if swapped else (first, second)
        if self.load is not None and self.module.training:
            chosen = index.reshape(-1)
            real = chosen[chosen < self._found.count]
            self.load.add(torch.bincount(real, minlength=self._found.count))
        if self.way is HERE:
            return self._inner(*bound.args, **bound.kwargs)
        x = hidden.reshape(-1, hidden.shape[-1])
        return self._through(x, index, weights, swapped, self.way).reshape(hidden.shape)

    def compare(self, x: torch.Tensor, index: torch.Tensor, expected: torch.Tensor) -> None:
        """Compute ``x`` with this rank's experts, and compare with what all experts gave.

        Raises:
            ConfigError: they differ.
        """
        with torch.no_grad():
            got = self._through(x, index, torch.ones_like(index, dtype=x.dtype), False, HERE)
        limit = TOLERANCE.get(x.dtype, 3e-2) * float(expected.abs().max())
        worst = float((got - expected).abs().max())
        if not worst <= limit:
            raise ConfigError(
                f"{EXPERT_PARALLEL}: {self._found.name} computes something else when it has only "
                f"some of its experts: outputs of up to {float(expected.abs().max()):.3g} differ "
                f"by {worst:.3g}; leave it out with {EXPERT_PARALLEL}.expert_pattern"
            )

    def leave(self) -> None:
        """Stop counting for a job that has closed; a module with all experts is as it was."""
        self.load = None
        if self.way is HERE and self.module.__dict__.get("forward") is self:
            del self.module.forward
            if self._own is not None:
                self.module.forward = self._own

    def _through(
        self,
        x: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        swapped: bool,
        way: Way,
    ) -> torch.Tensor:
        count = getattr(self.module, self._found.counter) if way is HERE else self._found.count
        if weights.shape != index.shape:  # of all experts
            weights = weights.gather(1, index)
        if way.alike is not None:
            weights = of_all_shares(weights, way.alike)
        expert, weight = index.reshape(-1), weights.reshape(-1)
        # Some routers mask choices with a number beyond the last expert.
        order = expert.argsort(stable=True)[: int((expert < count).sum())]
        token = order.div(index.shape[1], rounding_mode="floor")
        weight = weight[order].to(torch.promote_types(weight.dtype, torch.float32))
        none = weight.new_zeros(())
        routed = Routed(token, expert[order], weight, expert, none, none, none)

        def compute(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
            own = torch.arange(len(counts), device=rows.device).repeat_interleave(counts)
            ones = torch.ones_like(own, dtype=weights.dtype)
            pair = (ones, own) if swapped else (own, ones)
            answers = self._inner(rows, *(part.unsqueeze(1) for part in pair))
            return answers.reshape(rows.shape)  # some put a dimension of sequences in between

        return through_experts(
            x, routed, count, compute, way, tuple(self.module.parameters())
        ).output


def _counter(module: nn.Module) -> tuple[str, str]:
    """The attribute with a module's number of experts, or an empty string and why it has none."""
    parameters = list(module.parameters())
    if not parameters:
        return "", "has no parameters"
    own = {k: v for k, v in vars(module).items() if "expert" in k and type(v) is int and v > 1}
    fitting = [
        name
        for name, count in own.items()
        if all(p.dim() and p.shape[0] % count == 0 for p in parameters)
        and any(p.dim() == 3 and p.shape[0] == count for p in parameters)
        | all(p.dim() == 2 and p.shape[0] > count for p in parameters)
    ]
    if not fitting:
        shapes = ", ".join(str(tuple(p.shape)) for p in parameters[:4])
        return "", (
            "has no attribute of a number of experts which divides the first dimension of all its "
            f"parameters ({shapes})"
        )
    needed = [
        p
        for p in inspect.signature(module.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(needed) != 3:
        names = ", ".join(p.name for p in needed)
        return "", f"has a forward of ({names}), not of tokens, numbers of experts and weights"
    return fitting[0], ""


def _nothing_found(model: nn.Module) -> str:
    like = [
        f"{name} {_counter(module)[1]}"
        for name, module in model.named_modules()
        if "expert" in name.rpartition(".")[2]
    ]
    seen = f"; nearest: {like[0]}" if like else ""
    return (
        f"{EXPERT_PARALLEL}: {type(model).__name__} has no module that looks like the experts of a "
        f"layer: fused tensors with a row for each, and a forward of tokens, numbers of experts "
        f"and weights{seen}; place drivetrain_moe.MoE in the model, or leave the section out"
    )


def _refuse_shards(found: FoundExperts) -> None:
    for name, parameter in found.module.named_parameters():
        if hasattr(parameter, "drivetrain_handle"):
            raise ConfigError(
                f"{EXPERT_PARALLEL}: {found.name}.{name} is sharded already (zero.Init), so it "
                "cannot be shared out by experts: build the model under torch.device('meta')"
            )


def _correction_bias(found: FoundExperts) -> torch.Tensor:
    """The buffer that a router adds to scores for the choice alone."""
    buffers = [
        buffer
        for name, buffer in found.parent.named_buffers()
        if tuple(buffer.shape) == (found.count,) and "bias" in name
    ]
    if len(buffers) != 1:
        raise ConfigError(
            f"{EXPERT_PARALLEL}.bias_update_rate: the layer of {found.name} has {len(buffers)} "
            f"buffers called a bias, of {found.count} numbers; expected one, which its router adds "
            "to scores: leave the key out"
        )
    return buffers[0]


def _probe(
    job: Job, found: FoundExperts, axes: ExpertAxes
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """A few tokens, which of this rank's experts compute them, and what the whole module gives.

    ``None`` where parameters have no values yet.
    """
    parameters = list(found.module.parameters())
    if any(p.is_meta for p in parameters):
        return None
    like, own = parameters[0], found.count // axes.size
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(2 * own).remainder(own).unsqueeze(1).to(like.device)
    first = own * job.mesh.coordinate(axes.experts)
    ones = torch.ones_like(index, dtype=like.dtype)
    names = list(inspect.signature(found.module.forward).parameters)
    for width in dict.fromkeys(_widths(parameters)):
        x = torch.randn(len(index), width, generator=generator).to(like.device, like.dtype)
        with torch.no_grad():
            try:
                expected = found.module.forward(x, **{names[1]: index + first, names[2]: ones})
            except RuntimeError:  # tokens have another width
                continue
        if expected.numel() == x.numel() and bool(torch.isfinite(expected).all()):
            return x, index, expected.reshape(x.shape)
    shapes = [tuple(p.shape) for p in parameters]
    raise ConfigError(
        f"{EXPERT_PARALLEL}: {found.name} with parameters of shapes {shapes} does not compute "
        "tokens of any of these widths, numbers of experts and weights; give another "
        f"{EXPERT_PARALLEL}.expert_pattern"
    )


def _widths(parameters: list[nn.Parameter]) -> Iterator[int]:
    for parameter in parameters:
        yield from reversed(parameter.shape[1:])

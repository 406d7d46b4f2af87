"""What stands in the place of the forward of a model's experts, when ranks share them out."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drivetrain.errors import ConfigError, TrainingError
from drivetrain_moe.cache import ExpertCache, FusedCache
from drivetrain_moe.exchange import (
    HERE,
    Compute,
    Way,
    of_all_shares,
    through_experts,
    through_sorted,
)
from drivetrain_moe.experts import describe_rows, keep_rows
from drivetrain_moe.found import FoundExperts, has_parameters
from drivetrain_moe.grouped import ACTIVATIONS, Shape, grouped_mlp
from drivetrain_moe.own_numbers import default_state, set_default_state
from drivetrain_moe.routing import Routed
from drivetrain_moe.section import EXPERT_PARALLEL

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain_moe.axes import ExpertAxes
    from drivetrain_moe.load import Load

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""By dtype of parameters, of the largest element; others have 3e-2."""
PROBES = 2
"""Random tokens of each expert on which computations are compared."""
RECOGNISED = 2
"""Experts, in float32 at least, by which what all of them compute is recognised."""


class SharedExperts(ABC):
    """Stands in the place of the forward of a module that calls experts.

    Attributes:
        way: of their tokens.
        cache: of their weights, where these lie in host memory.
        serves: whether the module is that of an engine that does not train.

    Args:
        found: the experts.
        load: counts their tokens.
        rate: step of the router's correction bias.

    Raises:
        ConfigError: another engine shares them out already.
    """

    def __init__(self, found: FoundExperts, load: Load, rate: float) -> None:
        self.load: Load | None = load
        self.way = HERE
        self.cache: ExpertCache | None = None
        self.serves = False
        self.module = found.module
        self.rate = rate
        self.bias = _correction_bias(found) if rate else None
        load.follows = self.bias is not None
        self._found = found
        before = found.owner.__dict__.get("forward")
        if isinstance(before, SharedExperts):
            raise ConfigError(f"the experts of {found.name} are shared out by another engine")
        self._own = before
        self._inner: Callable[..., Any] = found.owner.forward
        self.__signature__ = inspect.signature(self._inner)

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the forward returned before."""

    @abstractmethod
    def keep(self, job: Job, axes: ExpertAxes, *, check: bool) -> None:
        """Leave this rank's experts; compare, if values are there, with what all of them computed.

        Raises:
            ConfigError: they compute something else.
        """

    def describe(self, job: Job, axes: ExpertAxes) -> None:
        """Say which part of the whole tensors this rank has."""
        describe_rows(self.module, job, axes)

    def cached(self, job: Job, room: int) -> ExpertCache:
        """Keep weights in host memory, and ``room`` experts on the device."""
        own = self._found.count // (1 if self.way.experts is None else self.way.experts.size)
        self.cache = FusedCache(job, self.module, own, room)
        setattr(self.module, self._found.counter, self.cache.room)
        return self.cache

    def take(self) -> None:
        """Take the place of the forward."""
        self._found.owner.forward = self

    def leave(self) -> None:
        """Stop counting for a job that has closed; a module with all experts is as it was."""
        self.load = None
        if self.cache is not None:
            self.cache.release()
            if self._found.counter:
                setattr(self.module, self._found.counter, self.cache.count)
            self.cache = None
        owner = self._found.owner
        if self.way is HERE and owner.__dict__.get("forward") is self:
            del owner.forward
            if self._own is not None:
                owner.forward = self._own

    def _with(self, compute: Compute) -> Compute:
        """``compute`` with the weights that it needs."""
        return compute if self.cache is None else self.cache.around(compute)

    def _count(self, counts: torch.Tensor) -> None:
        if self.load is not None and self.module.training:
            self.load.add(counts)

    def _compare(self, got: torch.Tensor, expected: torch.Tensor) -> None:
        largest = float(expected.abs().max())
        limit = TOLERANCE.get(expected.dtype, 3e-2) * largest
        worst = float((got - expected).abs().max())
        if not worst <= limit:
            raise ConfigError(
                f"{EXPERT_PARALLEL}: {self._found.name} computes something else when it has only "
                f"some of its experts: outputs of up to {largest:.3g} differ by {worst:.3g}; leave "
                f"it out with {EXPERT_PARALLEL}.expert_pattern"
            )


class FusedExperts(SharedExperts):
    """Experts in fused tensors, called with tokens, numbers of experts and weights.

    What an expert computes is the module's own forward. On a host, where an ordinary gated expert
    gives the same numbers on random tokens, small and large, that is computed instead: rows are in
    order of experts already, and the module's forward would order them again.
    """

    def __init__(self, found: FoundExperts, load: Load, rate: float) -> None:
        super().__init__(found, load, rate)
        self._ordinary: dict[tuple[bool, torch.dtype, bool], tuple[Shape, str, str] | None] = {}

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute tokens [..., d] with experts [S, k] and weights [S, k], in either order."""
        bound = self.__signature__.bind(hidden, *args, **kwargs)
        first, second = list(bound.arguments.values())[1:3]
        swapped = first.is_floating_point()
        index, weights = (second, first) if swapped else (first, second)
        if weights.device.type == "cpu" and not bool(torch.isfinite(weights).all()):
            raise TrainingError(
                f"the router beside {self._found.name} gives weights that are not finite"
            )
        chosen = index.reshape(-1)
        if self.load is not None and self.module.training:
            real = chosen[chosen < self._found.count]
            self._count(torch.bincount(real, minlength=self._found.count))
        if self.way is HERE and self.cache is None:
            whole: torch.Tensor = self._inner(*bound.args, **bound.kwargs)
            return whole
        x = hidden.reshape(-1, hidden.shape[-1])
        count = self._found.count
        return self._through(x, index, weights, swapped, self.way, count).reshape(hidden.shape)

    def keep(self, job: Job, axes: ExpertAxes, *, check: bool) -> None:
        expected = self._probe(job, axes) if check else None
        keep_rows(self.module, job, axes)
        setattr(self.module, self._found.counter, self._found.count // axes.size)
        if expected is not None:
            x, index, outputs = expected
            with torch.no_grad():
                ones = torch.ones_like(index, dtype=x.dtype)
                own = self._found.count // axes.size
                self._compare(self._through(x, index, ones, False, HERE, own), outputs)

    def _through(
        self,
        x: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        swapped: bool,
        way: Way,
        count: int,
    ) -> torch.Tensor:
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
            known = self._known(rows, counts, weights.dtype, swapped)
            if known is None:
                return self._call(rows, counts, weights.dtype, swapped)
            shape, up, down = known
            return grouped_mlp(
                rows, getattr(self.module, up), getattr(self.module, down), counts, shape
            )

        answers = tuple(self.module.parameters())
        return through_experts(x, routed, count, self._with(compute), way, answers).output

    def _call(
        self, rows: torch.Tensor, counts: torch.Tensor, dtype: torch.dtype, swapped: bool
    ) -> torch.Tensor:
        """The module's own forward of rows in order of experts, with weights of 1."""
        own = torch.arange(len(counts), device=rows.device).repeat_interleave(counts)
        ones = torch.ones_like(own, dtype=dtype)
        pair = (ones, own) if swapped else (own, ones)
        answers: torch.Tensor = self._inner(rows, *(part.unsqueeze(1) for part in pair))
        return answers.reshape(rows.shape)  # some put a dimension of sequences in between

    def _known(
        self, rows: torch.Tensor, counts: torch.Tensor, dtype: torch.dtype, swapped: bool
    ) -> tuple[Shape, str, str] | None:
        """The ordinary expert that gives the same, and the names of its weights.

        Asked once for each mode, when weights have values, and of this rank alone: no other is to
        give the same answer.
        """
        if rows.device.type != "cpu":
            return None
        lower = torch.is_autocast_enabled("cpu")
        key = self.module.training, rows.dtype, lower
        if key not in self._ordinary:
            random = default_state(rows.device)
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                found = self._recognised(rows.shape[1], len(counts), dtype, swapped)
            same = found is None or rows.dtype == getattr(self.module, found[1]).dtype
            self._ordinary[key] = found if same or lower else None
            set_default_state(rows.device, random)
        return self._ordinary[key]

    def _recognised(
        self, width: int, count: int, dtype: torch.dtype, swapped: bool
    ) -> tuple[Shape, str, str] | None:
        names = (*self.module._parameters, *vars(self.module))  # the latter if a cache has them
        own = {
            name: value
            for name in names
            if isinstance(value := getattr(self.module, name), torch.Tensor)
        }
        if len(own) != 2 or any(has_parameters(child) for child in self.module.children()):
            return None
        if any(weight.dim() != 3 for weight in own.values()):
            return None
        (up, first), (down, second) = own.items()
        if not first.is_floating_point() or {len(first), len(second)} != {count}:
            return None
        wide = torch.promote_types(first.dtype, torch.float32)
        few = {name: weight.detach()[:RECOGNISED].to(wide) for name, weight in own.items()}
        # What tokens are before activations: as the model has them, about 1, about 4, and so large
        # that any bound on what experts compute would show.
        usual = float(few[up].square().mean().sqrt()) * width**0.5
        scales = (1.0, 1 / usual, 4 / usual, 1e4 / usual) if usual else ()
        for shape in _shapes(few[up], few[down], width) if usual else ():
            with self._with_weights(few):
                same = all(self._gives_same(few, scale, shape, dtype, swapped) for scale in scales)
            # Rounding hides what tells activations apart, but not an expert unlike the others.
            if same and all(
                self._gives_same(own, scale, shape, dtype, swapped) for scale in scales[:3]
            ):
                return shape, up, down
        return None

    def _gives_same(
        self,
        weights: Mapping[str, torch.Tensor],
        scale: float,
        shape: Shape,
        dtype: torch.dtype,
        swapped: bool,
    ) -> bool:
        """Whether ordinary experts with ``weights``, which the module has, compute the same."""
        up, down = weights.values()
        counts = torch.full((len(up),), PROBES)
        width = up.shape[2] if shape.outputs_first else up.shape[1]
        x = torch.randn(PROBES * len(up), width, generator=torch.Generator().manual_seed(0))
        x = (x * scale).to(up.dtype)
        try:
            expected = self._call(x, counts, torch.promote_types(dtype, up.dtype), swapped)
        except RuntimeError:
            return False
        largest = float(expected.abs().max())
        worst = float((grouped_mlp(x, up, down, counts, shape) - expected).abs().max())
        # Weights that are zeros would make all functions equal.
        return 0 < largest < math.inf and worst <= TOLERANCE.get(x.dtype, 3e-2) * largest

    @contextmanager
    def _with_weights(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Have the module compute with a few experts, which have other weights."""
        module, counter = self.module, self._found.counter
        before, count = dict(module._parameters), getattr(module, counter)
        beside = {name: vars(module)[name] for name in weights if name in vars(module)}
        for name, weight in weights.items():
            if name in beside:
                vars(module)[name] = weight
            else:
                module._parameters[name] = nn.Parameter(weight, requires_grad=False)
        setattr(module, counter, len(next(iter(weights.values()))))
        try:
            yield
        finally:
            module._parameters.update(before)
            vars(module).update(beside)
            setattr(module, counter, count)

    def _probe(
        self, job: Job, axes: ExpertAxes
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """A few tokens, which of this rank's experts compute them, and what the whole module gives.

        ``None`` where parameters have no values yet.
        """
        found, parameters = self._found, list(self.module.parameters())
        if any(p.is_meta for p in parameters):
            return None
        like, own = parameters[0], found.count // axes.size
        index = torch.arange(PROBES * own).remainder(own).unsqueeze(1).to(like.device)
        first = own * job.mesh.coordinate(axes.experts)
        ones = torch.ones_like(index, dtype=like.dtype)
        names = list(inspect.signature(found.module.forward).parameters)
        with torch.no_grad():
            for x in random_tokens(parameters, len(index)):
                try:
                    pair = {names[1]: index + first, names[2]: ones}
                    expected = found.module.forward(x, **pair)
                except (RuntimeError, ValueError, TypeError):  # tokens have another width
                    continue
                if expected.numel() == x.numel() and bool(torch.isfinite(expected).all()):
                    return x, index, expected.reshape(x.shape)
        raise unlike(found, "numbers of experts and weights")


class BlockExperts(SharedExperts):
    """Experts in fused tensors, called with a block of rows for each, [E * n, d].

    Where experts make zeros of zeros, rows of zeros stay: no gradient but zero comes of them
    either, and whoever multiplies inputs by scores (Llama 4) has them where a token has not chosen
    an expert. So a row travels for each choice, in place of one for each token and expert.
    """

    def __init__(self, found: FoundExperts, load: Load, rate: float) -> None:
        super().__init__(found, load, rate)
        self._skips = True

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute rows [E * n, d]."""
        count = self._found.count
        x = hidden.reshape(-1, hidden.shape[-1])
        with torch.no_grad():
            used = (x != 0).any(-1) if self._skips else x.new_ones(len(x), dtype=torch.bool)
            counts = used.view(count, -1).sum(1)
        self._count(counts)
        if self.way is HERE and self.cache is None:
            whole: torch.Tensor = self._inner(hidden, *args, **kwargs)
            return whole
        place = used.nonzero().squeeze(1)
        answers = through_sorted(
            *(x.index_select(0, place), counts, self._with(self._compute), self.way),
            tuple(self.module.parameters()),
        )
        out = answers.new_zeros(len(x), answers.shape[-1])
        return out.index_copy(0, place, answers).reshape(hidden.shape)

    def keep(self, job: Job, axes: ExpertAxes, *, check: bool) -> None:
        expected = self._probe(job, axes) if check else None
        keep_rows(self.module, job, axes)
        setattr(self.module, self._found.counter, self._found.count // axes.size)
        if expected is not None:
            x, outputs = expected
            # Other numbers of rows for each, so that blocks are filled up as they are in a step.
            own = self._found.count // axes.size
            counts = torch.arange(own, device=x.device).remainder(PROBES).add(1)
            rows = torch.arange(PROBES, device=x.device).repeat(own) < counts.repeat_interleave(
                PROBES
            )
            with torch.no_grad():
                self._compare(self._compute(x[rows], counts), outputs[rows])

    def _compute(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Rows [n, d] in order of experts, in blocks that are filled up with zeros."""
        most = int(counts.max())
        first = torch.arange(len(counts), device=rows.device) * most - (counts.cumsum(0) - counts)
        place = torch.arange(len(rows), device=rows.device) + first.repeat_interleave(counts)
        blocks = rows.new_zeros(len(counts) * most, rows.shape[-1]).index_copy(0, place, rows)
        answers: torch.Tensor = self._inner(blocks)
        return answers.reshape(len(blocks), -1).index_select(0, place)

    def _probe(self, job: Job, axes: ExpertAxes) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Rows of this rank's experts, and what the whole module gives."""
        found, parameters = self._found, list(self.module.parameters())
        if any(p.is_meta for p in parameters):
            return None
        own = PROBES * found.count // axes.size
        first = own * job.mesh.coordinate(axes.experts)
        with torch.no_grad():
            for x in random_tokens(parameters, PROBES * found.count):
                try:
                    expected, nothing = self._inner(x), self._inner(torch.zeros_like(x))
                except (RuntimeError, ValueError, TypeError):  # tokens have another width
                    continue
                if expected.shape == x.shape and bool(torch.isfinite(expected).all()):
                    self._skips = not bool(nothing.any())
                    return x[first : first + own], expected[first : first + own]
        raise unlike(found, "in a block for each expert")


def _shapes(up: torch.Tensor, down: torch.Tensor, width: int) -> Iterator[Shape]:
    """How gated experts with weights of these shapes could compute tokens of a width."""
    for outputs_first in (True, False):
        (inner, taken), (back, narrow) = (
            tuple((weight if outputs_first else weight.mT).shape[1:]) for weight in (up, down)
        )
        if inner == 2 * narrow and taken == back == width:
            for activation in ACTIVATIONS:
                yield Shape(activation, outputs_first=outputs_first)


def random_tokens(parameters: list[nn.Parameter], count: int) -> Iterator[torch.Tensor]:
    """Tokens [count, d] for every width d that parameters let appear, likeliest first."""
    like, generator = parameters[0], torch.Generator().manual_seed(0)
    widths = [width for p in parameters for width in reversed(p.shape[p.dim() > 2 :])]
    for width in dict.fromkeys(widths):
        x = torch.randn(count, width, generator=generator)
        yield x.to(like.device, like.dtype)


def unlike(found: FoundExperts, what: str) -> ConfigError:
    """The error for experts that do not compute as they should."""
    shapes = [tuple(p.shape) for p in found.module.parameters()]
    return ConfigError(
        f"{EXPERT_PARALLEL}: {found.name} with parameters of shapes {shapes[:8]} does not compute "
        f"tokens of any of these widths, {what}; give another {EXPERT_PARALLEL}.expert_pattern"
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

"""Gradients of weights, computed later than those of inputs.

Schedules without bubbles (Qi et al. 2023, "Zero Bubble Pipeline Parallelism") need the gradient of
a chunk's inputs first, since the stage before waits for it, and that of weights whenever there is
time. In training, linear layers keep what the gradient of their weight is made of instead of making
it in backward: the layer's input, and the gradient of its output. So do layers that are made of
linear ones and multiply by their weight in a forward of their own, as those do that ranks share
out. All other parameters (norms, biases, embeddings) get theirs in backward, as they cost little,
and so do weights that a layer multiplies by with an operator of its own.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine
    from drivetrain_pipeline.schedules import Instruction

logger = logging.getLogger("drivetrain.pipeline")

_Entry = tuple[nn.Parameter, torch.Tensor, torch.Tensor]
"""A weight [out, in], the input of its layer [..., in], the gradient of its output [..., out]."""


class WeightsApart:
    """Keeps inputs and gradients of linear layers until their weights' gradients are computed.

    Args:
        engine: of this stage; its module's linear layers are changed.
        tied: parameters that other stages have, too, whose gradients come with the window's end.
    """

    def __init__(self, engine: Engine, tied: Sequence[nn.Parameter] = ()) -> None:
        self._engine = engine
        self._linear = _separate(engine.module, {id(parameter) for parameter in tied})
        self._active = False
        self._stored: list[_Entry] = []
        self._kept: dict[tuple[int, int], list[_Entry]] = {}
        self._left: Counter[int] = Counter()
        self._came: set[nn.Parameter] = set()
        self._told = False
        for part in self._linear:
            vars(part)["forward"] = _Forward(self, part)

    @property
    def weights(self) -> list[nn.Parameter]:
        """The weights whose gradients come apart."""
        return [cast("nn.Parameter", part.weight) for part in self._linear]

    def begin(self, stream: Sequence[Instruction]) -> None:
        """Begin a window with these instructions."""
        self._kept.clear()
        self._came.clear()
        self._left = Counter(i.chunk for i in stream if i.kind == "W")
        if self._left:
            self._engine.states.defer(self.weights)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Inside of the block, layers prepare for weights' gradients that come apart."""
        self._active = bool(self._left)
        try:
            yield
        finally:
            self._active = False

    def begin_backward(self, instruction: Instruction) -> None:
        """What layers keep from now on belongs to this instruction."""
        self._stored = []
        self._kept[instruction.micro_batch, instruction.chunk] = self._stored

    def keep(self, weight: nn.Parameter, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Keep what a weight's gradient is made of."""
        self._stored.append((weight, x, gradient))

    def compute(self, instruction: Instruction) -> None:
        """Compute the weights' gradients of one micro-batch and chunk, and hand them over."""
        entries = self._kept.pop((instruction.micro_batch, instruction.chunk))
        self._left[instruction.chunk] -= 1
        last = not self._left[instruction.chunk]
        by_weight: defaultdict[nn.Parameter, list[_Entry]] = defaultdict(list)
        for entry in entries:
            by_weight[entry[0]].append(entry)
        for weight, of_weight in by_weight.items():
            for _, x, gradient in of_weight:
                self._add(weight, x.reshape(-1, x.shape[-1]), gradient)
            self._engine.gradients_ready([weight], last=last)
            if not last:
                self._engine.states.defer([weight])
        self._came.update(by_weight)
        if not self._left.total():
            in_backward = [weight for weight in self.weights if weight not in self._came]
            self._tell(in_backward)
            self._engine.gradients_ready(in_backward, last=True)

    def _tell(self, in_backward: Sequence[nn.Parameter]) -> None:
        """Say once if a schedule cannot do what it is there for."""
        if in_backward and not self._told and self._engine.job.rank == 0:
            logger.warning(
                "pipeline: %d of %d weights, %s first, had gradients with those of inputs, so the "
                "bubble is larger than that of the schedule: their layers multiply in a way of "
                "their own (tensor_parallel.tp_overlap_comm has such), or were not used",
                len(in_backward),
                len(self.weights),
                self._engine.job.parameters.info(in_backward[0]).name,
            )
        self._told = True

    @torch.no_grad()
    def _add(self, weight: nn.Parameter, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add one product to a weight's gradient: in place where that is as exact."""
        rows = gradient.reshape(-1, gradient.shape[-1])
        place = self._engine.states.added(weight) if weight.grad is None else weight.grad
        if place is not None and place.dtype == rows.dtype == x.dtype:
            place.addmm_(rows.t(), x)
        else:
            found = (rows.t() @ x).to(weight.dtype)
            weight.grad = found if weight.grad is None else weight.grad + found


def _separate(module: nn.Module, tied: set[int]) -> list[nn.Linear]:
    """Linear layers with a trained weight that nothing else uses."""
    uses = Counter(id(p) for part in module.modules() for p in part.parameters(recurse=False))
    return [
        part
        for part in module.modules()
        if isinstance(part, nn.Linear)
        and "forward" not in vars(part)
        and part._parameters.get("weight") is not None
        and part.weight.requires_grad
        and uses[id(part.weight)] == 1
        and id(part.weight) not in tied
    ]


class _Forward:
    """Stands in the place of a linear layer's ``forward``."""

    def __init__(self, apart: WeightsApart, part: nn.Linear) -> None:
        self._apart = apart
        self._part = part

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        part = self._part
        if not self._apart._active or not torch.is_grad_enabled():
            return type(part).forward(part, *args, **kwargs)
        with _Products(self._apart, part.weight):
            return type(part).forward(part, *args, **kwargs)


class _Products(TorchFunctionMode):
    """Inside of the block, products with one weight leave its gradient for later."""

    def __init__(self, apart: WeightsApart, weight: torch.Tensor) -> None:
        super().__init__()
        self._apart, self._weight = apart, weight

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        is_product = func is nn.functional.linear and len(args) > 1 and args[1] is self._weight
        # A tensor of which this rank has a part has operators of its own.
        if not is_product or type(args[0]) is not torch.Tensor:
            return func(*args, **kwargs)
        return _product(self._apart, *args, **kwargs)


def _product(
    apart: WeightsApart, input: torch.Tensor, weight: nn.Parameter, bias: torch.Tensor | None = None
) -> torch.Tensor:
    x, cast, bias = _cast(input, weight, bias)
    apply: Any = _WithoutWeight.apply  # torch does not type it
    output: torch.Tensor = apply(x, weight, cast, bias, apart)
    return output


def _cast(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Do what autocast does to a linear layer; ``None`` for a weight that stays as it is."""
    kind = _autocast_kind(x)
    if not torch.is_autocast_enabled(kind):
        return x, None, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), weight.detach().to(dtype), None if bias is None else bias.to(dtype)


def _autocast_kind(x: torch.Tensor) -> str:
    """The kind of device whose autocast counts; tensors without memory have none of their own."""
    return "cpu" if x.is_meta else x.device.type


class _WithoutWeight(torch.autograd.Function):
    """A linear layer whose backward leaves the gradient of its weight for later."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: nn.Parameter,
        cast: torch.Tensor | None,
        bias: torch.Tensor | None,
        apart: WeightsApart,
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.cast, ctx.apart = weight, cast, apart
        with torch.autocast(_autocast_kind(x), enabled=False):
            return nn.functional.linear(x, weight if cast is None else cast, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        ctx.apart.keep(ctx.weight, x, gradient)
        weight = ctx.weight if ctx.cast is None else ctx.cast
        of_input = gradient @ weight if ctx.needs_input_grad[0] else None
        of_bias = (
            gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
        )
        return of_input, None, None, of_bias, None

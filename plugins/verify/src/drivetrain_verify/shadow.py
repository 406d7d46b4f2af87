"""Plain torch in one process: the same micro-batches through a copy of the client's module.

[Note: what is compared] A shadow computes each window again from the weights that the engine had
at its beginning. It takes inputs as the engine's module was given them, on every rank, draws
the same random numbers, and continues backward from the gradients that came back for its outputs;
what a script does between outputs and loss is the client's own, and need not be known. Gradients
are divided by the number of micro-batches, clipped, and stepped by the class of ``torch.optim``.

There are two of them. One computes in float64 and is the reference. The other computes in the
engine's precision; how far it is from the first is what rounding does to this model on this data.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from drivetrain.sections.optimization import OptimizerSection
from drivetrain_verify.recording import MicroBatch, output_tensors
from drivetrain_verify.states import Values

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine

CLIP_EPSILON = 1e-6
"""As in ``torch.nn.utils.clip_grad_norm_``."""


class Shadow:
    """A plain copy of a module, with a plain optimizer.

    Args:
        module: a copy of the client's; it is changed.
        dtype: that it computes in.
        context: that forwards run in, such as autocast.
        names: of the parameters that are trained.
        optimizer: class of ``torch.optim``; ``None`` compares gradients alone.
        groups: names and hyper-parameters of each group.

    Attributes:
        outputs: of each micro-batch of the latest window, in order of ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype,
        context: AbstractContextManager[Any] | None,
        names: Sequence[str],
        optimizer: type[torch.optim.Optimizer] | None,
        groups: Sequence[Mapping[str, Any]],
    ) -> None:
        self.outputs: list[list[torch.Tensor]] = []
        self._module = module.to(dtype)
        self._dtype = dtype
        self._context = context or nullcontext()
        own = dict(module.named_parameters(remove_duplicate=False))
        self._own = {name: own[name] for name in names}
        wide = torch.promote_types(dtype, torch.float32)  # masters, where the module has less
        self._weights = {
            name: nn.Parameter(parameter.detach().to(wide, copy=True))
            for name, parameter in self._own.items()
        }
        self._optimizer: Any = None
        if optimizer is not None:
            made: Any = optimizer
            self._optimizer = made(
                [{"params": [self._weights[n] for n in group["names"]]} for group in groups]
            )

    @property
    def steps_too(self) -> bool:
        """Whether there is a plain optimizer to compare updates with."""
        return self._optimizer is not None

    def begin(self, weights: Values) -> None:
        """Take the weights that a window begins with."""
        with torch.no_grad():
            for name, value in weights.items():
                self._weights[name].copy_(value)
                self._own[name].copy_(value)

    def gradients(self, ranks: Iterable[Sequence[MicroBatch]], divisor: float) -> Values:
        """The mean gradients of a window.

        Args:
            ranks: micro-batches of each rank.
            divisor: what the sum of all is divided by, the loss scale included.
        """
        sums = {name: torch.zeros_like(weight) for name, weight in self._weights.items()}
        self.outputs = []
        for micro_batches in ranks:
            for one in micro_batches:
                self._module.zero_grad(set_to_none=True)
                self._run(one)
                for name, parameter in self._own.items():
                    if parameter.grad is not None:
                        sums[name] += parameter.grad
        return {name: value.double() / divisor for name, value in sums.items()}

    def chance(self, ranks: Iterable[Sequence[MicroBatch]], divisor: float) -> str:
        """What differs between two runs of one window; empty for a deterministic module.

        Two runs that differ would make a bound of rounding that explains anything.
        """
        with torch.no_grad():
            buffers = [(buffer, buffer.clone()) for buffer in self._module.buffers()]
        runs = []
        for _ in range(2):
            runs.append((self.gradients(ranks, divisor), self.outputs))
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
        (first, answers), (second, others) = runs
        names = (f"the gradient of parameter {n}" for n in first if _differ(first[n], second[n]))
        pairs = (
            (a, b)
            for one, two in zip(answers, others, strict=True)
            for a, b in zip(one, two, strict=True)
        )
        outputs = "an output" if any(_differ(a, b) for a, b in pairs) else ""
        what = next(names, outputs)
        return what and (
            f"the module is not deterministic, so nothing can be compared: {what} is another one "
            "when plain torch runs a micro-batch twice, in float64, with the same weights, inputs, "
            "buffers and state of torch's generator; does it draw from another generator, or count "
            "its calls?"
        )

    def _run(self, one: MicroBatch) -> None:
        device = next(iter(self._own.values())).device

        def placed(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return leaf.to(device, self._dtype if leaf.is_floating_point() else None)

        args, kwargs = pytree.tree_map(placed, (one.args, one.kwargs))
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices=devices, device_type=_kind(device)):
            if device.type == "cpu":
                torch.set_rng_state(one.random)
            else:
                torch.get_device_module(device.type).set_rng_state(one.random, device)
            with torch.enable_grad(), self._context:
                outputs = output_tensors(self._module(*args, **kwargs))
        self.outputs.append([output.detach().double().cpu() for output in outputs])
        roots = [
            (output, gradient.to(device, output.dtype))
            for output, gradient in zip(outputs, one.gradients, strict=True)
            if gradient is not None
        ]
        torch.autograd.backward([o for o, _ in roots], [g for _, g in roots])

    def step(self, gradients: Values, groups: Sequence[Mapping[str, Any]], limit: float) -> Values:
        """Clip, update, and return the new weights.

        Args:
            gradients: means, of :meth:`gradients`.
            groups: hyper-parameters as they are now.
            limit: norm that gradients are clipped to; 0 for none.
        """
        factor = 1.0
        if limit > 0:
            norm = torch.stack([value.norm() for value in gradients.values()]).norm()
            factor = min(1.0, limit / (float(norm) + CLIP_EPSILON))
        for name, weight in self._weights.items():
            weight.grad = (gradients[name] * factor).to(weight.dtype).to(weight.device)
        for own, group in zip(self._optimizer.param_groups, groups, strict=True):
            own.update({key: group["hyper"][key] for key in own.keys() & group["hyper"].keys()})
        self._optimizer.step()
        return {name: weight.detach().double().cpu() for name, weight in self._weights.items()}


_ORDER_OF_SUMS = 1e-9
"""How far two runs may differ in float64 since a device adds up in another order."""


def _differ(first: torch.Tensor, second: torch.Tensor) -> bool:
    if bool(first.isnan().any()):
        return False  # the comparison with the engine will tell of it
    return not float((first - second).norm()) <= _ORDER_OF_SUMS * float(first.norm())


def shadows(
    engine: Engine, client: nn.Module, names: Sequence[str], groups: Sequence[Mapping[str, Any]]
) -> tuple[Shadow, Shadow]:
    """The reference in float64, and plain torch in the engine's precision."""
    assert engine.optimizer is not None
    kind = _torch_class(engine)
    precision = engine.precision
    context = None if precision.lower is None else precision.autocast(engine.device)
    plain = precision.parameter or next(client.parameters()).dtype
    shared = (names, kind, groups)
    exact = Shadow(copy.deepcopy(client), torch.float64, None, *shared)
    return exact, Shadow(client, plain, context, *shared)


def _torch_class(engine: Engine) -> type[torch.optim.Optimizer] | None:
    """The class of ``torch.optim`` that does what the engine's optimizer should, if any."""
    assert engine.optimizer is not None
    name, section = engine.optimizer.type_name, engine.job.plan.section(OptimizerSection)
    if name == section.type and section.params.get("bias_correction", True) is False:
        return None
    if name == section.type and name.lower() == "adam":
        return torch.optim.AdamW if section.params.get("adam_w_mode", True) else torch.optim.Adam
    known = {key.lower(): value for key, value in vars(torch.optim).items()}
    kind = known.get(name.lower())
    return kind if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) else None


def _kind(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type

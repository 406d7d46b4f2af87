"""What a ``torch.optim`` class keeps, and whether it treats every element on its own."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from drivetrain.errors import ConfigError

_SIDE = 128  # some factorising optimizers leave matrices with a smaller side alone
_STEPS = 3

State = dict[str, Any]

Scalar = tuple[torch.dtype, torch.Size] | type[int] | type[float]
"""What an optimizer keeps one number in: a tensor of this dtype and shape, or a Python number."""


@dataclass
class StateLayout:
    """The states of one optimizer class under certain hyper-parameters.

    Args:
        whole: elementwise states and the value that they start from.
        scalars: states of one number other than ``step``, and what the class keeps it in.
        step: type of the state ``step``: a tensor, a number, or ``None`` where there is none.
        made_by_class: whether states start from values that only the class knows, so that it must
            create them itself in the first step.
    """

    whole: dict[str, float] = field(default_factory=dict)
    scalars: dict[str, Scalar] = field(default_factory=dict)
    step: type | None = None
    made_by_class: bool = False

    def merge(self, other: StateLayout) -> None:
        """Add the states of other hyper-parameters of the same class."""
        self.whole.update(other.whole)
        self.scalars |= other.scalars
        self.step = self.step or other.step
        self.made_by_class |= other.made_by_class


def inner_step(
    template: Optimizer,
    hyper: Mapping[str, Any],
    weights: torch.Tensor,
    gradient: torch.Tensor,
    state: State | None,
    grad_scale: torch.Tensor | None = None,
) -> tuple[Optimizer, State]:
    """One step of ``template``'s class on one tensor, which leaves ``template`` as it was.

    The step runs on a shallow clone: buckets may be updated from several threads, and whatever
    hooks and schedules wrapped around the client's own ``step`` must not run once per bucket.

    Returns:
        the clone and the parameter's state after the step.
    """
    kind = type(template)
    inner: Any = object.__new__(kind)
    inner.__dict__.update(template.__dict__)
    inner._optimizer_step_pre_hooks = OrderedDict()
    inner._optimizer_step_post_hooks = OrderedDict()
    parameter = nn.Parameter(weights, requires_grad=False)
    parameter.grad = gradient
    inner.param_groups = [{**template.defaults, **hyper, "params": [parameter]}]
    inner.state = defaultdict(dict)
    if state:
        inner.state[parameter] = state
    if grad_scale is not None:
        inner.grad_scale = grad_scale
    kind.step(inner)  # not inner.step, which torch's schedules wrap on the instance
    return inner, inner.state[parameter]


def probe(template: Optimizer, hyper: Mapping[str, Any]) -> StateLayout:
    """Find the states of ``template``'s class and make sure that it is elementwise.

    Args:
        template: an instance; it is not changed.
        hyper: hyper-parameters of one group.

    Raises:
        ConfigError: the class cannot update flat buckets; says why.
    """
    kind = type(template)
    name = f"{kind.__module__}.{kind.__qualname__}"
    # A large rate, so that a coupling between elements is never lost in rounding.
    rate = {"lr": 0.1} if "lr" in template.defaults else {}
    hyper = {key: value for key, value in {**hyper, **rate}.items() if key != "params"}
    created = _initial_state(template)
    generator = torch.Generator("cpu").manual_seed(0)
    weights, *gradients = (
        torch.randn(_SIDE * _SIDE, generator=generator, dtype=torch.float64, device="cpu")
        for _ in range(_STEPS + 1)
    )
    try:
        flat = _run(template, hyper, weights, gradients, created)
        # Buckets have hardly ever float64, which the dtype of a number may follow.
        _, state = _run(template, hyper, weights.float(), [g.float() for g in gradients], created)
        matrix = _run(
            template,
            hyper,
            weights.view(_SIDE, _SIDE),
            [gradient.view(_SIDE, _SIDE) for gradient in gradients],
            created,
        )
        halves = [
            _run(template, hyper, part, parts, created)
            for part, *parts in zip(*(t.chunk(2) for t in (weights, *gradients)), strict=True)
        ]
    except Exception as error:
        raise ConfigError(
            f"optimizer {name} cannot update flat parts of parameters: {type(error).__name__}: "
            f"{error}; use an elementwise optimizer such as AdamW"
        ) from error
    _refuse_coupling(name, flat[0], matrix[0], torch.cat([half[0] for half in halves]))
    layout = _layout(name, state, weights.numel(), created)
    if not layout.made_by_class:
        given: State = {key: torch.full_like(weights, value) for key, value in layout.whole.items()}
        if layout.step is not None:
            given["step"] = torch.zeros(()) if layout.step is torch.Tensor else 0
        again, _ = _run(template, hyper, weights, gradients, given)
        layout.made_by_class = not torch.equal(again, flat[0])
    return layout


def _initial_state(template: Optimizer) -> State:
    """States that the class makes in its constructor (Adagrad does), of any one parameter."""
    return next((dict(state) for state in template.state.values() if state), {})


def _run(
    template: Optimizer,
    hyper: Mapping[str, Any],
    weights: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    created: State,
) -> tuple[torch.Tensor, State]:
    """Weights and states after some steps; refuses state that is kept outside ``state``."""
    weights = weights.clone()
    state: State = {
        key: torch.full_like(weights, float(value.flatten()[0])) if value.dim() else value.clone()
        for key, value in created.items()
        if isinstance(value, torch.Tensor)
    }
    state.update({key: value for key, value in created.items() if isinstance(value, (int, float))})
    for gradient in gradients:
        before = {**template.defaults, **hyper}
        inner, state = inner_step(template, hyper, weights, gradient.clone(), state)
        after = {key: value for key, value in inner.param_groups[0].items() if key != "params"}
        if repr(after) != repr(before):
            raise TypeError("it keeps state in its param_groups")
        if _numbers(inner) != _numbers(template):
            raise TypeError("it keeps state in its own attributes")
    return weights, state


def _numbers(optimizer: Optimizer) -> dict[str, float]:
    return {k: v for k, v in vars(optimizer).items() if type(v) in (int, float)}


def _refuse_coupling(name: str, flat: torch.Tensor, *others: torch.Tensor) -> None:
    for other in others:
        if not torch.allclose(flat, other.flatten(), rtol=1e-9, atol=1e-12):
            raise ConfigError(
                f"optimizer {name} is not elementwise: it updates a matrix, its flattened form and "
                "the halves of that differently, but buckets are flat and cut anywhere; use an "
                "elementwise optimizer such as AdamW, or one that Drivetrain has a rule for "
                "(Lamb, Muon)"
            )


def _layout(name: str, state: State, numel: int, created: State) -> StateLayout:
    layout = StateLayout()
    for key, value in state.items():
        if value is None:
            continue
        if key == "step":
            layout.step = torch.Tensor if isinstance(value, torch.Tensor) else type(value)
        elif isinstance(value, torch.Tensor) and value.numel() == numel:
            layout.whole[key] = float(created[key].flatten()[0]) if key in created else 0.0
        elif isinstance(value, torch.Tensor) and value.numel() == 1:
            layout.scalars[key], layout.made_by_class = (value.dtype, value.shape), True
        elif type(value) in (int, float):
            layout.scalars[key], layout.made_by_class = type(value), True
        else:
            raise ConfigError(
                f"optimizer {name} keeps a state {key!r} that is neither elementwise nor one "
                f"number but {type(value).__name__}; use an elementwise optimizer such as AdamW"
            )
    return layout


def stored_dtype(kind: Scalar) -> torch.dtype:
    """The dtype of a state that has all values of ``kind``; whole numbers have 64 bits."""
    if isinstance(kind, type):
        return torch.int64 if kind is int else torch.float64
    return kind[0] if kind[0].is_floating_point else torch.int64


def as_kept(number: torch.Tensor, kind: Scalar) -> Any:
    """A 0-d tensor as a class keeps it that knows nothing of buckets; a copy."""
    if isinstance(kind, type):
        return kind(number.item())
    dtype, shape = kind
    return number.to(dtype, copy=True).view(shape)

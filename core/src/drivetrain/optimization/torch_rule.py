"""Any elementwise ``torch.optim`` class as an update rule."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from drivetrain.contracts.state.bucket import BucketSpec, BucketView, Hyper, StateSpec, UpdateRule
from drivetrain.errors import TrainingError
from drivetrain.optimization.spans import Span, is_one, span_size, spans, wide_dtype
from drivetrain.optimization.torch_probe import (
    Scalar,
    State,
    as_kept,
    inner_step,
    probe,
    stored_dtype,
)

_LATE_STEP = 2**40
"""A step at which ``1 - beta**step`` is 1: Adam as it is without bias correction."""


class TorchRule(UpdateRule):
    """Runs a ``torch.optim`` class on the flat weights of a bucket.

    The class sees one flat parameter per bucket, the hyper-parameters of the live group, and the
    states that the bucket's home keeps. What those states are is found out by running the class
    once, see :func:`~drivetrain.optimization.torch_probe.probe`. Torch's fused kernels are used
    where class and device have them; they also multiply by the scale in the same pass.

    Args:
        optimizer: an elementwise ``torch.optim`` class, or a client's instance, which is never
            stepped itself. Of an instance, the rule has the states that any of its groups needs.
        params: keyword arguments of the class.
        state_dtype: storage dtype of elementwise states; ``None`` for the bucket's.
        bias_correction: ``False`` switches Adam's bias correction off.

    Raises:
        ConfigError: the class is not elementwise, or cannot be run on flat tensors.
    """

    def __init__(
        self,
        optimizer: Optimizer | type[Optimizer],
        params: Mapping[str, Any] | None = None,
        *,
        state_dtype: torch.dtype | None = None,
        bias_correction: bool = True,
    ) -> None:
        if isinstance(optimizer, Optimizer):
            self._template = optimizer
        else:
            construct: Any = optimizer  # torch types the constructor of the base class only
            self._template = construct(example_parameters(), **(params or {}))
        self.defaults = dict(self._template.defaults)
        self._state_dtype = state_dtype
        self._late = not bias_correction
        self._fused: dict[tuple[torch.device, torch.dtype], bool] = {}
        # Of states of one number: the version that an update has left, and the number.
        self._left: MutableMapping[torch.Tensor, tuple[int, Any]] = WeakTensorKeyDictionary()
        # Groups may need different states, but hardly one group for each learning rate.
        common = {"params", "param_names", "lr", "initial_lr", "weight_decay"}
        distinct = {
            repr({key: value for key, value in group.items() if key not in common}): group
            for group in self._template.param_groups
        }
        first, *rest = distinct.values()
        self._layout = probe(self._template, first)
        for group in rest:
            self._layout.merge(probe(self._template, group))

    def states(self, bucket: BucketSpec) -> Sequence[StateSpec]:
        """Elementwise states, and those of one number as constant vectors.

        ``step`` is no state, since :attr:`BucketView.step` tells it. The other single numbers
        (NAdam, ASGD, counters of third-party classes) cost one per element, because only what is
        elementwise survives another layout.
        """
        layout = self._layout
        whole = [StateSpec(k, self._state_dtype, initial=v) for k, v in layout.whole.items()]
        numbers = sorted(layout.scalars.items())
        return [*whole, *(StateSpec(name, stored_dtype(kind)) for name, kind in numbers)]

    def update(self, bucket: BucketView, hyper: Hyper, scale: float | torch.Tensor) -> None:
        weights, whole = bucket.weights, self._layout.whole
        tensors = [weights, bucket.gradient, *(bucket.states[name] for name in whole)]
        alike = all(tensor.dtype == weights.dtype for tensor in tensors)
        in_place = alike and self._can_fuse(hyper, weights.device, weights.dtype)
        dtype = weights.dtype if in_place else wide_dtype(weights.dtype)
        fused = in_place or self._can_fuse(hyper, weights.device, dtype)
        if fused:
            hyper = {**hyper, "fused": True}
        # Kernels read grad_scale as fp32, which is too coarse for fp64 gradients.
        folded = fused and dtype != torch.float64 and not is_one(scale) and _inverts(scale)
        divisor = _reciprocal(scale, weights.device) if folded else None
        size = weights.numel() if in_place else span_size(weights.device)
        numbers: State = {}
        for span in spans(bucket, whole, 1.0 if folded else scale, dtype, size):
            numbers = self._update_span(bucket, span, hyper, divisor)
        for name, number in numbers.items():
            self._keep(bucket, name, number)

    def _update_span(
        self, bucket: BucketView, span: Span, hyper: Hyper, divisor: torch.Tensor | None
    ) -> State:
        """Update a piece; returns its states of one number, which are those of all others, too."""
        layout = self._layout
        state: State = {}
        if not (layout.made_by_class and bucket.step == 1):
            state = dict(span.states)
            for name, kind in layout.scalars.items():
                state[name] = self._kept(bucket.states[name], kind)
            if layout.step is not None:
                state["step"] = self._step_before(bucket, hyper)
        _, after = inner_step(
            self._template, hyper, span.weights, span.gradient, state, grad_scale=divisor
        )
        for name, kept in span.states.items():
            value = after.get(name)
            if value is not None and value is not kept:
                kept.copy_(value)
        for name, value in after.items():
            known = name in layout.whole or name in layout.scalars or name == "step"
            if not known and value is not None:
                raise TrainingError(
                    f"bucket {bucket.key}: the hyper-parameters of its group make "
                    f"{type(self._template).__name__} keep a state {name!r} that it did not keep "
                    "when it was made; set them for the whole optimizer from the beginning"
                )
        return {name: after[name] for name in layout.scalars.keys() & after.keys()}

    def _kept(self, flat: torch.Tensor, kind: Scalar) -> Any:
        """The number in a state, as the class keeps it; of a device it is asked after loads only.

        Memory of the host may be read into from files, which leaves the version of a tensor alone.
        """
        version, number = self._left.get(flat, (-1, None))
        known = version == flat._version and flat.device.type != "cpu"
        return number if known else as_kept(flat[0], kind)

    def _keep(self, bucket: BucketView, name: str, number: Any) -> None:
        flat = bucket.states[name]
        if torch.is_tensor(number):
            flat.fill_(number.flatten()[0])
            return
        if number != number // 1 and not flat.is_floating_point():
            raise TrainingError(
                f"bucket {bucket.key}: {type(self._template).__name__} keeps a state {name!r} that "
                f"was a whole number when it was made, and is {number} now; let it be a float then"
            )
        flat.fill_(number)
        self._left[flat] = flat._version, number

    def _step_before(self, bucket: BucketView, hyper: Hyper) -> torch.Tensor | float:
        step = float(_LATE_STEP if self._late else bucket.step - 1)
        if self._layout.step is not torch.Tensor:
            return int(step)
        on_device = hyper.get("fused") or hyper.get("capturable")
        device = bucket.weights.device if on_device else "cpu"
        return torch.full((), step, dtype=torch.float32, device=device)

    def _can_fuse(self, hyper: Hyper, device: torch.device, dtype: torch.dtype) -> bool:
        if "fused" not in self.defaults:
            return False
        wish = hyper.get("fused", self.defaults["fused"])
        if wish is False or hyper.get("foreach") or hyper.get("differentiable"):
            return False
        key = (device, dtype)
        if key not in self._fused:
            self._fused[key] = self._fuses(device, dtype)
        return self._fused[key]

    def _fuses(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether there is a fused kernel, and it divides the gradient by ``grad_scale``."""
        results: list[torch.Tensor] = []
        for fused, divisor in ((False, None), (True, torch.full((), 4.0, device=device))):
            weights = torch.ones(8, dtype=dtype, device=device)
            gradient = torch.full_like(weights, 4.0 if fused else 1.0)
            state: State = {
                name: torch.full_like(weights, value) for name, value in self._layout.whole.items()
            }
            if self._layout.step is not None:
                state["step"] = torch.zeros((), device=device if fused else "cpu")
            hyper = {"lr": 0.5, "fused": fused, "foreach": False}
            try:
                inner_step(self._template, hyper, weights, gradient, state, divisor)
            except (RuntimeError, AssertionError):  # torch's ways to say "no such kernel"
                return False
            results.append(torch.cat([weights, *(state[name] for name in self._layout.whole)]))
        return torch.allclose(results[0], results[1], rtol=1e-2)


def example_parameters() -> list[torch.Tensor]:
    """Something to construct an optimizer over; a matrix, because some classes take no vector."""
    return [torch.zeros(2, 2, device="cpu", requires_grad=True)]


def _inverts(scale: float | torch.Tensor) -> bool:
    """Whether fp32 holds the inverse, as far as that is known without asking the device."""
    return isinstance(scale, torch.Tensor) or scale > 1.0 / torch.finfo(torch.float32).max


def _reciprocal(scale: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    if isinstance(scale, torch.Tensor):
        return scale.reciprocal().to(device, torch.float32)
    return torch.full((), 1.0 / scale, dtype=torch.float32, device=device)

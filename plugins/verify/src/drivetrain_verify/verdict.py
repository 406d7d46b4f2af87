"""How far each parameter is from the reference, and how far rounding may take it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from drivetrain_verify.recording import MicroBatch
from drivetrain_verify.states import Values

_FLIPPED = 4.0
"""Elements within so many of the typical error around zero may have another sign."""


@dataclass(frozen=True)
class Finding:
    """One tensor of one step.

    Args:
        step: number of the step, from 1.
        parameter: its name.
        kind: ``"use"`` (its value in a forward), ``"gradient"``, ``"weight"`` (what the update
            made of it), or ``"output"``, where ``parameter`` says which one.
        error: norm of the difference to the reference.
        bound: what rounding explains.
        scale: norm of the reference.
        looks: what the difference looks like, where that can be told.
    """

    step: int
    parameter: str
    kind: str
    error: float
    bound: float
    scale: float
    looks: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether the difference is more than rounding; true of what is not a number."""
        return not self.error <= self.bound

    def __str__(self) -> str:
        what = {"gradient": "gradient", "use": "value in forward"}.get(self.kind, "update")
        looks = f"; {self.looks}" if self.looks else ""
        name = self.parameter if self.kind == "output" else f"{what} of parameter {self.parameter}"
        return (
            f"the {name} in step {self.step} is off by "
            f"{self.error:.3g} (the reference's norm is {self.scale:.3g}), and rounding explains "
            f"{self.bound:.3g}{looks}"
        )


@dataclass
class Verdict:
    """What the steps so far have shown.

    Args:
        worst: the finding of each parameter and kind that uses most of its bound.
        steps: how many have been compared.
    """

    worst: dict[tuple[str, str], Finding] = field(default_factory=dict)
    steps: int = 0

    def add(self, found: Finding) -> None:
        """Keep ``found`` if none of its parameter and kind was worse."""
        key = found.parameter, found.kind
        known = self.worst.get(key)
        if known is None or _share(found) > _share(known):
            self.worst[key] = found

    def lines(self) -> Iterator[str]:
        """A summary for people."""
        parameters = {name for name, _ in self.worst}
        yield f"{self.steps} steps of {len(parameters)} parameters agree with plain torch"
        for kind in ("gradient", "weight"):
            findings = [found for found in self.worst.values() if found.kind == kind]
            if findings:
                most = max(findings, key=_share)
                what = "gradients" if kind == "gradient" else "updates"
                yield (
                    f"{what}: at most {_share(most):.2g} of what rounding explains "
                    f"({most.parameter}, step {most.step})"
                )

    def data(self) -> dict[str, Any]:
        """The same as plain data."""
        worst = [{**asdict(found), "share": _share(found)} for found in self.worst.values()]
        return {"steps": self.steps, "worst": worst}


def wrong_uses(step: int, ranks: Sequence[Sequence[MicroBatch]]) -> Iterator[Finding]:
    """Parameters that a forward used with other values than those that the step began with."""
    for rank, batches in enumerate(ranks):
        for number, batch in enumerate(batches):
            if batch.wrong is not None:
                used = batch.wrong
                looks = (
                    f"micro-batch {number + 1} of rank {rank} did not use the weights that the "
                    "step began with"
                )
                yield Finding(
                    step, used.parameter, "use", used.error, used.bound, used.scale, looks
                )


def compare_gradients(
    step: int, actual: Values, exact: Values, plain: Values, factor: float, eps: float
) -> Iterator[Finding]:
    """Compare in the order of the module.

    Args:
        step: number of the step.
        actual: the engine's.
        exact: the reference's.
        plain: those of plain torch in the engine's precision.
        factor: see the config.
        eps: of the dtype in which gradients are made.
    """
    for name, reference in exact.items():
        off, scale = actual[name] - reference, float(reference.norm())
        bound = factor * (float((plain[name] - reference).norm()) + eps * scale)
        error = float(off.norm())
        looks = "" if error <= bound else _looks(actual[name], reference)
        yield Finding(step, name, "gradient", error, bound, scale, looks)


def compare_weights(
    step: int,
    actual: Values,
    exact: Values,
    plain: Values,
    gradients: tuple[Values, Values],
    rates: Mapping[str, float],
    factor: float,
    eps: float,
) -> Iterator[Finding]:
    """Compare what an update has made, in the order of the module.

    Optimizers that divide by the size of gradients (Adam) make full steps of elements that are
    nearly zero, whose sign is a matter of rounding. So those may differ by two steps.

    Args:
        step: number of the step.
        actual: the engine's new weights.
        exact: the reference's.
        plain: those of plain torch in the engine's precision.
        gradients: of the reference, and of plain torch.
        rates: parameter name -> learning rate; 0 where updates are linear in the gradient.
        factor: see the config.
        eps: of the dtype of masters.
    """
    for name, reference in exact.items():
        size = float(reference.norm())
        rounding = float((plain[name] - reference).norm()) + eps * size
        exact_gradient, plain_gradient = (values[name] for values in gradients)
        typical = (plain_gradient - exact_gradient).square().mean().sqrt()
        small = int((exact_gradient.abs() <= _FLIPPED * typical).sum())
        bound = factor * rounding + 2 * rates[name] * small**0.5
        error = float((actual[name] - reference).norm())
        yield Finding(step, name, "weight", error, bound, size)


def compare_outputs(
    step: int,
    ranks: Sequence[Sequence[MicroBatch]],
    exact: Sequence[Sequence[torch.Tensor]],
    plain: Sequence[Sequence[torch.Tensor]],
    factor: float,
) -> Iterator[Finding]:
    """What the module answered, in the order of ranks; those that are further off than rounding.

    A wrong value that is only added, such as a bias that is out of date, changes no gradient that
    is continued from the outputs.

    Args:
        step: number of the step.
        ranks: micro-batches of each rank.
        exact: outputs of the reference, of all micro-batches in that order.
        plain: those of plain torch in the engine's precision.
        factor: see the config.
    """
    places = [(rank, n) for rank, batches in enumerate(ranks) for n in range(len(batches))]
    for (rank, number), references, others in zip(places, exact, plain, strict=True):
        batch = ranks[rank][number]
        for index, (reference, other) in enumerate(zip(references, others, strict=True)):
            actual, scale = batch.outputs[index], float(reference.norm())
            eps = torch.finfo(actual.dtype).eps
            bound = factor * (float((other - reference).norm()) + eps * scale)
            error = float((actual.double() - reference).norm())
            if not error <= bound:
                name = f"output {index + 1} of micro-batch {number + 1} of rank {rank}"
                looks = _looks(actual.double(), reference)
                yield Finding(step, name, "output", error, bound, scale, looks)


def _share(found: Finding) -> float:
    return found.error / found.bound if found.bound else (float("inf") if found.error else 0.0)


def _looks(actual: torch.Tensor, reference: torch.Tensor) -> str:
    """What the difference is, if it is simple."""
    if not bool(torch.isfinite(actual).all()):
        return "some of its elements are not finite"
    size, power = float(actual.norm()), float(reference.square().sum())
    if size == 0:
        return "it is zero"
    if power == 0:
        return "the reference is zero"
    ratio = float((actual * reference).sum()) / power
    simple = float((actual - ratio * reference).norm()) < 1e-3 * size
    if simple and abs(ratio - 1) > 1e-3:
        return f"it is {ratio:.4g} times the reference"
    off = (actual - reference).abs()
    elements = int((off > 0.1 * off.max()).sum())
    return f"{elements} of its {actual.numel()} elements are off, the others less by far"

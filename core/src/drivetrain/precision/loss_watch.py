"""Sums the losses of a step and notices the first that is not a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from drivetrain.errors import TrainingError

if TYPE_CHECKING:
    from drivetrain.job.progress import Progress


class LossWatch:
    """Losses of the micro-batches since the last :meth:`take`, summed on the device.

    Args:
        device: where losses are. On a host the check is free and immediate; elsewhere reading a
            loss would stall the device, so a step checks the losses of the step before it.
    """

    def __init__(self, device: torch.device) -> None:
        self._immediate = device.type == "cpu"
        self._sum: torch.Tensor | None = None
        self._weight: float | torch.Tensor | None = None
        self._terms: torch.Tensor | None = None
        self._taken_terms: torch.Tensor | None = None
        self._unchecked: torch.Tensor | None = None
        self._unchecked_norm: torch.Tensor | None = None
        self._unchecked_divisor: torch.Tensor | None = None
        self._why = ""

    def add(
        self,
        loss: torch.Tensor,
        why: Callable[[torch.Tensor], str],
        factor: int = 1,
        weight: float | torch.Tensor | None = None,
    ) -> None:
        """Add one backward's loss.

        Args:
            loss: of one element.
            why: returns what is known if it is no number.
            factor: of the loss in the sum.
            weight: of the loss in a weighted mean; that of a loss which is NaN may be 0.
        """
        value = loss.detach().to(torch.promote_types(loss.dtype, torch.float32)).reshape(())
        if weight is None:
            value = value * factor
        else:
            value = weighted_loss(value, weight)
            self._weight = weight if self._weight is None else self._weight + weight
        self._sum = value if self._sum is None else self._sum + value
        if self._immediate and not self._why and not bool(torch.isfinite(value)):
            self._why = why(loss)  # while its graph is there

    def note_norm(self, norm: torch.Tensor | None) -> None:
        """Have the next :meth:`check` look at the norm of a step that did not wait for it."""
        self._unchecked_norm = None if self._immediate else norm

    def note_divisor(self, divisor: torch.Tensor) -> None:
        """Have the next :meth:`check` look at a sum of weights that the step did not wait for."""
        self._unchecked_divisor = None if self._immediate else divisor

    def check(self, overflow_is_normal: bool, progress: Progress) -> None:
        """Refuse to train on from a loss or gradients that are not finite.

        Args:
            overflow_is_normal: dynamic loss scaling, or a plugin, deals with it by itself.
            progress: tells the step for the message.

        Raises:
            TrainingError: a loss was NaN or infinite, or the last step's gradient norm, or the
                weights of the last step's losses made no positive sum.
        """
        value = self._sum if self._immediate else self._unchecked
        norm, self._unchecked_norm = self._unchecked_norm, None
        divisor, self._unchecked_divisor = self._unchecked_divisor, None
        self._unchecked = self._sum
        if divisor is not None and not bool(torch.isfinite(divisor)):
            raise TrainingError(
                f"the weights of the losses of step {progress.steps} had no positive sum, so "
                "parameters were updated as if its gradients were zero; load the last checkpoint"
            )
        if norm is not None and not bool(torch.isfinite(norm)):
            raise TrainingError(
                f"the gradient norm of step {progress.steps} was {float(norm)}, so parameters were "
                "updated as if its gradients were zero; load the last checkpoint"
            )
        if overflow_is_normal or value is None or bool(torch.isfinite(value)):
            return
        step = progress.steps + (1 if self._immediate else 0)
        raise TrainingError(
            f"the loss of step {step} is {float(value)}: parameters were not updated from it"
            + self._why
            if self._immediate
            else f"the loss of step {step} was {float(value)}; load the last checkpoint"
        )

    def forget(self) -> None:
        """Begin as if no loss had been seen: what follows comes from other parameters."""
        self.take()
        self._unchecked = self._unchecked_norm = self._unchecked_divisor = None

    @property
    def weight(self) -> float | torch.Tensor | None:
        """Sum of the weights since the last :meth:`take`, of this rank; ``None`` without any."""
        return self._weight

    def take(self) -> tuple[torch.Tensor | None, float | torch.Tensor | None]:
        """Return the sum of losses with their terms, and that of weights, since the last call."""
        total, terms, weight = self._sum, self._terms, self._weight
        self._taken_terms = terms
        self._sum, self._weight, self._why, self._terms = None, None, "", None
        if terms is not None:
            total = terms if total is None else total + terms
        return total, weight

    def add_term(self, value: torch.Tensor) -> None:
        """Add an extra term of a loss, times the weight of that loss."""
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        self._terms = value if self._terms is None else self._terms + value

    def with_terms(self, total: torch.Tensor) -> torch.Tensor:
        """Add the terms last taken to the sum of losses, [2], that a runner has returned."""
        terms, self._taken_terms = self._taken_terms, None
        return total if terms is None else total + torch.stack([terms, torch.zeros_like(terms)])


def weighted_loss(loss: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    """``loss * weight``, but 0 where the weight is 0: a mean over nothing is NaN."""
    product = loss * weight
    return torch.where(torch.as_tensor(weight, device=loss.device) == 0, 0.0, product)

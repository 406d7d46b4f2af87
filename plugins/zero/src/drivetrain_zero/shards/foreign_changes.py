"""Finding parameters that were changed where nobody keeps the change (``enable_sanity_checks``)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from drivetrain.errors import TrainingError
from drivetrain.states.changed_parameters import digests


class ForeignChanges:
    """Remembers what parameters showed when their owner last showed something.

    Reading every parameter costs about as much as copying it, each time it is gathered.

    Args:
        names: what messages call the parameters.
        parameters: of one bucket.
    """

    def __init__(self, names: Sequence[str], parameters: Sequence[nn.Parameter]) -> None:
        self._names = names
        self._parameters = parameters
        self._known: list[tuple[object, ...]] | None = None

    def note(self) -> None:
        """What the parameters show now is right."""
        self._known = [_seen(parameter) for parameter in self._parameters]

    def forget(self) -> None:
        """Their owner changes them from now on, until the next :meth:`note`."""
        self._known = None

    def check(self) -> None:
        """Compare with what was noted.

        Raises:
            TrainingError: a parameter is elsewhere, or has other values.
        """
        if self._known is None:
            return
        for name, parameter, known in zip(self._names, self._parameters, self._known, strict=True):
            if _seen(parameter) != known:
                raise TrainingError(
                    f"parameter {name} was changed outside of a step and the change would be "
                    "lost, or be on this rank only: change it inside "
                    "drivetrain.whole(parameters, write_rank=0), on every rank, and call "
                    "engine.states.refresh() then (zero_optimization.enable_sanity_checks)"
                )


def _seen(parameter: nn.Parameter) -> tuple[object, ...]:
    values = parameter.detach()
    return values.data_ptr(), values.shape, *digests([values])[0].tolist()

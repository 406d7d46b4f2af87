"""Set what the parameters of one bucket show, and find out if a script has changed it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from drivetrain.errors import TrainingError
from drivetrain.states.changed_parameters import digests
from drivetrain.states.whole import shows_client_tensor


class ShownParameters:
    """Sets the values that a script sees in the parameters of a bucket.

    Args:
        names: what messages call the parameters.
        parameters: of one bucket.

    Attributes:
        told: called whenever the parameters become whole (True) or are released (False).
        reads_values: remember what the parameters hold, too, which :meth:`check_values` compares
            (``enable_sanity_checks``). It costs about as much as a copy each time they are shown.
    """

    def __init__(self, names: Sequence[str], parameters: Sequence[nn.Parameter]) -> None:
        self._names = names
        self._parameters = parameters
        self._shown: tuple[Sequence[torch.Tensor], bool] = ((), False)
        self._versions: list[int] | None = None  # None: changes are nobody's loss
        self._values: list[tuple[object, ...]] | None = None
        self._checks = False
        self.reads_values = False
        self.told: Callable[[bool], None] | None = None

    def show(self, places: Sequence[torch.Tensor], whole: bool) -> None:
        """Let each parameter show its tensor of ``places``, which are all or nothing of it.

        Raises:
            TrainingError: what they have shown was changed.
        """
        self.check_values()
        self.refuse_changes()
        for parameter, place in zip(self._parameters, places, strict=True):
            parameter.data = place
        self._shown = places, whole
        if self._checks:
            self._versions = [parameter._version for parameter in self._parameters]
        self.note_values()
        if self.told is not None:
            self.told(whole)

    def refuse_changes(self) -> None:
        """Refuse what scripts have changed in place or reassigned, where that would be lost now.

        Raises:
            TrainingError: names the parameter.
        """
        if self._versions is None:
            return
        shown = zip(self._names, self._parameters, self._shown[0], self._versions, strict=True)
        for name, parameter, place, version in shown:
            if shows_client_tensor(parameter):
                continue  # changes are kept, or refused, when it ends
            if parameter._version != version or parameter.data_ptr() != place.data_ptr():
                raise TrainingError(
                    f"parameter {name} was changed outside of drivetrain.whole(), in place, by "
                    "parameter.data = ..., or by a forward (such as nn.Embedding(max_norm=...)), "
                    "where only this rank has the change and it would be lost: change it inside "
                    "drivetrain.whole(parameters, write_rank=0)"
                )

    def begin_checks(self) -> None:
        """Check from now on: what kept the parameters before has let go of them."""
        self._checks = True
        self.show(*self._shown)  # something else may have been shown since

    def end_checks(self) -> None:
        """Check no more: other states or the client have the parameters now."""
        self._checks = self.reads_values = False
        self._versions = self._values = None

    def trust(self) -> None:
        """Take what the parameters show now for right, even if a script has written it."""
        self._versions = None
        self.note_values()

    def note_values(self) -> None:
        """Remember the values, if they are read at all."""
        if self.reads_values:
            self._values = [fingerprint(parameter) for parameter in self._parameters]

    def forget_values(self) -> None:
        """Let the values change, until the next :meth:`note_values`."""
        self._values = None

    def check_values(self) -> None:
        """Compare with what was noted.

        Raises:
            TrainingError: a parameter is elsewhere, or has other values.
        """
        known = zip(self._names, self._parameters, self._values or (), strict=False)
        for name, parameter, values in known:
            if fingerprint(parameter) != values:
                raise TrainingError(
                    f"parameter {name} was changed outside of a step and the change would be "
                    "lost, or be on this rank only: change it inside "
                    "drivetrain.whole(parameters, write_rank=0), on every rank, and call "
                    "engine.states.refresh() then (zero_optimization.enable_sanity_checks)"
                )


def absent_like(whole: torch.Tensor) -> torch.Tensor:
    """Return what a released parameter shows: its shape, one number, and no memory."""
    number = float("nan") if whole.is_floating_point() else 0
    return torch.full((), number, dtype=whole.dtype, device=whole.device).expand(whole.shape)


def fingerprint(parameter: nn.Parameter) -> tuple[object, ...]:
    """Return what changes when the parameter does: where it is, and what is in it."""
    values = parameter.detach()
    return values.data_ptr(), values.shape, *digests([values])[0].tolist()

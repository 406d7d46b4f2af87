"""Put a function in the place of a module's own, until it is undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class InPlaceOf:
    """Gives one object another method; a class, and what else is of it, keep theirs.

    The object may have had one of its own before, such as another plugin's; it gets that back.

    Args:
        owner: a module, most often.
        name: of the method.
        function: what it is from now on.
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self._owner, self._name, self._function = owner, name, function
        own = vars(owner)
        self._before: list[Any] = [own[name]] if name in own else []
        setattr(owner, name, function)

    def undo(self) -> None:
        """Put back what was there, unless another has taken the place meanwhile."""
        if vars(self._owner).get(self._name) != self._function:
            return
        if self._before:
            setattr(self._owner, self._name, self._before[0])
        else:
            delattr(self._owner, self._name)

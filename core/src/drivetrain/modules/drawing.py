"""Initial values that are the same on any layout: drawn whole on the host, one module at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from drivetrain.errors import ConfigError

Initialiser = Callable[[str, torch.Tensor, torch.Generator], object]
"""Fills a whole tensor in host memory, given its name and its own stream of random numbers."""


@dataclass(frozen=True)
class Blank:
    """A tensor that needs initial values.

    Args:
        name: the client's.
        key: its name in the submodule that has it.
        shape: of the client's whole tensor.
        dtype: of its elements.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Drawing:
    """Makes initial values.

    Every stream of random numbers is named: for an initialiser by the tensor, and for
    ``reset_parameters``, which fills several, by the submodule in the client's module. So values
    depend neither on other tensors nor on the ranks, the device, or the script's own streams.

    Args:
        seed: of all streams.
        initialiser: fills one tensor; ``None`` for the submodules' ``reset_parameters``.
    """

    seed: int
    initialiser: Initialiser | None = None

    def can_draw(self, part: nn.Module) -> bool:
        """Whether there is something that gives tensors of ``part`` values."""
        return self.initialiser is not None or hasattr(part, "reset_parameters")

    def draw(
        self, part: nn.Module, blanks: Sequence[Blank]
    ) -> Iterator[tuple[Blank, torch.Tensor]]:
        """Values of whole tensors in host memory, one at a time where an initialiser fills them.

        Args:
            part: a submodule, which is left as it is.
            blanks: of its own parameters and buffers.

        Raises:
            ConfigError: a tensor was not given values, or values of another shape.
        """
        if self.initialiser is None:
            wholes = self._reset(part, blanks)
            who = f"{type(part).__name__}.reset_parameters()"
            for blank in blanks:
                yield blank, _checked(blank, wholes.pop(blank.key, None), who)
            return
        for blank in blanks:
            generator = torch.Generator().manual_seed(self._seed(blank.name))
            with torch.no_grad(), torch.device("cpu"):
                whole = _empty(blank.shape, blank.dtype)
                version = whole._version
                self.initialiser(blank.name, whole, generator)
            given = whole if _is_written(whole, version) else None
            yield blank, _checked(blank, given, "the initialiser")

    def _reset(self, part: nn.Module, blanks: Sequence[Blank]) -> dict[str, torch.Tensor]:
        stream = blanks[0].name.rpartition(".")[0]
        with torch.no_grad(), torch.device("cpu"), _host_stream(self._seed(stream)):
            return _reset(part, {b.key: _empty(b.shape, b.dtype) for b in blanks})

    def _seed(self, stream: str) -> int:
        digest = hashlib.sha256(repr((self.seed, "initial values", stream)).encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1  # torch takes seeds as signed integers


def _reset(part: nn.Module, blanks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run ``reset_parameters`` on stand-ins of all tensors of ``part``, in host memory.

    Returns:
        What it has written of ``blanks``, as far as that can be told.
    """
    own: list[dict[str, Any]] = [part._parameters, part._buffers]
    kept = [dict(tensors) for tensors in own]
    for tensors in own:
        for key, tensor in tensors.items():
            if tensor is not None:
                values = blanks[key] if key in blanks else _stand_in(tensor)
                is_parameter = tensors is part._parameters
                tensors[key] = nn.Parameter(values, requires_grad=False) if is_parameter else values
    before = {key: (getattr(part, key), getattr(part, key)._version) for key in blanks}
    try:
        reset: Any = part.reset_parameters
        reset()
        after = {key: getattr(part, key) for key in blanks}
        return {
            key: tensor.detach()
            for key, tensor in after.items()
            if tensor is not before[key][0] or _is_written(*before[key])
        }
    finally:
        for tensors, before in zip(own, kept, strict=True):
            tensors.clear()
            tensors.update(before)


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """What ``reset_parameters`` may overwrite in place of a tensor that keeps its values."""
    if tensor.is_meta:
        return _empty(tuple(tensor.shape), tensor.dtype)
    return tensor.detach().to("cpu", copy=True)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    whole = torch.empty(shape, dtype=dtype)
    return whole.fill_(float("nan")) if _shows_nan(whole) else whole.zero_()


def _is_written(tensor: torch.Tensor, version: int) -> bool:
    """Whether an empty tensor has values, unless NaN will tell; a mask of ``False`` would not."""
    written = _shows_nan(tensor) or tensor._version != version
    return written or not tensor.numel() or bool(tensor.to(torch.float32).any())


def _checked(blank: Blank, values: torch.Tensor | None, who: str) -> torch.Tensor:
    if values is not None and values.shape != blank.shape:
        raise ConfigError(
            f"{who} gave {blank.name} shape {list(values.shape)}; the client's tensor has shape "
            f"{list(blank.shape)}"
        )
    if values is None or (
        _shows_nan(values) and values.numel() and bool(torch.isnan(values).all())
    ):
        raise ConfigError(f"{who} gave {blank.name} no values, or NaN alone")
    return values


def _shows_nan(tensor: torch.Tensor) -> bool:
    return tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype.itemsize > 1)


@contextmanager
def _host_stream(seed: int) -> Iterator[None]:
    """Let the host's default generator begin at ``seed``; afterwards it goes on as if untouched."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)

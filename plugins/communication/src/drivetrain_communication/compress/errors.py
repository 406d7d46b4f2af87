"""What compression has left out, by the tensor that it was compressed in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from drivetrain_communication.compress.section import PATH

if TYPE_CHECKING:
    from drivetrain.contracts import StateReader, StateWriter


class Errors:
    """Tensors of one rank by name; they are saved for each rank.

    A checkpoint of another number of ranks restores none of them, which loading says.
    """

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}
        self._loaded: dict[str, torch.Tensor] = {}

    def of(self, name: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """The fp32 tensor kept under ``name``; zeros at first, and where its shape has changed."""
        kept = self._kept.get(name)
        if kept is None or kept.shape != shape:
            kept = self._kept[name] = torch.zeros(shape, dtype=torch.float32, device=device)
            loaded = self._loaded.pop(name, None)
            if loaded is not None and loaded.shape == shape:
                kept.copy_(loaded)
        return kept

    def is_new(self, name: str) -> bool:
        """Whether nothing is kept under ``name`` so far."""
        return name not in self._kept and name not in self._loaded

    def save(self, writer: StateWriter) -> None:
        """Write all, with their names."""
        everything = {**self._loaded, **self._kept}
        writer.put(f"{PATH}/names", [*everything], per_rank=True)
        for name, tensor in everything.items():
            writer.put(f"{PATH}/error of {name}", tensor, per_rank=True)

    def load(self, reader: StateReader) -> None:
        """Go on with what was saved, and forget the rest."""
        self._kept.clear()
        names = reader.get(f"{PATH}/names") or ()
        found = {name: reader.get(f"{PATH}/error of {name}") for name in names}
        self._loaded = {name: tensor for name, tensor in found.items() if tensor is not None}


def finite(error: torch.Tensor) -> torch.Tensor:
    """``error`` with zeros for what is infinite or NaN: that window is dropped, or clipped to 0."""
    return error.masked_fill_(~torch.isfinite(error), 0.0)

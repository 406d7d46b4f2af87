"""Construct modules in another dtype, or without values."""

from __future__ import annotations

from types import TracebackType

import torch


class OnDevice:
    """Modules constructed inside have floating parameters of ``dtype``, on ``device``.

    Args:
        dtype: of floating tensors that are made without a dtype of their own.
        device: where tensors are made; ``"meta"`` makes none.
        enabled: ``False`` makes the context do nothing.
    """

    def __init__(
        self, dtype: torch.dtype, device: str | torch.device = "meta", enabled: bool = True
    ) -> None:
        self._dtype = dtype
        self._device = torch.device(device)
        self._enabled = enabled
        self._before: torch.dtype | None = None

    def __enter__(self) -> None:
        if self._enabled:
            self._before = torch.get_default_dtype()
            torch.set_default_dtype(self._dtype)
            self._device.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._before is not None:
            self._device.__exit__(kind, error, traceback)
            torch.set_default_dtype(self._before)
            self._before = None

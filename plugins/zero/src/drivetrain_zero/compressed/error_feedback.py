"""LoCo: what quantising gradients has lost is added to the next ones (arXiv:2407.04480).

[Note: why it works] With ``h = g + e`` sent as ``q`` and ``e' = (1 - beta) e + beta (h - q)``,
``q = g + (e - e') / beta``. So over any number of steps the sum of what was sent differs from the
sum of the gradients by ``(e_first - e_last) / beta``, which does not grow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from drivetrain.contracts import Fragment
from drivetrain.states.device_home import bucket_fragment
from drivetrain_zero.compressed.block_codec import BlockCodec

_STORED = BlockCodec("int8")


@dataclass(eq=False)
class KeptErrors:
    """The errors of one bucket, kept as int8 messages.

    Args:
        messages: one for each row that is quantised, uint8 [rows, message bytes].
        seen: the step in which they were last used.
    """

    messages: torch.Tensor
    seen: int = -1


class ErrorFeedback:
    """Moving averages of quantisation errors, by key.

    Args:
        beta: weight of the newest error, in (0, 1].
        reset_every: steps after which errors are forgotten.
        steps: tells how many steps are done.
    """

    def __init__(self, beta: float, reset_every: int, steps: Callable[[], int]) -> None:
        self._beta = beta
        self._reset_every = reset_every
        self._steps = steps
        self._kept: dict[str, KeptErrors] = {}

    def reserve(self, key: str, rows: int, numel: int, device: torch.device) -> Fragment:
        """Start from zero for the ``rows`` of ``numel`` gradients that ``key`` quantises.

        Returns:
            The errors as part of a checkpoint; they belong to a rank and its layout.
        """
        shape = (rows, _STORED.message_bytes(numel))
        messages = torch.zeros(shape, dtype=torch.uint8, device=device)
        self._kept[key] = KeptErrors(messages)
        return bucket_fragment(key, "quantization_error", messages.view(-1), "device")

    def of(self, key: str, rows: int, numel: int, device: torch.device) -> KeptErrors:
        """The errors of ``key`` for use in this step."""
        if key not in self._kept:
            self.reserve(key, rows, numel, device)
        kept, step = self._kept[key], self._steps()
        if step != kept.seen:
            if step % self._reset_every == 0:
                kept.messages.zero_()
            kept.seen = step
        return kept

    def encode(
        self,
        rows: Iterable[torch.Tensor],
        codec: BlockCodec,
        messages: torch.Tensor,
        errors: torch.Tensor,
    ) -> None:
        """Quantise each of ``rows`` with its error added, and keep the new errors."""
        for row, message, error in zip(rows, messages, errors, strict=True):
            numel = row.numel()
            old = _STORED.decode(error, numel)
            wanted = row.float() + old
            codec.encode(wanted, message)
            lost = wanted.sub_(codec.decode(message, numel))
            new = old.lerp_(lost, self._beta)
            # A window with infinite gradients is dropped; it must not spoil the next ones.
            _STORED.encode(new.masked_fill_(~torch.isfinite(new), 0.0), error)

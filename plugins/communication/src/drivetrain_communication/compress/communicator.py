"""The layer: which collectives are compressed, and how."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Protocol

import torch

from drivetrain.contracts import (
    Axis,
    Collective,
    Communicator,
    CommunicatorWrapper,
    Handle,
    Kind,
    Op,
    Purpose,
)
from drivetrain_communication.compress.blocks import BlockCodec
from drivetrain_communication.compress.errors import Errors
from drivetrain_communication.compress.low_rank import Matrix, PowerSGD
from drivetrain_communication.compress.quantized import Quantized
from drivetrain_communication.compress.section import CompressSection, Method
from drivetrain_communication.compress.top_k import TopK

if TYPE_CHECKING:
    from drivetrain.contracts import BucketSpec

EXPERTS = "experts"
"""Site of the collectives that carry experts' tokens."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SUMS = (Kind.ALL_REDUCE, Kind.REDUCE_SCATTER)


class _Method(Protocol):
    """One way of compressing."""

    @property
    def kinds(self) -> frozenset[Kind]:
        """Collectives that it can carry out."""

    def sent_bytes(self, collective: Collective, size: int) -> int:
        """About what is sent in place of the tensor; it has to be less."""

    def run(self, collective: Collective, inner: Communicator, name: str) -> Handle:
        """Carry it out."""


class Compressed(CommunicatorWrapper):
    """Compresses collectives by their purpose; all others go on as they are.

    Only sums and moves of floating-point tensors, only where what is sent becomes smaller, and only
    from a size on that the config sets. All ranks decide alike, since tensors of one collective are
    alike.

    Args:
        inner: carries the messages.
        section: what is compressed, and how.

    Attributes:
        errors: what compression has left out.
    """

    def __init__(self, inner: Communicator, section: CompressSection) -> None:
        super().__init__(inner)
        self.errors = Errors()
        self._matrices: dict[str, tuple[Matrix, ...]] = {}
        self._chosen: dict[str, tuple[Method, _Method]] = {
            purpose: (how, self._make(how))
            for purpose, how in dict(section).items()
            if how is not None
        }

    def _make(self, how: Method) -> _Method:
        if how.method == "powersgd":
            return PowerSGD(how.rank, self._matrices, self.errors)
        if how.method == "top_k":
            return TopK(how.density, self.errors)
        return Quantized(BlockCodec(how.method, how.block), self.errors if how.feeds_back else None)

    def learn(self, specs: Sequence[BucketSpec]) -> None:
        """Note which matrices lie where in buckets that ranks have whole."""
        for spec in specs:
            self._matrices[spec.key] = tuple(
                Matrix(s.offset, s.shape[0], prod(s.shape[1:]))
                for s in spec.segments
                if len(s.shape) > 1 and s.numel == prod(s.shape) > 0
            )

    # -- what is read in place goes by no message -------------------------------------------------

    def reads_settled(self, input: torch.Tensor, axis: Axis) -> bool:
        return "weights" not in self._chosen and super().reads_settled(input, axis)

    def joined_page(self, axis: Axis) -> int:
        return 0 if "weights" in self._chosen else super().joined_page(axis)

    def joined_buffer(self, numel: int, dtype: torch.dtype, axis: Axis) -> torch.Tensor | None:
        return None if "weights" in self._chosen else super().joined_buffer(numel, dtype, axis)

    # ---------------------------------------------------------------------------------------------

    def run(self, collective: Collective) -> Handle:
        purpose = _purpose_of(collective)
        if purpose in self._chosen:
            how, method = self._chosen[purpose]
            if self._pays(collective, how, method):
                name = f"{collective.tag}, {collective.kind} over {collective.axis}"
                return method.run(collective, self.inner, name)
        return self.inner.run(collective)

    def _pays(self, c: Collective, how: Method, method: _Method) -> bool:
        if c.kind not in method.kinds or (c.kind in _SUMS and c.op is not Op.SUM):
            return False
        if any(tensor.dtype not in _DTYPES or tensor.is_meta for tensor in c.tensors):
            return False
        size = self.size(c.axis)
        if size == 1 or c.flaw(size, self.rank(c.axis)) is not None:
            return False  # inner says what is wrong
        if c.input_splits is not None or c.output_splits is not None:
            return True  # ranks send different numbers of rows, and have to decide alike
        nbytes = c.input.nbytes
        return nbytes >= how.minimum_bytes and method.sent_bytes(c, size) < nbytes


def _purpose_of(collective: Collective) -> str:
    """What the section calls what ``collective`` carries; empty for what is never compressed."""
    tag = collective.tag
    if tag.purpose is Purpose.ACTIVATION:
        return "experts" if tag.site == EXPERTS else "activations"
    return {Purpose.GRADIENT: "gradients", Purpose.WEIGHT: "weights"}.get(tag.purpose, "")

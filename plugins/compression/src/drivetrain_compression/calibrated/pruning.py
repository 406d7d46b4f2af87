"""Pruning after training: SparseGPT (arXiv 2301.00774) and Wanda (arXiv 2306.11695)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from drivetrain.errors import ConfigError
from drivetrain_compression.calibrated.gptq import Inverse


@dataclass(frozen=True)
class Pattern:
    """Which weights of a row go.

    Args:
        ratio: share of weights that go.
        kept: weights that stay of ``of`` neighbours in a row; 0: any weights may go.
        of: neighbours.
    """

    ratio: float
    kept: int = 0
    of: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """A pattern such as ``2:4`` (two of four stay), or a share that goes, such as ``0.5``.

        Raises:
            ConfigError: it is neither, or nothing would be left.
        """
        if found := re.fullmatch(r"(\d+):(\d+)", text):
            kept, of = int(found[1]), int(found[2])
            if 0 < kept < of:
                return cls(1 - kept / of, kept, of)
        elif re.fullmatch(r"0?\.\d+", text) and 0 < float(text) < 1:
            return cls(float(text))
        raise ConfigError(
            f"pattern {text!r} must be N:M with 0 < N < M, or a share of weights between 0 and 1"
        )

    def mask(self, scores: torch.Tensor, *, by_row: bool) -> torch.Tensor:
        """True where a weight stays: the largest of ``scores`` [out, in].

        Args:
            scores: of weights.
            by_row: compare within a row; else all weights are compared. N:M knows neighbours only.
        """
        if self.of:
            blocks = scores.view(len(scores), -1, self.of)
            top = blocks.topk(self.kept, dim=2).indices
            return torch.zeros_like(blocks, dtype=torch.bool).scatter_(2, top, True).view_as(scores)
        flat = scores if by_row else scores.reshape(1, -1)
        number = int(flat.shape[1] * self.ratio)
        low = flat.topk(number, dim=1, largest=False).indices
        kept = torch.ones_like(flat, dtype=torch.bool).scatter_(1, low, False)
        return kept.view_as(scores)

    def check(self, columns: int) -> None:
        """Make sure that a row of ``columns`` weights can be pruned so.

        Raises:
            ConfigError: neighbours do not divide it.
        """
        if self.of and columns % self.of:
            raise ConfigError(f"{self.of} neighbours do not divide the {columns} inputs")


def wanda(weight: torch.Tensor, squares: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """``weight`` [out, in] without what counts least: size times the norm of its input.

    Args:
        weight: [out, in].
        squares: [in], sums of squares of the inputs; the diagonal of the Hessian.
        pattern: of what stays.
    """
    return weight * pattern.mask(weight.abs() * squares.sqrt(), by_row=True)


def sparsegpt(
    weight: torch.Tensor, inverse: Inverse, pattern: Pattern, *, block: int = 128
) -> torch.Tensor:
    """``weight`` [out, in] with weights removed, and the others changed to make up for it.

    What goes is chosen for ``block`` columns at a time, or for each set of neighbours, when the
    errors of all earlier columns have been made up for.
    """
    upper, rest = inverse.upper, weight.clone()
    rest[:, inverse.dead] = 0
    for start in range(0, rest.shape[1], block):
        stop = min(start + block, rest.shape[1])
        local, errors = upper[start:stop, start:stop], torch.zeros_like(rest[:, start:stop])
        part = rest[:, start:stop]
        diagonal = local.diagonal()
        kept = torch.ones_like(part, dtype=torch.bool)
        if not pattern.of:
            kept = pattern.mask((part / diagonal).square(), by_row=False)
        for i in range(stop - start):
            if pattern.of and i % pattern.of == 0:
                near = slice(i, i + pattern.of)
                kept[:, near] = pattern.mask((part[:, near] / diagonal[near]).square(), by_row=True)
            new = part[:, i] * kept[:, i]
            errors[:, i] = (part[:, i] - new) / diagonal[i]
            part[:, i:] -= torch.outer(errors[:, i], local[i, i:])
            part[:, i] = new
        rest[:, stop:] -= errors @ upper[start:stop, stop:]
    return rest

"""Orthogonal matrices that spread what is large over all features: randomised Hadamard matrices.

A Hadamard matrix has entries 1 and -1 and orthogonal rows; divided by the root of its order it is
orthogonal. Orders are multiplied by Sylvester's doubling, and begin with Paley's constructions
(Paley 1933, "On orthogonal matrices"), so 576 = 16 x 36 or 896 = 32 x 28 have one, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_LARGEST_FACTOR = 64
"""Powers of two are products of matrices up to this order, so no large matrix is ever made."""


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix [n, n]: signs on the diagonal, times a Kronecker product.

    Args:
        signs: [n], 1 or -1, float64.
        factors: orthogonal matrices, float64; the product of their orders is n.
    """

    signs: torch.Tensor
    factors: tuple[torch.Tensor, ...]

    @classmethod
    def random(cls, order: int, seed: int) -> Rotation:
        """A Hadamard matrix with random signs; where none is known of an odd part of ``order``,
        that part is a random orthogonal matrix.
        """
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (order,), generator=generator).double() * 2 - 1
        base, doublings = _parts(order)
        first = _paley(base)
        if first is None:
            drawn = torch.randn(base, base, generator=generator, dtype=torch.float64)
            first = torch.linalg.qr(drawn).Q
        else:
            first = first / math.sqrt(base)
        factors = [first] if base > 1 else []
        most = int(math.log2(_LARGEST_FACTOR))
        while doublings:
            factors.append(sylvester(min(most, doublings)))
            doublings -= min(most, doublings)
        return cls(signs, tuple(factors))

    @property
    def order(self) -> int:
        """N."""
        return len(self.signs)

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """``x Q`` for x [..., n], float64."""
        return _by_factors(x.double() * self.signs.to(x.device), self.factors)

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """``x Q^T`` for x [..., n], float64."""
        return _by_factors(x.double(), [f.T for f in self.factors]) * self.signs.to(x.device)


def sylvester(doublings: int) -> torch.Tensor:
    """The orthogonal matrix [2^k, 2^k] of k doublings, float64."""
    made = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    for _ in range(doublings):
        made = torch.kron(made, step)
    return made


def _by_factors(x: torch.Tensor, factors: Sequence[torch.Tensor]) -> torch.Tensor:
    lead = x.shape[:-1]
    found = x.reshape(-1, *(len(factor) for factor in factors))
    for factor in factors:  # each axis in turn goes to the end, so that the order stays
        found = torch.tensordot(found, factor.to(x.device), dims=([1], [0]))
    return found.reshape(*lead, x.shape[-1])


def _parts(order: int) -> tuple[int, int]:
    """A base and doublings: the smallest base with a Hadamard matrix, else the odd part."""
    most = (order & -order).bit_length() - 1
    for doublings in range(most, -1, -1):
        base = order >> doublings
        if base == 1 or _field(base) is not None:
            return base, doublings
    return order >> most, most


def _field(base: int) -> int | None:
    """The prime q of Paley's first (q + 1) or second construction (2 (q + 1)) of order ``base``."""
    if base % 4:
        return None
    if _prime(base - 1):
        return base - 1  # 3 more than a multiple of 4, as the base is a multiple
    half = base // 2 - 1
    return half if half % 4 == 1 and _prime(half) else None


def _paley(base: int) -> torch.Tensor | None:
    """The Hadamard matrix [base, base] of Paley; ``None`` if he has none."""
    if base == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    prime = _field(base)
    if prime is None:
        return None
    squares = {x * x % prime for x in range(1, prime)}
    sign = [0.0, *(1.0 if x in squares else -1.0 for x in range(1, prime))]
    at = torch.arange(prime)
    core = torch.tensor(sign, dtype=torch.float64)[(at[:, None] - at[None]) % prime]
    bordered = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    bordered[0, 1:], bordered[1:, 1:] = 1.0, core
    one = torch.eye(prime + 1, dtype=torch.float64)
    if prime % 4 == 3:
        bordered[1:, 0] = -1.0
        return bordered + one
    bordered[1:, 0] = 1.0
    plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(bordered, plus.double()) + torch.kron(one, minus.double())


def _prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))

"""Small models that are awkward to shard; ``forward(inputs, targets)`` is a mean loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from drivetrain.testing.data import vectors
from drivetrain.testing.reference import Case

WIDTH = 8


class Block(nn.Module):
    """A residual block whose sizes are no multiples of anything."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, hidden)
        self.down = nn.Linear(hidden, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Body(nn.Module):
    """Three blocks, a head, and a loss; subclasses walk through the blocks in their own way."""

    def __init__(self, hidden: tuple[int, ...] = (7, 13, 5)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(size) for size in hidden)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        outputs = self.head(self.walk(inputs))
        return F.mse_loss(outputs.float(), targets.float())

    def walk(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Uneven(Body):
    """With a scalar, a parameter without elements, one that nobody uses, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.blocks[0].none = nn.Parameter(torch.empty(0, 3))
        self.nothing = nn.Parameter(torch.empty(0))
        self.idle = nn.Parameter(torch.ones(3))
        self.register_buffer("shift", torch.linspace(-1, 1, WIDTH))

    def walk(self, x: torch.Tensor) -> torch.Tensor:
        return super().walk(x * self.gain + self.shift.to(x.dtype)) + self.nothing.sum()


class Tiny(nn.Module):
    """Three elements in all."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, -0.25]))
        self.shift = nn.Parameter(torch.tensor(0.1))

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        outputs = inputs[:, :2] * self.scale + self.shift
        return F.mse_loss(outputs.float(), targets[:, :2].float())


class Shared(Body):
    """Weights tied over two blocks and with the head, and one block that is called twice."""

    def __init__(self) -> None:
        super().__init__((8, 8, 8))
        self.blocks[2].up.weight = self.blocks[0].up.weight
        self.blocks[1].down.weight = self.head.weight

    def walk(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third = self.blocks
        return second(third(second(first(x))))


class Recomputed(Body):
    """Blocks inside checkpoints, one of them also used outside."""

    reentrant = False

    def walk(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third = self.blocks
        x = first(x)
        x = checkpoint(second, x, use_reentrant=self.reentrant)
        x = checkpoint(lambda y: third(first(y)), x, use_reentrant=self.reentrant)
        return second(x)


class RecomputedReentrant(Recomputed):
    reentrant = True


class Adapter(nn.Module):
    """A frozen linear layer with a low-rank update that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.a = nn.Linear(WIDTH, 3, bias=False)
        self.b = nn.Linear(3, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.base(x) + self.b(self.a(x)))


class Adapted(Body):
    """Adapters on frozen layers; the head is frozen.

    A block keeps weights as bytes, which are used outside of the block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Adapter() for _ in range(3))
        self.head.requires_grad_(False)
        packed = torch.randint(0, 256, (WIDTH, WIDTH), dtype=torch.uint8)
        self.blocks[1].packed = nn.Parameter(packed, requires_grad=False)
        index = torch.randperm(WIDTH)
        self.order = nn.Parameter(index, requires_grad=False)

    def walk(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x[:, self.order])
        weight = (self.blocks[1].packed.to(x.dtype) - 128) / 256
        return x + F.linear(x, weight)


class PackedInside(Adapted):
    """The bytes are used where they lie, in the block's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].register_forward_hook(_add_packed)

    def walk(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x[:, self.order])
        return x


def _add_packed(
    module: nn.Module, _inputs: tuple[torch.Tensor, ...], outputs: torch.Tensor
) -> torch.Tensor:
    weight = (module.packed.to(outputs.dtype) - 128) / 256
    return outputs + F.linear(outputs, weight)


class Routed(Body):
    """Experts of which a batch uses one, chosen by its data; those of a block are one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(2))

    def walk(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return super().walk(x)


class Experts(nn.Module):
    """Four experts; the others get no gradient in this batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.experts = nn.ModuleList(Block(5) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = int(x.detach().float().abs().sum() * 7) % 4
        return self.experts[chosen](torch.tanh(self.gate(x)))


class Skipping(Body):
    """Whole blocks are skipped for some batches, so ranks walk differently."""

    def walk(self, x: torch.Tensor) -> torch.Tensor:
        skipped = int(inputs_key(x)) % 3
        for number, block in enumerate(self.blocks):
            if number != skipped:
                x = block(x)
        return x


def inputs_key(x: torch.Tensor) -> float:
    """A number that differs between batches."""
    return float(x.detach().float().abs().sum() * 7)


class Embedded(nn.Module):
    """Rows of an embedding whose gradient torch keeps sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(50, WIDTH, sparse=True)
        self.blocks = nn.ModuleList(Block(7) for _ in range(2))

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.rows((inputs * 10).long().clamp(-20, 29) + 20).mean(1)
        for block in self.blocks:
            x = block(x)
        return F.mse_loss(x.float(), targets.float())


def _seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(7)
    return kind()


def body() -> nn.Module:
    return _seeded(Body)


def uneven() -> nn.Module:
    return _seeded(Uneven)


def tiny() -> nn.Module:
    return _seeded(Tiny)


def shared() -> nn.Module:
    return _seeded(Shared)


def recomputed() -> nn.Module:
    return _seeded(Recomputed)


def recomputed_reentrant() -> nn.Module:
    return _seeded(RecomputedReentrant)


def adapted() -> nn.Module:
    return _seeded(PackedInside)


def used_outside() -> nn.Module:
    return _seeded(Adapted)


def routed() -> nn.Module:
    return _seeded(Routed)


def skipping() -> nn.Module:
    return _seeded(Skipping)


def embedded() -> nn.Module:
    return _seeded(Embedded)


BODY, UNEVEN, TINY, SHARED, RECOMPUTED, REENTRANT, ADAPTED, ROUTED, SKIPPING, EMBEDDED = (
    Case(model, vectors)
    for model in (
        body,
        uneven,
        tiny,
        shared,
        recomputed,
        recomputed_reentrant,
        adapted,
        routed,
        skipping,
        embedded,
    )
)

USED_OUTSIDE = Case(used_outside, vectors)

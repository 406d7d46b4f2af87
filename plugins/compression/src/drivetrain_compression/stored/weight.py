"""A frozen weight that stays packed: its bytes, whole or one rank's part of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from drivetrain.contracts import WeightFormat
from drivetrain.errors import ConfigError

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its newer name


class StoredWeight(nn.Module):
    """A weight [out, in] in a format, as bytes, which no optimizer, cast or partition changes.

    Whole, the bytes are the buffer ``packed``, saved like any other. In ``shards``, each rank has
    one of equal parts of rank 0's bytes, and all ranks of the world gather them together whenever
    the weight is used: then they must make and use the same weights in the same order. Shards are
    not saved: a loaded model has those that it was made with.

    Args:
        weight: [out, in], floating.
        format: how to pack it.
        shards: 1, or the size of the world.

    Raises:
        ConfigError: the weight is no finite matrix, the format cannot hold it, or the world has
            another size.

    Attributes:
        shape: [out, in].
        dtype: of the weight when it was packed, and of :meth:`dequantized`.
        rounds_inputs: whether products in eval mode round what they multiply with, as some formats
            do. May be set to false for a while by who compares two ways to compute a model:
            rounding makes small differences large.
    """

    packed: torch.Tensor
    rounds_inputs: bool

    def __init__(self, weight: torch.Tensor, format: WeightFormat, shards: int = 1) -> None:
        super().__init__()
        if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
            kind = f"{weight.dtype} {list(weight.shape)}"
            raise ConfigError(f"{kind} cannot be stored in few bits: it is no matrix of floats")
        if weight.is_meta:
            raise ConfigError("a weight on the meta device has no values to pack")
        if not bool(torch.isfinite(weight).all()):
            raise ConfigError(f"the weight {list(weight.shape)} holds numbers that are not finite")
        self.format, self.shape, self.dtype = format, weight.shape, weight.dtype
        self.rounds_inputs = _rounds(format)
        self.shards = _shards(shards)
        # Before what packing needs for a while, which would else leave holes between weights.
        whole = torch.empty(format.bytes(weight.shape), dtype=torch.uint8, device=weight.device)
        views, packed = self._views(whole), format.pack(weight)
        for name, view in views.items():
            view.copy_(packed[name])
        self._own: torch.Tensor | None = None
        if self.shards == 1:
            self.register_buffer("packed", whole)
        else:
            dist.broadcast(whole, 0)  # as an engine does with what each rank has whole
            padded = nn.functional.pad(whole, (0, -len(whole) % self.shards))
            self._own = padded.chunk(self.shards)[dist.get_rank()].clone()

    @classmethod
    def of(
        cls,
        format: WeightFormat,
        parts: Mapping[str, torch.Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> StoredWeight:
        """A weight of ``shape`` [out, in] that ``format`` has packed into ``parts`` already."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.format, made.shape, made.dtype = format, torch.Size(shape), dtype
        made.shards, made._own = 1, None
        made.rounds_inputs = _rounds(format)
        device = next(iter(parts.values())).device
        whole = torch.empty(format.bytes(shape), dtype=torch.uint8, device=device)
        for name, view in made._views(whole).items():
            view.copy_(parts[name])
        made.register_buffer("packed", whole)
        return made

    def _layout(self) -> list[tuple[str, Sequence[int], torch.dtype]]:
        """Parts in their order in memory: larger numbers first, so that all are aligned."""
        parts = self.format.tensors(self.shape).items()
        found = [(name, shape, dtype) for name, (shape, dtype) in parts]
        return sorted(found, key=lambda part: -part[2].itemsize)

    @property
    def stored(self) -> torch.Tensor:
        """The bytes that this rank keeps, uint8."""
        return self.packed if self._own is None else self._own

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.stored.device

    def parts(self) -> dict[str, torch.Tensor]:
        """What the format packed, as views. Collective if the weight is in shards."""
        whole = self.stored
        if self._own is not None:
            whole = torch.empty(len(self._own) * self.shards, dtype=torch.uint8, device=self.device)
            _all_gather(whole, self._own)
        return self._views(whole)

    def _views(self, whole: torch.Tensor) -> dict[str, torch.Tensor]:
        found, at = {}, 0
        for name, shape, dtype in self._layout():
            size = torch.Size(shape).numel() * dtype.itemsize
            found[name] = whole[at : at + size].view(dtype).view(*shape)
            at += size
        return found

    def dequantized(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight [out, in], as near as the format is. Collective if it is in shards."""
        parts, wanted = self.parts(), dtype or self.dtype
        exact = any(part.dtype == torch.float64 for part in parts.values())
        if wanted == torch.float64 and not exact:  # kernels have no float64
            return self.format.unpack(parts, self.shape, torch.float32).double()
        return self.format.unpack(parts, self.shape, wanted)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ weight.T``: [..., in] -> [..., out] in the dtype of ``x``; differentiable in ``x``.

        In eval mode through the format's own product, which may round inputs, too.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        own = not self.training and self.rounds_inputs == _rounds(self.format)
        result: torch.Tensor = _multiplied(x, self, False, own)
        return result

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._own is not None:
            self._own = fn(self._own)
        return self

    def extra_repr(self) -> str:
        """Shape, format, bytes."""
        kind = type(self.format).__name__
        return f"{list(self.shape)}, {kind}, {self.stored.numel():,} bytes, shards={self.shards}"


class _Product(torch.autograd.Function):
    """``x W^T``, or ``x W``; keeps nothing of W, which backward unpacks again."""

    @staticmethod
    def forward(x: torch.Tensor, weight: StoredWeight, turned: bool, own: bool) -> torch.Tensor:
        if own and not turned and x.dtype != torch.float64:
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            outputs = weight.shape[0]
            product = weight.format.multiply(rows, weight.parts(), outputs)
            return product.view(*x.shape[:-1], outputs)
        values = weight.dequantized(x.dtype)
        return nn.functional.linear(x, values.T if turned else values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, ctx.weight, ctx.turned, _ = inputs

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        # Linear in the gradient, so its own gradient is the product again.
        return _multiplied(gradient, ctx.weight, not ctx.turned, False), None, None, None


_multiplied: Callable[..., torch.Tensor] = _Product.apply


def _rounds(format: WeightFormat) -> bool:
    return bool(getattr(format, "rounds_inputs", False))


def _shards(wanted: int) -> int:
    world = dist.get_world_size() if dist.is_initialized() else 1
    if wanted not in (1, world):
        hint = "" if dist.is_initialized() else "; call drivetrain.init_distributed() first"
        raise ConfigError(
            f"base_weight_sharding: {wanted} parts, but the world has {world} "
            f"rank{'s' * (world != 1)}; it is 1 or their number{hint}"
        )
    return wanted

"""Sizes that a module's own forward reads, such as its number of heads, made those of one rank.

Which of them have to change, nobody says: those that the forward reads are tried in turn, until it
computes from a rank's part of the columns what the whole one does, and the numbers agree.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from drivetrain_tensor.cutting import Cut
from drivetrain_tensor.layout import length
from drivetrain_tensor.probing import Probe
from drivetrain_tensor.products import Product
from drivetrain_tensor.regions import Region

_MOST = 2048
"""Combinations that are tried."""


@dataclass(frozen=True)
class Size:
    """A number that modules of one class hold, or their config.

    Args:
        owner: class of the module.
        name: of the attribute.
        value: that of the whole model.
        in_config: whether it is read from ``module.config``.
    """

    owner: type
    name: str
    value: int
    in_config: bool = False


@dataclass(frozen=True)
class Slice:
    """A parameter inside of a region of which each group has some elements along a dimension.

    Args:
        name: of the parameter.
        dim: that is cut.
    """

    name: str
    dim: int


@dataclass(frozen=True)
class Adaptation:
    """What changes beside the layers.

    Args:
        sizes: sizes and their values on this rank.
        slices: parameters that are cut.
    """

    sizes: Mapping[Size, int] = field(default_factory=dict)
    slices: tuple[Slice, ...] = ()


class Adapter:
    """Finds what to change so that a region computes with parts of its columns.

    Args:
        probe: the model.
        region: that is cut.
        cut: what each rank has of it.
    """

    def __init__(self, probe: Probe, region: Region, cut: Cut) -> None:
        self.probe, self.region, self.cut = probe, region, cut
        whole = probe.run(last=region.consumers[-1])
        self.expected = {consumer: whole.inputs(consumer) for consumer in region.consumers}
        self.modules = modules_between(probe.model, region)

    def find(self) -> list[Adaptation] | None:
        """One adaptation for each rank, or ``None``."""
        sizes, known = self._sizes(), dict[tuple[Fraction, ...], Adaptation]()
        found = []
        for rank in range(len(self.cut.groups)):
            shares = self._shares(rank)
            tried = [known[shares]] if shares in known else self._options(sizes, shares)
            adaptation = next((each for each in tried if self._works(rank, each)), None)
            if adaptation is None:
                return None
            known[shares] = adaptation
            found.append(adaptation)
        return found

    def _shares(self, rank: int) -> tuple[Fraction, ...]:
        """What this rank has of each layer."""
        columns = zip(self.region.sources, self.cut.outputs, strict=True)
        rows = zip(self.region.consumers, self.cut.inputs, strict=True)
        return (
            *(Fraction(cut.used(rank), p.outputs) for p, cut in columns),
            *(Fraction(length(cut[rank]), p.inputs) for p, cut in rows),
        )

    def _sizes(self) -> list[Size]:
        """Numbers that are read while the region computes."""
        read: dict[Size, None] = {}
        with _recording(self.modules, read):
            self.probe.run(last=self.region.consumers[-1])
        return list(read)

    def _options(self, sizes: Sequence[Size], shares: tuple[Fraction, ...]) -> Iterator[Adaptation]:
        parts = sorted({share for share in shares if share != 1})
        values = [
            [size.value, *(int(size.value * p) for p in parts if (size.value * p).denominator == 1)]
            for size in sizes
        ]
        cuts = self._slices()
        every = itertools.product(*values)
        ranked = sorted(itertools.islice(every, _MOST), key=lambda v: self._changes(sizes, v))
        for count in range(len(cuts) + 1):
            for slices in itertools.combinations(cuts, count):
                if len({cut.name for cut in slices}) < count:
                    continue
                for chosen in ranked:
                    changed = {s: v for s, v in zip(sizes, chosen, strict=True) if v != s.value}
                    yield Adaptation(changed, slices)

    @staticmethod
    def _changes(sizes: Sequence[Size], values: Sequence[int]) -> int:
        return sum(value != size.value for size, value in zip(sizes, values, strict=True))

    def _slices(self) -> list[Slice]:
        groups, found = self.cut.groups[-1][1], []
        for name in sorted(self.region.inside - self.region.outside):
            shape = self.probe.stand_ins[name].shape
            found += [Slice(name, d) for d, n in enumerate(shape) if n >= groups and not n % groups]
        return found

    def _works(self, rank: int, adaptation: Adaptation) -> bool:
        """Whether this rank's part computes what the whole one does."""
        index = {
            product: torch.tensor(cut.features(rank))
            for product, cut in zip(self.region.sources, self.cut.outputs, strict=True)
        }

        def answer(product: Product, base: torch.Tensor) -> torch.Tensor:
            return base[..., index[product]] if product in index else base

        with self._sliced(rank, adaptation.slices), adapted(self.modules, adaptation.sizes):
            trace = self.probe.run(answer, last=self.region.consumers[-1])
        return trace.error is None and all(
            self._agrees(trace.inputs(consumer), consumer, cut[rank])
            for consumer, cut in zip(self.region.consumers, self.cut.inputs, strict=True)
        )

    def _agrees(
        self, found: list[torch.Tensor], consumer: Product, own: tuple[tuple[int, int], ...]
    ) -> bool:
        expected = self.expected[consumer]
        if len(found) != len(expected):
            return False
        for x, whole in zip(found, expected, strict=True):
            part = torch.cat([whole[..., start:stop] for start, stop in own], -1)
            if x.shape != part.shape or not torch.allclose(x, part, rtol=1e-4, atol=1e-5):
                return False
        return True

    @contextmanager
    def _sliced(self, rank: int, slices: Sequence[Slice]) -> Iterator[None]:
        kept = {cut.name: self.probe.stand_ins[cut.name] for cut in slices}
        for cut in slices:
            whole = kept[cut.name]
            start, stop = slice_of(whole.shape[cut.dim], self.cut, rank)
            self.probe.stand_ins[cut.name] = whole.narrow(cut.dim, start, stop - start)
        try:
            yield
        finally:
            self.probe.stand_ins.update(kept)


def slice_of(extent: int, cut: Cut, rank: int) -> tuple[int, int]:
    """This rank's interval of a dimension of which every group has as many elements."""
    each = extent // cut.groups[-1][1]
    start, stop = cut.groups[rank]
    return start * each, stop * each


def common_module(model: nn.Module, paths: Sequence[str]) -> tuple[str, nn.Module]:
    """The innermost module that has all of ``paths`` inside, and its path."""
    split = [path.split(".")[:-1] for path in paths]
    common = list(
        itertools.takewhile(lambda names: len(set(names)) == 1, zip(*split, strict=False))
    )
    path = ".".join(names[0] for names in common)
    return path, model.get_submodule(path)


def homes(model: nn.Module, region: Region) -> dict[Product, tuple[str, nn.Module]]:
    """For each consumer the innermost module around it and the layers that it reads."""
    found = {}
    for consumer, sources in region.reads.items():
        near = [s for s in sources if s.kind != "embedding"] or sources
        found[consumer] = common_module(model, [p.path for p in (consumer, *near)])
    return found


def modules_between(model: nn.Module, region: Region) -> list[nn.Module]:
    """Modules whose forwards may read sizes of the region."""
    layers = {p.module for p in (*region.sources, *region.consumers)}
    every = (m for _, home in homes(model, region).values() for m in home.modules())
    return list(dict.fromkeys(module for module in every if module not in layers))


@contextmanager
def adapted(modules: Sequence[nn.Module], sizes: Mapping[Size, int]) -> Iterator[None]:
    """Change sizes of ``modules``, and set them back."""
    kept = [(module, dict(module.__dict__)) for module in modules]
    try:
        adapt(modules, sizes)
        yield
    finally:
        for module, values in kept:
            module.__dict__.clear()
            module.__dict__.update(values)


def adapt(modules: Sequence[nn.Module], sizes: Mapping[Size, int]) -> None:
    """Change sizes of ``modules``; a config that has one is copied for its module."""
    for module in modules:
        for size, value in sizes.items():
            if type(module) is not size.owner:
                continue
            if not size.in_config:
                if module.__dict__.get(size.name) == size.value:
                    module.__dict__[size.name] = value
            elif getattr(module.config, size.name, None) == size.value:
                config: Any = copy.copy(module.config)
                setattr(config, size.name, value)
                module.__dict__["config"] = config


@contextmanager
def _recording(modules: Sequence[nn.Module], read: dict[Size, None]) -> Iterator[None]:
    """Note which numbers of ``modules`` and of their configs are read."""
    classes = [(module, type(module)) for module in modules]
    configs = [(m, m.__dict__["config"]) for m in modules if "config" in m.__dict__]
    try:
        for module, config in configs:
            seen: Any = copy.copy(config)
            object.__setattr__(seen, "__class__", _watched(type(config), type(module), read, True))
            module.__dict__["config"] = seen
        for module, kind in classes:
            module.__class__ = _watched(kind, kind, read, False)
        yield
    finally:
        for module, kind in classes:
            module.__class__ = kind
        for module, config in configs:
            module.__dict__["config"] = config


def _watched(kind: type, owner: type, read: dict[Size, None], in_config: bool) -> Any:
    read_attribute: Any = kind.__getattribute__

    def look(self: Any, name: str) -> Any:
        value = read_attribute(self, name)
        if type(value) is int and value > 1 and not name.startswith("_"):
            read[Size(owner, name, value, in_config)] = None
        return value

    return type(kind.__name__, (kind,), {"__getattribute__": look})

"""Which layers can be cut together: found in one run of the model, without any name.

A *region* lies between layers whose outputs are cut (columns) and layers whose inputs are (rows):
Megatron-LM's f and g (https://arxiv.org/abs/1909.08053, section 3). Outputs of a layer reach inputs
of others, which the graph that autograd records tells. Layers that are connected so make up one
region: queries, keys and values with the projection that follows, or the halves of an MLP. The
stream of residuals connects all layers that write to it with all that read it, which is a region
that cannot be cut, because a norm mixes features.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from drivetrain_tensor.probing import Probe, Trace, tensors_of
from drivetrain_tensor.products import Product


@dataclass(eq=False)
class Region:
    """Layers that have to be cut together.

    Args:
        sources: their outputs are read in it.
        consumers: their inputs are computed in it.
        reads: for each consumer the sources that reach it.
        inside: names of parameters that are used in it, beside those of layers.
        outside: those among them that are used elsewhere, too.
        leaks: whether a source reaches the output of the model.
    """

    sources: list[Product]
    consumers: list[Product]
    reads: dict[Product, list[Product]]
    inside: set[str] = field(default_factory=set)
    outside: set[str] = field(default_factory=set)
    leaks: bool = False

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for regions that are built alike."""
        names = [p.path.split(".") for p in (*self.sources, *self.consumers)]
        depth = next(
            (i for i, parts in enumerate(zip(*names, strict=False)) if len(set(parts)) > 1),
            min(map(len, names)),
        )
        layers = [
            (
                ".".join("#" if s.isdigit() else s for s in parts[depth:]),
                type(p.module),
                p.kind,
                p.inputs,
                p.outputs,
            )
            for parts, p in zip(names, (*self.sources, *self.consumers), strict=True)
        ]
        return (len(self.sources), *layers)


def find_regions(probe: Probe, trace: Trace) -> list[Region]:
    """Group layers by what reaches what, in the order in which the model runs them."""
    graph = _Graph(probe, trace)
    reads: dict[Product, set[Product]] = {}
    inside: dict[Product, set[str]] = {}
    for call in trace.calls:
        products, names = graph.behind([call.x])
        reads.setdefault(call.product, set()).update(products)
        inside.setdefault(call.product, set()).update(names)
    leaking, outside = graph.behind(tensors_of(trace.output))
    order = {product: number for number, product in enumerate(reads)}
    found = []
    for consumers in _connected(reads):
        sources = {source for consumer in consumers for source in reads[consumer]}
        region = Region(
            sorted(sources, key=order.__getitem__),
            sorted(consumers, key=order.__getitem__),
            {c: sorted(reads[c], key=order.__getitem__) for c in consumers},
            set().union(*(inside[c] for c in consumers)),
            leaks=bool(sources & leaking),
        )
        found.append(region)
    for region in found:
        others = outside.union(*(r.inside for r in found if r is not region))
        region.outside = region.inside & others
    return sorted(found, key=lambda region: order[region.consumers[0]])


def _connected(reads: dict[Product, set[Product]]) -> list[list[Product]]:
    """Consumers that share a source, directly or through others."""
    leader: dict[Product, Product] = {}
    group: dict[Product, list[Product]] = {}
    for consumer, sources in reads.items():
        if not sources:
            continue
        met = {id(leader[s]): leader[s] for s in sources if s in leader}
        merged = [consumer, *(c for first in met.values() for c in group.pop(first))]
        group[consumer] = merged
        for member in merged:
            for source in reads[member]:
                leader[source] = consumer
    return list(group.values())


class _Graph:
    """What lies behind tensors of a trace: answers of layers, and parameters.

    Args:
        probe: the model.
        trace: of a run with gradients.
    """

    def __init__(self, probe: Probe, trace: Trace) -> None:
        self._leaves: dict[int, Product | str] = {}
        for name, tensor in probe.stand_ins.items():
            if tensor.requires_grad:
                self._leaves.setdefault(id(tensor), name)
        for call in trace.calls:
            self._leaves[id(call.y)] = call.product
        self._behind: dict[torch.autograd.graph.Node, frozenset[Product | str]] = {}

    def behind(self, tensors: Iterable[torch.Tensor]) -> tuple[set[Product], set[str]]:
        """Layers and parameters that ``tensors`` are computed from."""
        found: set[Product | str] = set()
        for tensor in tensors:
            if tensor.grad_fn is not None:
                found |= self._of(tensor.grad_fn)
            elif id(tensor) in self._leaves:
                found.add(self._leaves[id(tensor)])
        products = {leaf for leaf in found if isinstance(leaf, Product)}
        return products, {leaf for leaf in found if isinstance(leaf, str)}

    def _of(self, root: torch.autograd.graph.Node) -> frozenset[Product | str]:
        stack = [root]
        while stack:
            node = stack[-1]
            if node in self._behind:
                stack.pop()
                continue
            variable = getattr(node, "variable", None)
            if variable is not None:
                leaf = self._leaves.get(id(variable))
                self._behind[node] = frozenset() if leaf is None else frozenset({leaf})
                continue
            before = [n for n, _ in node.next_functions if n is not None]
            todo = [n for n in before if n not in self._behind]
            if todo:
                stack += todo
            else:
                self._behind[node] = frozenset().union(*(self._behind[n] for n in before))
        return self._behind[root]

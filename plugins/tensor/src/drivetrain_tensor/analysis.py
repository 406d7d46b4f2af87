"""What to cut in a model, decided from one sample on one process; the same on every rank."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain_tensor.adapting import Adaptation, Adapter, homes
from drivetrain_tensor.cutting import Cut, NotBatched, TooFewGroups, cut_region, gathered
from drivetrain_tensor.probing import Probe, Trace, sample_inputs
from drivetrain_tensor.products import Product, find_products, shared_weights
from drivetrain_tensor.regions import Region, find_regions
from drivetrain_tensor.rules import Rules

_UNREACHED = "the sample does not reach it"

logger = logging.getLogger("drivetrain.tensor")


@dataclass
class Decision:
    """One region and how it is cut.

    Args:
        region: layers.
        cut: which features each rank has.
        adaptations: for each rank.
    """

    region: Region
    cut: Cut
    adaptations: Sequence[Adaptation]


@dataclass
class Vocabulary:
    """A table of tokens, and the layer that computes a number for each of them.

    Args:
        tables: embeddings of the same rows.
        heads: layers whose outputs are the rows.
    """

    tables: list[Product]
    heads: list[Product]


@dataclass
class Analysis:
    """What is cut in a model, and what is not.

    Args:
        probe: the model and its sample.
        decisions: regions that are cut.
        vocabularies: tables that are.
        kept: path of a layer -> why every rank has all of it.
    """

    probe: Probe
    decisions: list[Decision] = field(default_factory=list)
    vocabularies: list[Vocabulary] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def columns_and_rows(self) -> tuple[set[Product], set[Product]]:
        """Layers whose outputs are cut, and layers whose inputs are."""
        columns = {p for d in self.decisions for p in d.region.sources}
        columns |= {p for v in self.vocabularies for p in v.heads}
        return columns, {p for d in self.decisions for p in d.region.consumers}

    def describe(self) -> str:
        """How many layers are cut, and which are not."""
        columns, rows = self.columns_and_rows()
        tables = {p for v in self.vocabularies for p in (*v.tables, *v.heads)}
        gather = sum(d.cut.whole for d in self.decisions)
        text = f"{len(columns)} layers cut by columns, {len(rows)} by rows, {len(tables)} by tokens"
        if gather:
            text += f"; in {gather} regions ranks compute the same, as their sizes do not follow"
        reasons: dict[str, list[str]] = {}
        for path, reason in self.kept.items():
            reasons.setdefault(reason, []).append(path)
        for reason, paths in reasons.items():
            more = f" and {len(paths) - 2} more" if len(paths) > 2 else ""
            text += f"; whole on every rank: {', '.join(paths[:2])}{more} ({reason})"
        return text


def analyse(model: nn.Module, ranks: int, rules: Rules, *, vocabulary: bool = True) -> Analysis:
    """Decide what to cut in ``model`` for ``ranks`` ranks. Leaves it as it is.

    Raises:
        ConfigError: the model cannot be run with a sample; fewer heads than ranks; rules that name
            what cannot be cut as they say.
    """
    with torch.device("cpu"), torch.inference_mode(False):
        products = find_products(model)
        rules.check(products)
        probe, trace = _probe(model, products)
        analysis = Analysis(probe)
        _regions(analysis, trace, ranks, rules)
        if vocabulary:
            _vocabularies(analysis, trace, ranks, rules)
        _note_rest(analysis, trace)
        rules.check_cut(products, *analysis.columns_and_rows(), analysis.kept)
    return analysis


def _probe(model: nn.Module, products: list[Product]) -> tuple[Probe, Trace]:
    try:
        args, kwargs = sample_inputs(model, products)
    except LookupError as error:
        raise ConfigError(
            f"tensor_parallel finds layers by running the model, and {type(model).__name__} did "
            "not run with any sample that was tried: set model.drivetrain_sample = (args, kwargs) "
            f"with a batch of one ({error})"
        ) from error
    probe = Probe(model, products, args, kwargs)
    return probe, probe.first_run()


def _regions(analysis: Analysis, trace: Trace, ranks: int, rules: Rules) -> None:
    taken: set[Product] = set()
    known: dict[object, tuple[Region, tuple[Cut, Sequence[Adaptation]] | str]] = {}
    tied = shared_weights(analysis.probe.model)
    for region in find_regions(analysis.probe, trace):
        layers = {*region.sources, *region.consumers}
        reason = _unfit(region, taken, tied) or rules.keeps(layers)
        if reason is None:
            stand_ins = analysis.probe.stand_ins
            shapes = tuple(stand_ins[name].shape for name in _in_order(region.inside))
            key = (region.key, shapes, bool(region.outside))
            if key not in known:
                known[key] = region, _decide(analysis.probe, region, ranks)
            first, found = known[key]
            if isinstance(found, str):
                reason = found
            else:
                taken |= layers
                cut, adaptations = found
                moved = [_moved(adaptation, first, region) for adaptation in adaptations]
                analysis.decisions.append(Decision(region, cut, moved))
        if reason is not None:
            analysis.kept |= {p.path: reason for p in region.consumers if p not in taken}


def _moved(adaptation: Adaptation, first: Region, region: Region) -> Adaptation:
    """What was found for a region, for another one like it, whose parameters have other names."""
    names = dict(zip(_in_order(first.inside), _in_order(region.inside), strict=True))
    slices = tuple(replace(each, name=names[each.name]) for each in adaptation.slices)
    return replace(adaptation, slices=slices)


def _in_order(names: Iterable[str]) -> list[str]:
    """Names in an order that is the same in all blocks: numbers in them count as numbers."""
    return sorted(names, key=lambda n: [(len(part), part) for part in n.split(".")])


def _unfit(region: Region, taken: set[Product], tied: set[int]) -> str | None:
    """Why a region cannot be cut, before its features are looked at."""
    layers = [*region.sources, *region.consumers]
    if len(set(layers)) < len(layers):
        return "what it reads is also read further on"
    if region.leaks:
        return "its outputs are outputs of the model"
    if any(p in taken for p in layers):
        return "a neighbour is cut already"
    if any(p.kind == "embedding" for p in region.consumers):
        return "positions are computed from it"
    if all(p.kind == "embedding" for p in region.sources):
        return "it reads embeddings alone"
    if any(id(t) in tied for p in layers for t in p.module._parameters.values() if t is not None):
        return "its weight is tied"
    if region.outside:
        return f"{min(region.outside)} is used outside as well"
    return None


def _decide(probe: Probe, region: Region, ranks: int) -> tuple[Cut, Sequence[Adaptation]] | str:
    try:
        cut = cut_region(probe, region, ranks)
    except NotBatched as error:
        return f"the model does not run with several samples: {error}"[:200]
    except TooFewGroups as found:
        if found.groups <= 1:
            return "all of its inputs depend on all of what it reads"
        raise ConfigError(
            f"{region.consumers[0].path} reads {found.groups} independent groups of features "
            f"(heads), of which {ranks} tensor-parallel ranks cannot all have one: use at most "
            f"{found.groups} ranks, or keep it whole with a layer_spec of partition_type skip"
        ) from None
    own = [c for p, c in zip(region.sources, cut.outputs, strict=True) if p.kind == "embedding"]
    if not any(order is not None for c in own for order in c.order):
        adaptations = Adapter(probe, region, cut).find()
        if adaptations is not None:
            return cut, adaptations
    return gathered(region, cut), [Adaptation()] * ranks


def _vocabularies(analysis: Analysis, trace: Trace, ranks: int, rules: Rules) -> None:
    """Find heads: layers that no other reads, as wide as an embedding has rows."""
    called = dict.fromkeys(call.product for call in trace.calls)
    taken = {p for d in analysis.decisions for p in (*d.region.sources, *d.region.consumers)}
    free = [p for p in called if p not in taken and rules.keeps([p]) is None]
    for table in [p for p in free if p.kind == "embedding"]:
        if any(table in v.tables for v in analysis.vocabularies) or table.inputs < ranks:
            continue
        rows = table.inputs
        heads = [p for p in free if p.kind == "linear" and p.outputs == rows and p.inputs != rows]
        tied = [p for p in heads if p.weight is table.weight]
        tables = [p for p in analysis.probe.products if p.weight is table.weight]
        tables = [p for p in tables if p.kind == "embedding"]
        weights = {id(p.weight) for p in (*tables, *(tied or heads))}
        if heads and _all_places_known(analysis.probe.model, weights, [*tables, *(tied or heads)]):
            analysis.vocabularies.append(Vocabulary(tables, tied or heads))
    for vocabulary in analysis.vocabularies:
        for product in (*vocabulary.tables, *vocabulary.heads):
            analysis.kept.pop(product.path, None)


def _all_places_known(model: nn.Module, weights: set[int], products: list[Product]) -> bool:
    """Whether every module that has one of ``weights`` is among ``products``."""
    known = {p.module for p in products}
    return all(
        module in known
        for module in model.modules()
        for parameter in module._parameters.values()
        if id(parameter) in weights
    )


def _note_rest(analysis: Analysis, trace: Trace) -> None:
    called = {call.product for call in trace.calls}
    cut = set().union(*analysis.columns_and_rows())
    cut |= {p for v in analysis.vocabularies for p in v.tables}
    analysis.kept = {
        p.path: analysis.kept.get(p.path, "it has no partner") if p in called else _UNREACHED
        for p in analysis.probe.products
        if p not in cut and (p.kind != "embedding" or p not in called)
    }


def home_modules(analysis: Analysis) -> dict[nn.Module, list[int]]:
    """Modules around regions that are cut -> numbers of these."""
    found: dict[nn.Module, list[int]] = {}
    for number, decision in enumerate(analysis.decisions):
        if not decision.cut.whole:
            for _, module in homes(analysis.probe.model, decision.region).values():
                if number not in found.setdefault(module, []):
                    found[module].append(number)
    return found

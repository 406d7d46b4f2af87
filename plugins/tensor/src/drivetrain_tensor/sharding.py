"""Cutting a model as an analysis says: layers, sizes, and facts about parameters."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drivetrain.communication.functional import functional
from drivetrain.contracts import Placement, Purpose, Tag
from drivetrain.states.units import units
from drivetrain_tensor.adapting import adapt, modules_between, slice_of
from drivetrain_tensor.analysis import Analysis, Decision, Vocabulary, home_modules
from drivetrain_tensor.cutting import Cut
from drivetrain_tensor.halves import HalvedModule, Halving
from drivetrain_tensor.layers import (
    STREAM,
    ColumnLayer,
    Columns,
    Lane,
    RowLayer,
    Rows,
    SeededModule,
    Table,
    TableLayer,
    TokenColumns,
    take_over,
)
from drivetrain_tensor.layout import Outputs, Part, Runs, length, shares

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain_tensor.products import Product

logger = logging.getLogger("drivetrain.tensor")

AXIS = "tp"


class Sharding:
    """Cuts one model.

    Args:
        job: its axis ``tp`` shares the layers out.
        model: changed in place.
        overlap: whether gradients of inputs are summed while those of weights are computed.
        lazy: whether logits are gathered when something other than their loss reads them.
        in_parts: whether ranks share out sequences between regions.
        halved: whether repeated blocks compute in halves of the batch.
    """

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        *,
        overlap: bool = False,
        lazy: bool = True,
        in_parts: bool = False,
        halved: bool = False,
    ) -> None:
        self._job, self._model, self._overlap, self._lazy = job, model, overlap, lazy
        self._in_parts, self._halved = in_parts, halved
        self._rank = job.mesh.coordinate(AXIS)
        tag = Tag(Purpose.ACTIVATION, site="tensor parallel")
        self._tp = functional(job.communicator, AXIS, tag)
        job.random.declare(STREAM, ("pp", "dp", "sp", "tp"))
        self._cut: set[int] = set()
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._places.setdefault(id(parameter), []).append((module, name))

    def apply(self, analysis: Analysis) -> None:
        """Keep this rank's part of everything that ``analysis`` cuts."""
        homes = home_modules(analysis)
        lanes = [self._lane(decision) for decision in analysis.decisions]
        for decision, lane in zip(analysis.decisions, lanes, strict=True):
            self._region(decision, lane, analysis)
        for vocabulary in analysis.vocabularies:
            self._vocabulary(vocabulary)
        for module, numbers in homes.items():
            take_over(module, SeededModule)
            module.tensor_lanes = tuple(lanes[number] for number in numbers)  # type: ignore[assignment]
        if self._halved:
            self._halve()

    def _halve(self) -> None:
        """Let blocks with sums in them compute in halves."""
        for unit in units(self._model):
            block: Any = unit.module
            if block is not self._model and any(isinstance(m, RowLayer) for m in block.modules()):
                take_over(block, HalvedModule)
                block.tensor_halving = Halving(unit.name, self._tp)

    def _lane(self, decision: Decision) -> Lane:
        random = None if decision.cut.whole else self._job.random
        return Lane(self._tp, random, overlap=self._overlap, in_parts=self._in_parts)

    def _region(self, decision: Decision, lane: Lane, analysis: Analysis) -> None:
        region, cut = decision.region, decision.cut
        adaptation = decision.adaptations[self._rank]
        adapt(modules_between(self._model, region), adaptation.sizes)
        self._inside(region.inside, decision, analysis)
        for product, outputs in zip(region.sources, cut.outputs, strict=True):
            if product.kind != "embedding":
                self._column(product, outputs, lane)
            elif cut.whole:
                self._add_terms([product.weight])
            else:
                self._keep(product.weight, 1, outputs.kept[self._rank])
                product.module.embedding_dim = outputs.used(self._rank)  # type: ignore[assignment]
        for product, inputs in zip(region.consumers, cut.inputs, strict=True):
            self._row(product, inputs[self._rank], cut, lane)

    def _inside(self, names: Iterable[str], decision: Decision, analysis: Analysis) -> None:
        """Parameters that are used between the layers: every rank has a term of the gradient."""
        cuts = {cut.name: cut.dim for cut in decision.adaptations[self._rank].slices}
        for name in sorted(names):
            path, _, key = name.rpartition(".")
            parameter = self._model.get_submodule(path)._parameters[key]
            assert parameter is not None
            if name in cuts:
                extent = parameter.shape[cuts[name]]
                interval = slice_of(extent, decision.cut, self._rank)
                self._keep(parameter, cuts[name], (interval,))
            else:
                self._add_terms([parameter])

    def _add_terms(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            info = self._job.parameters.info(parameter)
            axes = info.reduction if isinstance(info.reduction, tuple) else (info.reduction,)
            if AXIS not in axes:
                info.reduction = (*axes, AXIS)

    def _column(self, product: Product, outputs: Outputs, lane: Lane) -> None:
        order = outputs.order[self._rank]
        picked = None if order is None else torch.tensor(order)
        own, longest = outputs.own[self._rank], _longest(outputs)
        self._take_columns(product, outputs, Columns(lane, product.kind, own, longest, picked))

    def _head(self, product: Product, lane: Lane) -> None:
        ranks = self._job.mesh.size(AXIS)
        outputs = Outputs.of([tuple(range(ranks))] * product.outputs, ranks)
        order = outputs.order[self._rank]
        assert order is not None
        columns = TokenColumns(
            lane,
            product.kind,
            _longest(outputs),
            torch.tensor(order),
            start=shares(product.outputs, ranks)[self._rank][0],
            extent=product.outputs,
            lazy=self._lazy,
        )
        self._take_columns(product, outputs, columns)

    def _take_columns(self, product: Product, outputs: Outputs, columns: Columns) -> None:
        kept = outputs.kept[self._rank]
        self._keep(product.weight, product.out_dim, kept)
        if product.bias is not None:
            self._keep(product.bias, 0, kept)
        module: Any = product.module
        take_over(module, ColumnLayer)
        module.tensor_columns = columns
        if hasattr(module, "out_features"):
            module.out_features = length(kept)

    def _row(self, product: Product, own: Runs, cut: Cut, lane: Lane) -> None:
        picked = torch.tensor([f for start, stop in own for f in range(start, stop)])
        self._keep(product.weight, 1 - product.out_dim, own)
        module: Any = product.module
        take_over(module, RowLayer)
        module.tensor_rows = Rows(lane, product.kind, picked if cut.whole else None)
        if hasattr(module, "in_features"):
            module.in_features = length(own)

    def _vocabulary(self, vocabulary: Vocabulary) -> None:
        tag = Tag(Purpose.ACTIVATION, site="tensor parallel logits")
        tp = functional(self._job.communicator, AXIS, tag)
        lane = Lane(tp, None, overlap=self._overlap)
        ranks = self._job.mesh.size(AXIS)
        rows = vocabulary.tables[0].inputs  # of the client's tensor, which is cut below
        for product in vocabulary.heads:
            self._head(product, lane)
        for product in vocabulary.tables:
            start, stop = shares(rows, ranks)[self._rank]
            self._table(product.module, start, stop)

    def _table(self, module: Any, start: int, stop: int) -> None:
        if not isinstance(module, TableLayer):
            self._keep(module.weight, 0, ((start, stop),))
            take_over(module, TableLayer)
            module.tensor_table = Table(self._tp, start, stop, in_parts=self._in_parts)
            if module.padding_idx is not None:
                own = start <= module.padding_idx < stop
                module.padding_idx = module.padding_idx - start if own else None

    def _keep(self, old: nn.Parameter, dim: int, intervals: Runs) -> None:
        """Replace a parameter by this rank's part of it, wherever the model has it."""
        if id(old) in self._cut:
            return  # tied to one that has been cut
        places = self._places.pop(id(old))
        part = Part(tuple(old.shape), dim, intervals)
        cut = [old.detach().narrow(dim, start, stop - start) for start, stop in intervals]
        values = torch.stack(cut) if part.stacked else torch.cat(cut, dim)
        new = nn.Parameter(values.contiguous(), old.requires_grad)
        new.__dict__.update(old.__dict__)
        self._job.parameters.replace(old, new)
        placement = Placement(tuple(old.shape), part.boxes, AXIS)
        self._job.parameters.info(new).placement = placement
        for module, name in places:
            module._parameters[name] = new
        self._cut.add(id(new))


def _longest(outputs: Outputs) -> int:
    """Most features that a rank gives to those that are gathered."""
    return max(length(k) - o for k, o in zip(outputs.kept, outputs.own, strict=True))

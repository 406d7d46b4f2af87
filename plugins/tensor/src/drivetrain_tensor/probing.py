"""Running a model whose layers answer with prepared numbers instead of multiplying.

What happens *between* the layers is all that decides how they can be cut: which outputs reach which
inputs. So each layer that multiplies answers with random numbers that do not depend on what comes
in. No matrix is read, which may lie on the meta device, and a change of one output reaches the next
layers and no further.
"""

from __future__ import annotations

import inspect
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from drivetrain_tensor.products import Product

TOKENS = 5
"""Length of the sequences with which models are tried."""

_OTHER = 11
"""A batch of no other size that occurs, to see which dimension it is."""
_LARGE = 1 << 20
_BATCH_AT = 2  # the batch is the first or second dimension

Answer = Callable[[Product, torch.Tensor], torch.Tensor]
"""Takes a layer and what it would return for one sample; returns what it does for the batch."""


class Reached(Exception):  # noqa: N818 - no error: what was asked for has been seen
    """Everything that a run is to show has been seen."""


@dataclass
class Call:
    """One call of a layer.

    Args:
        product: the layer.
        x: what came in.
        y: what it answered.
    """

    product: Product
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class Trace:
    """What a run has shown.

    Args:
        calls: of layers, in order.
        output: of the model; ``None`` if it stopped.
        error: what stopped it.
    """

    calls: list[Call] = field(default_factory=list)
    output: Any = None
    error: Exception | None = None

    def inputs(self, product: Product) -> list[torch.Tensor]:
        """What has come into a layer, by call."""
        return [call.x for call in self.calls if call.product is product]


class Probe:
    """A model, its layers, and small inputs.

    Args:
        model: left as it is.
        products: layers that answer.
        args: arguments of one sample, whose first dimension is the batch.
        kwargs: keywords.
    """

    def __init__(
        self,
        model: nn.Module,
        products: Sequence[Product],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        self.model, self.products = model, list(products)
        self.args, self.kwargs = tuple(args), dict(kwargs)
        self.stand_ins = _stand_ins(model, self.products)
        self.alone: set[Product] = set()
        """Layers that get the same for each sample, such as positions, and no batch."""
        self._calls: dict[int, int] = {}

    def run(
        self,
        answer: Answer = lambda product, base: base,
        *,
        batch: int = 1,
        last: Product | None = None,
        gradients: bool = False,
    ) -> Trace:
        """Run the model in evaluation mode.

        Args:
            answer: what layers return.
            batch: number of copies of the sample.
            last: stop after the last call of this layer, as the first run has shown it.
            gradients: record a graph in which answers and parameters are leaves.
        """
        trace, counts = Trace(), dict[int, int]()
        limit = self._calls.get(id(last)) if last is not None else None

        def respond(product: Product, x: torch.Tensor) -> torch.Tensor:
            number = counts[id(product)] = counts.get(id(product), 0) + 1
            lead = x.shape if product.kind == "embedding" else x.shape[:-1]
            copies = 1 if _batch_at(lead, batch) is None else batch
            if copies < batch:
                self.alone.add(product)
            y = answer(product, self._base(product, x, number, copies))
            y = _in_batch(y, x, product.kind == "embedding", copies)
            if gradients:
                y = y.detach().requires_grad_()
            trace.calls.append(Call(product, x, y))
            if product is last and number == limit:
                raise Reached
            return y.clone() if gradients else y  # as a model may change it in place

        args, kwargs = tree_map(lambda leaf: _repeated(leaf, batch), (self.args, self.kwargs))
        with self._answering(respond), torch.set_grad_enabled(gradients), evaluating(self.model):
            try:
                trace.output = functional_call(self.model, self.stand_ins, args, kwargs)
            except Reached:
                pass
            except Exception as error:  # noqa: BLE001 - of the model's own; the caller decides what it means
                trace.error = error
        return trace

    def first_run(self) -> Trace:
        """Run once, and count how often each layer is called."""
        trace = self.run(gradients=True)
        self.run(batch=_OTHER)  # which shows what has no batch
        for call in trace.calls:
            key = id(call.product)
            self._calls[key] = self._calls.get(key, 0) + 1
        return trace

    def _base(self, product: Product, x: torch.Tensor, number: int, batch: int) -> torch.Tensor:
        """[tokens, features] of one sample; the same in each run."""
        rows = x.numel() if product.kind == "embedding" else x.numel() // max(1, x.shape[-1])
        seed = zlib.crc32(f"{product.path} {number}".encode())
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rows // batch, product.outputs, generator=generator)

    @contextmanager
    def _answering(
        self, respond: Callable[[Product, torch.Tensor], torch.Tensor]
    ) -> Iterator[None]:
        for product in self.products:
            product.module.forward = _bound(respond, product)
        try:
            yield
        finally:
            for product in self.products:
                del product.module.forward


def _bound(
    respond: Callable[[Product, torch.Tensor], torch.Tensor], product: Product
) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return respond(product, x)

    return forward


def _batch_at(lead: Sequence[int], batch: int) -> int | None:
    """Which dimension the samples of a batch lie along."""
    return next((d for d, n in enumerate(lead[:_BATCH_AT]) if n % batch == 0), None)


def _in_batch(y: torch.Tensor, x: torch.Tensor, is_index: bool, batch: int) -> torch.Tensor:
    """Answers [tokens, features] or [batch, tokens, features] in the shape of the input."""
    lead = tuple(x.shape if is_index else x.shape[:-1])
    y = y.expand(batch, *y.shape[-2:])
    at = _batch_at(lead, batch) or 0
    if at == 0:
        return y.reshape(*lead, y.shape[-1])
    rest = (lead[0], *lead[2:], y.shape[-1])
    return y.reshape(batch, *rest).movedim(0, 1).reshape(*lead, y.shape[-1])


def by_sample(x: torch.Tensor, batch: int) -> torch.Tensor:
    """What came into a layer, as [batch, tokens, features]."""
    lead = x.shape[:-1]
    at = _batch_at(lead, batch) or 0
    return x.movedim(at, 0).reshape(batch, -1, x.shape[-1])


def _repeated(leaf: Any, batch: int) -> Any:
    if isinstance(leaf, torch.Tensor) and leaf.dim():
        return leaf.repeat(batch, *(1 for _ in leaf.shape[1:]))
    return leaf


def _stand_ins(model: nn.Module, products: Sequence[Product]) -> dict[str, torch.Tensor]:
    """What the model reads in place of its parameters and buffers, in host memory."""
    matrices = {id(p.weight) for p in products} | {id(p.bias) for p in products}
    generator = torch.Generator().manual_seed(1)
    found: dict[str, torch.Tensor] = {}
    known: dict[int, torch.Tensor] = {}
    for name, tensor in itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        if id(tensor) not in known:
            known[id(tensor)] = _stand_in(tensor, id(tensor) in matrices, generator)
        found[name] = known[id(tensor)]
    return found


def _stand_in(tensor: torch.Tensor, is_matrix: bool, generator: torch.Generator) -> torch.Tensor:
    shape = tuple(tensor.shape)
    if not tensor.is_floating_point():
        return torch.zeros(shape, dtype=tensor.dtype) if tensor.is_meta else tensor.detach().cpu()
    if is_matrix or tensor.numel() > _LARGE:
        made = torch.full((1,) * len(shape), 0.01).expand(shape)
    elif tensor.is_meta:
        made = torch.rand(shape, generator=generator) + 0.5
    else:
        made = tensor.detach().float().cpu()
    return made.requires_grad_() if isinstance(tensor, nn.Parameter) and not is_matrix else made


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run ``model`` without dropout, and leave modes and random numbers as they were."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        for module, training in modes:
            module.training = training


def sample_inputs(
    model: nn.Module, products: Sequence[Product]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of one sample with which the model runs.

    They are ``model.drivetrain_sample``, (args, kwargs), if there is one; the ``dummy_inputs`` of
    Transformers' models; or numbers tried by the shapes of its layers.

    Raises:
        LookupError: no inputs were found; says what happened with those that were tried.
    """
    given: Any = getattr(model, "drivetrain_sample", None)
    if given is not None:
        return tuple(given[0]), dict(given[1])
    tried: list[str] = []
    best: tuple[int, Any] = (0, None)
    for args, kwargs in _candidates(model, products):
        trace = Probe(model, products, args, kwargs).run()
        problem = trace.error or _misfit(trace)
        if problem is None:
            return args, kwargs
        tried.append(f"{type(problem).__name__}: {problem}"[:200])
        if len(trace.calls) > best[0]:
            best = len(trace.calls), (args, kwargs)
    if best[1] is not None and best[0] >= len(products):
        found: tuple[tuple[Any, ...], dict[str, Any]] = best[1]
        return found
    raise LookupError("; ".join(dict.fromkeys(tried)) or "there is nothing to try")


def _misfit(trace: Trace) -> Exception | None:
    """What layers would have said to inputs at which prepared numbers do not look."""
    for call in trace.calls:
        product, x = call.product, call.x
        # A forward of its own may look at the shape alone, as positions of some models do.
        looks_up = type(product.module).forward is nn.Embedding.forward
        if product.kind == "embedding" and looks_up and x.is_floating_point():
            return TypeError(f"{product.path} looks rows up, and got {x.dtype}")
        if product.kind != "embedding" and not x.is_floating_point():
            return TypeError(f"{product.path} multiplies, and got {x.dtype}")
        if product.kind != "embedding" and x.shape[-1] != product.inputs:
            return ValueError(f"{product.path} reads {product.inputs}, and got {x.shape[-1]}")
    return None


def _candidates(
    model: nn.Module, products: Sequence[Product]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    try:
        dummy: Any = getattr(model, "dummy_inputs", None)
    except Exception as error:  # noqa: BLE001 - a property of the model's own, without which others are tried
        del error
        dummy = None
    if isinstance(dummy, Mapping) and dummy:
        kwargs = {
            name: value[:1] if isinstance(value, torch.Tensor) else value
            for name, value in dummy.items()
        }
        ids = kwargs.get("input_ids")
        if ids is not None:
            kwargs["input_ids"] = ids = _few(model, ids)
        yield (), kwargs
        if ids is not None:
            yield (), {**kwargs, "decoder_input_ids": ids}
    yield from _guesses(model, products)


def _few(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Tokens that every table has."""
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return (torch.arange(ids.shape[-1]) % max(1, min([*tables, 6]) - 1) + 1)[None].clamp(
        max=max(0, min([*tables, 7]) - 1)
    )


def _guesses(
    model: nn.Module, products: Sequence[Product]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    places = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    # Where nothing is needed, ``forward(x=None)``, the model still computes with something.
    needed = [p for p in places if p.default is p.empty] or places[:1]
    widths = list(dict.fromkeys(p.inputs for p in products if p.kind != "embedding"))[:3]
    tokens = torch.arange(TOKENS)[None] % min(
        [p.inputs for p in products if p.kind == "embedding"] + [3]
    )
    generator = torch.Generator().manual_seed(2)
    floats = [torch.randn(1, TOKENS, width, generator=generator) for width in widths]
    flat = [torch.randn(1, width, generator=generator) for width in widths]
    values = [tokens, *floats, *flat]
    for first in values:
        yield tuple(first for _ in needed[:1]), {}
        if len(needed) > 1:
            for second in (tokens, torch.zeros(1), *floats, *flat):
                yield (first, *(second for _ in needed[1:])), {}


def tensors_of(output: Any) -> list[torch.Tensor]:
    """Tensors in what a model returns; caches of keys and values do not count."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]

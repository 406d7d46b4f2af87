"""Choosing how a module is computed, and holding the choice to the module itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from drivetrain_kernels.ops.linear import PACKED_LINEAR
from drivetrain_kernels.ops.paged_attention import PAGED_ATTENTION
from drivetrain_kernels.registry import REFERENCE
from torch import nn

from drivetrain.contracts import WeightFormat
from drivetrain.errors import ConfigError
from drivetrain_inference.adapters.adapter import Adapter
from drivetrain_inference.cache.blocks import BlockTable
from drivetrain_inference.cache.paged import LayerSpec, PagedCache, RaggedBatch
from drivetrain_inference.fast.model import FastModel
from drivetrain_inference.fast.structure import UnlikeError, recognise
from drivetrain_inference.models.crossed import CrossedModel, is_crossed
from drivetrain_inference.models.plain import PlainModel
from drivetrain_inference.models.shared import SharedTokens

logger = logging.getLogger("drivetrain.inference")

FastPath = Literal["auto", "always", "never"]
_PROBE = 13
"""Tokens of the text that ways are compared on."""
_TOLERANCES = {torch.float32: 2e-4, torch.float64: 2e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Largest difference of logits, as a share of their spread."""


class Model(Protocol):
    """Computes logits over a paged cache."""

    layers: list[LayerSpec]
    dtype: torch.dtype
    device: torch.device

    def __call__(self, cache: PagedCache, batch: RaggedBatch) -> torch.Tensor:
        """Logits [sequences, vocabulary] of the last token of each; float32."""

    def close(self) -> None:
        """Give back what it keeps beside its weights."""


@dataclass(frozen=True)
class Formats:
    """How weights lie in memory.

    Args:
        blocks: of the blocks' matrices; ``None``: as they are.
        head: whether the matrix that makes logits has that format, too.
        batch_invariant: whether a row's bits must not depend on other rows.
    """

    blocks: WeightFormat | None = None
    head: bool = False
    batch_invariant: bool = False


def choose(
    module: nn.Module,
    fast_path: FastPath,
    *,
    context: int,
    formats: Formats,
    shared: SharedTokens | None = None,
) -> tuple[Model, PlainModel | CrossedModel]:
    """The way to compute ``module``, and the plain way, which is checked in any case.

    Args:
        module: a causal language model.
        fast_path: whether it may run without its own code.
        context: most tokens of a sequence.
        formats: how weights lie in memory.
        shared: the ranks that share out the tokens of each forward; these run the module's code.

    Raises:
        ConfigError: the module gives other logits over a paged cache than by itself; or the fast
            path is wanted (by ``always``, or for a weight format) and cannot be had.
    """
    form = formats.blocks
    if is_crossed(module):
        return _crossed(module, fast_path, formats, shared)
    with _unrounded(module):  # it runs once, so that its attention is known
        plain = PlainModel(module, shared)
    try:
        tokens = _probe(module)
        with _unrounded(module):
            reference = plain.reference(tokens)
            _check_plain(plain, tokens, reference)
        if fast_path == "never" and form is None and not formats.batch_invariant:
            return plain, plain
        if shared is not None:
            raise UnlikeError("several ranks share its tokens (sequence_parallel_size)")
        if formats.batch_invariant:
            _check_invariance(plain)
        fast = _fast(module, plain.layers, context, formats, tokens, reference)
        return fast, plain
    except UnlikeError as error:
        if fast_path == "always" or form is not None or formats.batch_invariant:
            plain.close()
            what = "weight_format" if form is not None else "fast_path: always"
            what = "batch_invariant" if formats.batch_invariant else what
            raise ConfigError(
                f"inference.{what} needs the fast path, and {type(module).__name__} cannot take "
                f"it: {error}"
            ) from error
        logger.info("%s runs its own modules' code: %s", type(module).__name__, error)
        return plain, plain
    except BaseException:
        plain.close()
        raise


def _crossed(
    module: nn.Module, fast_path: FastPath, formats: Formats, shared: SharedTokens | None
) -> tuple[Model, CrossedModel]:
    for name, wanted in (
        ("fast_path: always", fast_path == "always"),
        ("weight_format", formats.blocks is not None),
        ("batch_invariant", formats.batch_invariant),
        ("sequence_parallel_size", shared is not None),
    ):
        if wanted:
            raise ConfigError(f"{name} is not served with an encoder-decoder; leave it out")
    model = CrossedModel(module)
    try:
        off = crossed_difference(model, _probe(module))
        if not off <= _TOLERANCES.get(model.dtype, 2e-4):
            raise ConfigError(
                f"{type(module).__name__} gives other logits over a paged cache than by itself "
                f"(off by {off:.2g} of their spread); it cannot be served so"
            )
    except BaseException:
        model.close()
        raise
    return model, model


def crossed_difference(model: CrossedModel, tokens: list[int]) -> float:
    """:func:`difference` of an encoder-decoder: two sources, of which one comes in two pieces."""
    embedding = model.module.get_decoder().get_input_embeddings()  # may be smaller (Marian)
    size, own = 4, [token % len(embedding.weight) for token in (tokens[0], *tokens[4:])]
    cache = PagedCache(model.layers, 16, size, dtype=model.dtype, device=model.device)
    sources = [tuple(tokens[:7]), tuple(tokens[3:6])]
    tables = [
        BlockTable([5, 6, 7, 8, 9, 10], source=sources[0]),
        BlockTable([11, 0, 3, 2], source=sources[1]),
    ]
    texts = [[*sources[0], 0, *own], [*sources[1], 0, *own]]
    wanted = [model.reference(list(source), own) for source in sources]
    spread = float((wanted[0].amax(1) - wanted[0].amin(1)).max())
    worst = 0.0
    for ends in ((3, 0), (9, 5), (10, 8), (11, 9), (14, 12)):
        pieces = []
        for table, text, end in zip(tables, texts, ends, strict=True):
            if end > table.length:
                pieces.append((table, text[table.length : end]))
        logits = model(cache, RaggedBatch.of(pieces, size, model.device))
        for row, (table, new) in enumerate(pieces):
            table.length += len(new)
            number = tables.index(table)
            at = table.length - (8, 4)[number] - 1
            if at >= 0:
                worst = max(worst, float((logits[row] - wanted[number][at]).abs().max() / spread))
    return worst if torch.isfinite(torch.tensor(worst)) else float("inf")


@contextmanager
def _unrounded(module: nn.Module) -> Iterator[None]:
    """Have no part of ``module`` round its inputs to few bits, where it says that it does.

    For both sides of a comparison, so that its bound can be strict.

    A part that does has an attribute ``rounds_inputs``, which may be set. What lies between two
    numbers may go to either, so that the last bits, which differ between machines and between two
    right ways to compute, would decide how far logits are apart.
    """
    parts: list[Any] = [p for p in module.modules() if getattr(p, "rounds_inputs", False) is True]
    try:
        for part in parts:
            part.rounds_inputs = False
        yield
    finally:
        for part in parts:
            part.rounds_inputs = True


def _check_invariance(plain: PlainModel) -> None:
    kind = plain.device.type
    missing = [op.name for op in (PACKED_LINEAR, PAGED_ATTENTION) if op.provider(kind) == REFERENCE]
    if missing:
        raise UnlikeError(f"{' and '.join(missing)} has no kernel for {kind} that sums row by row")


def _check_plain(plain: PlainModel, tokens: list[int], reference: torch.Tensor) -> None:
    off = difference(plain, tokens, reference)
    if not off <= _TOLERANCES.get(plain.dtype, 2e-4):
        raise ConfigError(
            f"{type(plain.module).__name__} gives other logits over a paged cache than by itself "
            f"(off by {off:.2g} of their spread): it keeps something between tokens beside keys "
            "and values, or sees more than the past; it cannot be served so"
        )


def _fast(
    module: nn.Module,
    layers: list[LayerSpec],
    context: int,
    formats: Formats,
    tokens: list[int],
    reference: torch.Tensor,
) -> FastModel:
    structure = recognise(module)
    exact = FastModel(structure, layers, context=context, invariant=formats.batch_invariant)
    with _unrounded(module):
        off = difference(exact, tokens, reference)
    if not off <= _TOLERANCES.get(exact.dtype, 2e-4):
        raise UnlikeError(f"its logits differ by {off:.2g} of their spread")
    # A format changes numbers on purpose, so the structure is what was checked.
    if formats.blocks is None:
        return exact
    return FastModel(
        structure,
        layers,
        context=context,
        form=formats.blocks,
        head=formats.head,
        invariant=formats.batch_invariant,
    )


def check_adapter(adapter: Adapter, model: Model, plain: PlainModel | CrossedModel) -> None:
    """Hold both ways with an adapter to the module's own code with it.

    Raises:
        ConfigError: they give other logits.
    """
    if isinstance(plain, CrossedModel):
        plain.check_adapter(adapter)
        return
    tokens = _probe(plain.module)
    with _unrounded(plain.module):
        reference = plain.reference(tokens, adapter)
        # A format changes numbers on purpose, so another way with one is not compared.
        ways: list[Model] = [plain, *([model] if getattr(model, "exact", False) else [])]
        for way in ways:
            off = difference(way, tokens, reference, adapter)
            if not off <= _TOLERANCES.get(way.dtype, 2e-4):
                raise ConfigError(
                    f"adapter {adapter.name}: logits over a paged cache differ by {off:.2g} of "
                    "their spread from those of the module; merge the adapter into the model"
                )


def difference(
    model: Model, tokens: list[int], reference: torch.Tensor, adapter: Adapter | None = None
) -> float:
    """Largest difference of ``model``'s logits, as a share of the spread of ``reference``.

    The text comes in two pieces and token by token, beside another one without the adapter, over
    blocks of 4 tokens.
    """
    cache = PagedCache(model.layers, 12, 4, dtype=model.dtype, device=model.device)
    text, other = BlockTable(list(range(5, 10)), adapter=adapter), BlockTable([11, 0, 10])
    spread = float((reference.amax(1) - reference.amin(1)).max())
    worst, begin = 0.0, 0
    for end in (5, 9, 10, 11, len(tokens)):
        pieces = [(text, tokens[begin:end])]
        if end in (5, 10):
            pieces.insert(0, (other, tokens[3 : 6 + end // 10]))
        logits = model(cache, RaggedBatch.of(pieces, 4, model.device))
        off = (logits[-1] - reference[end - 1]).abs().max() / spread
        if not torch.isfinite(off):
            return float("inf")
        worst = max(worst, float(off))
        for table, new in pieces:
            table.length += len(new)
        begin = end
    return worst


def _probe(module: nn.Module) -> list[int]:
    embedding = getattr(module, "get_input_embeddings", lambda: None)()
    vocabulary = len(embedding.weight) if isinstance(embedding, nn.Embedding) else 64
    return [(7 + 5 * i * i) % max(2, vocabulary - 1) for i in range(_PROBE)]

"""Encoder-decoders over a paged cache: cross attention to a source beside causal attention.

A sequence is its source, filled up to whole blocks, and then what the decoder has written. Of the
source the cache holds what cross attention reads, of the rest what causal attention does, in the
same memory, as both have as many heads. A source is encoded when its last token's turn comes; its
tokens before that compute nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from drivetrain_kernels import paged_attention
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain_inference.adapters.adapter import Adapter
from drivetrain_inference.cache.paged import LayerSpec, PagedCache, RaggedBatch
from drivetrain_inference.models.attention import PagedAttention
from drivetrain_inference.models.biased import biased_attention


def is_crossed(module: nn.Module) -> bool:
    """Whether a decoder of ``module`` reads what an encoder made of a source."""
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


@dataclass
class Layout:
    """Where the tokens of a forward of decoders are.

    Args:
        tokens: [tokens], of decoders.
        positions: [tokens]: places in what decoders have written.
        slots: [tokens]: places in the cache.
        tables: [sequences, blocks], of what decoders have written; sequences with tokens alone.
        starts: [sequences + 1].
        lengths: [sequences].
        source_tables: [tokens, blocks], from the source's first block on.
        source_lengths: [tokens].
        rows: for each row of logits its place in ``tokens``, or -1.
        new: sources that are complete now, with their places in the cache.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    lengths: list[int] = field(default_factory=list)
    source_tables: list[list[int]] = field(default_factory=list)
    source_lengths: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    new: list[tuple[tuple[int, ...], list[int]]] = field(default_factory=list)

    @classmethod
    def of(cls, batch: RaggedBatch, size: int) -> Layout:
        """That of ``batch``, over blocks of ``size`` tokens."""
        found, places = cls(), dict[int, int]()
        tokens, positions, slots = (
            each.tolist() for each in (batch.tokens, batch.positions, batch.slots)
        )
        starts, tables = batch.starts.tolist(), batch.tables.tolist()
        for number, source in enumerate(batch.sources):
            first, last, row = starts[number], starts[number + 1], tables[number]
            begin = -(-len(source) // size) * size
            if positions[first] < begin <= positions[last - 1] + 1:
                every = [row[at // size] * size + at % size for at in range(len(source))]
                found.new.append((source, every))
            own = [at for at in range(first, last) if positions[at] >= begin]
            if not own:
                continue
            for at in own:
                places[at] = len(found.tokens)
                found.tokens.append(tokens[at])
                found.positions.append(positions[at] - begin)
                found.slots.append(slots[at])
                found.source_tables.append(row)
                found.source_lengths.append(len(source))
            found.tables.append(row[begin // size :])
            found.starts.append(len(found.tokens))
            found.lengths.append(positions[last - 1] + 1 - begin)
        width = max(map(len, found.tables), default=1)
        found.tables = [row + [0] * (width - len(row)) for row in found.tables]
        found.rows = [places.get(at, -1) for at in batch.last.tolist()]
        return found


class CrossedAttention(PagedAttention):
    """Attention of a decoder: causal over what it has written, or over the source.

    A module is one or the other; the n-th of either kind belong to the n-th layer.
    """

    _layout: Layout | None
    _cache: PagedCache

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._places: dict[nn.Module, tuple[int, bool]] = {}
        self._layout = None

    def begin(self, cache: PagedCache, layout: Layout) -> None:
        """What the next forward is over."""
        self._cache, self._layout = cache, layout

    def end(self) -> None:
        """Forget what the last forward was over; the next one records modules."""
        self._layout = None
        del self._cache

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        **rest: Any,
    ) -> tuple[torch.Tensor, None]:
        """The attention function: [1, heads, tokens, dim] in, [1, tokens, heads, dim] out."""
        facts = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        unknown = [name for name, given in facts.items() if given is not None]
        if unknown or attention_mask is not None:
            what = unknown[0] if unknown else "a mask"
            kind = type(module).__name__
            raise ConfigError(f"{kind} has {what}, which is not known beside cross attention")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        if self._layout is None:
            return self._seen(module, query, key, value, scale), None
        layer, crossed = self._places[module]
        query, key, value = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
        if crossed:
            return self._over_source(self._layout, layer, query, key, value, scale)[None], None
        bias = None if position_bias is None else position_bias[0, :, 0]
        return self._over_own(self._layout, layer, query, key, value, scale, bias)[None], None

    def _seen(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:  # fmt: skip
        crossed = key.shape[2] != query.shape[2]
        if module in self._places:
            raise ConfigError(f"{type(module).__name__} attends twice in one forward")
        layer = sum(other is crossed for _, other in self._places.values())
        self._places[module] = (layer, crossed)
        kept = key.shape[1], key.shape[3], value.shape[3]
        spec = LayerSpec(*kept, scale, whole="an encoder-decoder")
        if not crossed:
            self.layers.append(spec)
        elif self.layers[layer : layer + 1] != [spec]:
            raise ConfigError(
                f"{type(module).__name__}: cross attention has other heads than the attention "
                "before it, and both share the memory of a cache"
            )
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])

    def _over_source(
        self, layout: Layout, layer: int, query: torch.Tensor, key: torch.Tensor,
        value: torch.Tensor, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        device, kind = query.device, torch.int32
        if layout.new:
            slots = [slot for _, places in layout.new for slot in places]
            self._cache.put(layer, torch.tensor(slots, dtype=kind, device=device), key, value)
        if not layout.tokens:
            return query.new_zeros(*query.shape[:2], value.shape[2])
        # Each token is a sequence of its own whose newest token sees all of the source.
        return self._attention(
            layer, query,
            torch.tensor(layout.source_tables, dtype=kind, device=device),
            torch.arange(len(query) + 1, dtype=kind, device=device),
            torch.tensor(layout.source_lengths, dtype=kind, device=device), scale,
        )  # fmt: skip

    def _over_own(
        self, layout: Layout, layer: int, query: torch.Tensor, key: torch.Tensor,
        value: torch.Tensor, scale: float, bias: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        device, kind = query.device, torch.int32
        if not layout.tokens:
            return query.new_zeros(*query.shape[:2], value.shape[2])
        slots = torch.tensor(layout.slots, dtype=kind, device=device)
        self._cache.put(layer, slots, key, value)
        tables = torch.tensor(layout.tables, dtype=kind, device=device)
        if bias is not None:
            keys, values = self._cache.keys[layer], self._cache.values[layer]
            ends = layout.starts, layout.lengths
            return biased_attention(query, keys, values, tables, *ends, scale, bias)
        starts = torch.tensor(layout.starts, dtype=kind, device=device)
        lengths = torch.tensor(layout.lengths, dtype=kind, device=device)
        return self._attention(layer, query, tables, starts, lengths, scale)

    def _attention(
        self, layer: int, query: torch.Tensor, tables: torch.Tensor, starts: torch.Tensor,
        lengths: torch.Tensor, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        found = paged_attention(
            query.to(keys.dtype), keys, values, tables, starts, lengths, scale=scale
        )
        return found.to(query.dtype)


class CrossedModel:
    """Computes logits of an encoder-decoder with the module's own forward.

    Args:
        module: of Transformers, whose encoder takes tokens.

    Raises:
        ConfigError: its encoder takes something else, or its attention cannot be led into a cache.
    """

    def __init__(self, module: nn.Module) -> None:
        kind = type(module).__name__
        if "input_ids" not in inspect.signature(module.forward).parameters:
            raise ConfigError(f"{kind} reads something else than tokens, and only those are served")
        self.module: Any = module
        weight = next(module.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        try:
            probe = self._encoded([1, 1, 1])
            self._attention = CrossedAttention(module)
            self.layers: list[LayerSpec] = self._attention.record(
                lambda: self._decoded(probe, [1, 1], [0, 1], 2)
            )
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{kind} cannot be run as an encoder and then a decoder over its output, which "
                f"encoder-decoders are served as: {error}"
            ) from error

    @torch.no_grad()
    def __call__(self, cache: PagedCache, batch: RaggedBatch) -> torch.Tensor:
        """Logits [rows, vocabulary]; zeros for rows of sources. float32."""
        if not batch.sources:
            raise ConfigError(
                "an encoder-decoder needs a source for each sequence, and put gives none; add "
                "requests to the engine instead"
            )
        if batch.adapters:
            raise ConfigError("adapters are not served with encoder-decoders")
        layout = Layout.of(batch, cache.size)
        new = [self._encoded(list(source)) for source, _ in layout.new]
        hidden = torch.cat(new, 1) if new else self._nothing()
        self._attention.begin(cache, layout)
        tokens, positions = layout.tokens or [0], layout.positions or [0]
        reach = max(layout.lengths, default=1)
        try:
            logits: torch.Tensor = self._attention._run(
                self._attention._compute,
                lambda: self._decoded(hidden, tokens, positions, reach),
            )
        finally:
            self._attention.end()
        found = logits.new_zeros(len(layout.rows), logits.shape[-1])
        for row, place in enumerate(layout.rows):
            if place >= 0:
                found[row] = logits[place]
        return found.float()

    @torch.no_grad()
    def reference(self, source: list[int], target: list[int]) -> torch.Tensor:
        """Logits [tokens, vocabulary] of the module with its own attention and no cache."""
        with _evaluated(self.module):
            found = self.module(
                input_ids=self._row(source), decoder_input_ids=self._row(target), use_cache=False
            )
        logits: torch.Tensor = found.logits[0].float()
        return logits

    def check_adapter(self, adapter: Adapter) -> None:
        """Refuse an adapter.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"adapter {adapter.name}: none is served with encoder-decoders")

    def close(self) -> None:
        """Leave Transformers as it was."""
        self._attention.close()

    @torch.no_grad()
    def _encoded(self, source: list[int]) -> torch.Tensor:
        with _evaluated(self.module):
            found = self.module.get_encoder()(input_ids=self._row(source), return_dict=True)
        hidden: torch.Tensor = found.last_hidden_state
        return hidden

    @torch.no_grad()
    def _decoded(
        self, hidden: torch.Tensor, tokens: list[int], positions: list[int], reach: int
    ) -> torch.Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        places = torch.tensor(positions, device=self.device)
        with ExitStack() as held:
            held.enter_context(_evaluated(self.module))
            held.enter_context(_placed(self.module.get_decoder(), places, reach))
            found = self.module(
                encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
                decoder_input_ids=self._row(tokens), use_cache=False, return_dict=True,
            )  # fmt: skip
        logits: torch.Tensor = found.logits[0]
        return logits

    def _nothing(self) -> torch.Tensor:
        """Stands in for a source where none is new: its keys and values are left out."""
        width = self.module.get_encoder().config.hidden_size
        return torch.zeros(1, 1, width, dtype=self.dtype, device=self.device)

    def _row(self, tokens: list[int]) -> torch.Tensor:
        return torch.tensor([tokens], device=self.device)


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@contextmanager
def _placed(decoder: nn.Module, places: torch.Tensor, reach: int) -> Iterator[None]:
    """Tell parts of a decoder where its tokens are, which it takes to be one text.

    Args:
        decoder: whose embeddings of positions are given ``places``, and whose relative biases
            become a table [1, heads, 1, reach] over how far a key is behind.
        places: [tokens].
        reach: most tokens of a sequence.
    """

    def positions(module: nn.Module, args: Any, options: dict[str, Any]) -> Any:
        if "position_ids" in options:
            options = {**options, "position_ids": places}
        return args, options

    with ExitStack() as held:
        for name, part in decoder.named_modules():
            if name.rpartition(".")[2] == "embed_positions":
                hook = part.register_forward_pre_hook(positions, with_kwargs=True)
                held.callback(hook.remove)
            if getattr(part, "has_relative_attention_bias", False):
                held.enter_context(_table_of_bias(part, reach))
        yield


@contextmanager
def _table_of_bias(part: Any, reach: int) -> Iterator[None]:
    original = part.compute_bias

    def compute_bias(query_length: int, key_length: int, device: Any = None, **_: object) -> Any:
        found = original(1, reach, device=device, past_seen_tokens=reach - 1)
        return found.flip(3)

    part.compute_bias = compute_bias
    try:
        yield
    finally:
        part.__dict__.pop("compute_bias", None)

"""The way from Transformers' attention interface into the paged cache: all that depends on it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_kernels import paged_attention
from torch import nn

from drivetrain.contracts import AttentionFacts
from drivetrain.errors import ConfigError
from drivetrain_inference.cache.paged import LayerSpec, PagedCache, RaggedBatch
from drivetrain_inference.models.inline import inline_modules, led, with_places, with_slopes

if TYPE_CHECKING:
    from drivetrain_inference.models.shared import SharedTokens

_numbers = count()
_HARMLESS = ("dropout", "is_causal", "position_ids", "cache_position", "output_attentions")
"""Keywords that say nothing that the cache does not know; others must be known or empty."""


class PagedAttention:
    """An attention function under a name of its own, which a model is switched to while it runs.

    The model's modules call it as they call any other; layers are told apart by the module that
    calls, in the order of the first run.

    Attributes:
        positions: [tokens] of the forward that runs, for modules that add ALiBi.

    Args:
        module: a model of Transformers, or one that looks its attention up as they do.
        shared: the ranks of which each has a part of the tokens; ``None`` for one.

    Raises:
        ConfigError: the module does not choose its attention by name.
    """

    def __init__(self, module: nn.Module, shared: SharedTokens | None = None) -> None:
        config = getattr(module, "config", None)
        if not hasattr(config, "_attn_implementation"):
            raise ConfigError(
                f"{type(module).__name__} has no Transformers config, so its attention cannot be "
                "led into a paged cache; serve a causal language model of Transformers"
            )
        from transformers import AttentionInterface

        self.name = f"drivetrain_paged_{next(_numbers)}"
        self.layers: list[LayerSpec] = []
        self._module, self._order = module, dict[nn.Module, int]()
        self._compute: Callable[..., torch.Tensor] = self._record
        self._inline, self._placed = inline_modules(module), set[nn.Module]()
        self.positions = torch.zeros(0)
        self._shared = shared is not None
        self._chain = self._innermost if shared is None else shared.around(self._innermost)
        AttentionInterface.register(self.name, self)

    def close(self) -> None:
        """Take the name out of Transformers' table."""
        from transformers import AttentionInterface

        AttentionInterface._global_mapping.pop(self.name, None)

    def record(self, run: Callable[[], object]) -> list[LayerSpec]:
        """What the model's attention modules keep, seen while ``run`` runs a few tokens.

        Where that fails, Transformers is left as it was.
        """
        self._order.clear()
        self.layers.clear()
        try:
            self._run(self._record, run)
            if not self.layers:
                raise ConfigError(
                    f"no module of {type(self._module).__name__} calls Transformers' attention "
                    "interface, so there is nothing to keep in a cache"
                )
        except BaseException:
            self.close()
            raise
        return list(self.layers)

    def over(self, cache: PagedCache, batch: RaggedBatch, run: Callable[[], Any]) -> Any:
        """Run the model with ``cache``, into which the keys and values of ``batch`` go."""

        def compute(
            module: nn.Module, query: torch.Tensor, *parts: torch.Tensor, **facts: Any
        ) -> torch.Tensor:
            return self._attend(cache, batch, self._order[module], query, *parts, **facts)

        return self._run(compute, run)

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
        **rest: Any,
    ) -> tuple[torch.Tensor, None]:
        """The attention function: [1, heads, tokens, dim] in, [1, tokens, heads, dim] out."""
        kind = type(module).__name__
        unknown = [name for name, given in rest.items() if name not in _HARMLESS and _says(given)]
        if attention_mask is not None or rest.get("is_causal") is False:
            raise ConfigError(f"{kind} has a mask that is not causal; a paged cache has none")
        if unknown and (bias := [name for name in unknown if "bias" in name]):
            raise ConfigError(f"{kind} adds {bias[0]} to its scores, which paged attention cannot")
        facts = AttentionFacts(
            scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            causal=True,
            window=sliding_window or None,
            softcap=softcap or None,
            sinks=s_aux,
            shared=self._shared,
        )
        return self._chain(module, query, key, value, facts), None

    def _attend_inline(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        scale: float, places: torch.Tensor | None, slopes: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        if slopes is not None and places is not None:
            self._placed.add(module)
            key = with_places(key, places)
            query = with_slopes(query, slopes.to(query.device), scale)
        return self(module, query, key, value, None, scaling=scale)[0]

    def _innermost(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        facts: AttentionFacts,
    ) -> torch.Tensor:
        return self._compute(
            module,
            query,
            key,
            value,
            scale=facts.scale,
            window=facts.window or 0,
            softcap=facts.softcap or 0.0,
            sinks=facts.sinks,
        )

    def _run(self, compute: Callable[..., torch.Tensor], run: Callable[[], Any]) -> Any:
        parts = () if self._inline else self._module.modules()  # their masks go by that name, too
        configs = {id(c): c for m in parts if (c := getattr(m, "config", None))}
        before = [(config, config._attn_implementation) for config in _switched(configs.values())]
        self._compute = compute
        try:
            for config, _ in before:
                config._attn_implementation_internal = self.name
            with led(self._inline, self._attend_inline, lambda: self.positions):
                return run()
        finally:
            self._compute = self._record
            for config, name in before:
                config._attn_implementation_internal = name

    def _record(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        **facts: Any,
    ) -> torch.Tensor:  # fmt: skip
        if module in self._order:
            raise ConfigError(f"{type(module).__name__} attends twice in one forward")
        self._order[module] = len(self.layers)
        sinks = facts.pop("sinks") is not None
        self.layers.append(
            LayerSpec(
                key.shape[1],
                key.shape[3],
                value.shape[3],
                sinks=sinks,
                whole="keys that carry their places (ALiBi)" if module in self._placed else "",
                **facts,
            )
        )
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])

    @staticmethod
    def _attend(
        cache: PagedCache, batch: RaggedBatch, layer: int, query: torch.Tensor, key: torch.Tensor,
        value: torch.Tensor, **facts: Any,
    ) -> torch.Tensor:  # fmt: skip
        keys, values = cache.keys[layer], cache.values[layer]
        key_scales, value_scales = cache.scales[layer]
        kind = keys.dtype if key_scales is None else query.dtype
        tokens = len(batch.slots)  # what comes after them makes parts of ranks equal
        own_query, own_key, own_value = (
            x[0, :, :tokens].transpose(0, 1).to(kind) for x in (query, key, value)
        )
        cache.put(layer, batch.slots, own_key, own_value)
        sinks = facts.pop("sinks")
        output = paged_attention(
            own_query.contiguous(),
            keys,
            values,
            batch.tables,
            batch.starts,
            batch.lengths,
            sinks=None if sinks is None else sinks.detach().float(),
            key_scales=key_scales,
            value_scales=value_scales,
            **facts,
        )
        rest = query.shape[2] - tokens
        if rest:
            output = nn.functional.pad(output, (0, 0, 0, 0, 0, rest))
        return output[None].to(query.dtype)


def _says(value: object) -> bool:
    return value is not None and value is not False


def _switched(configs: Any) -> list[Any]:
    return [config for config in configs if hasattr(config, "_attn_implementation")]

"""``DeepSpeedTransformerLayer``: an encoder layer over torch's attention.

It computes what a layer of BERT does (Devlin et al. 2018, arXiv:1810.04805), or the same with
normalisation in front (Xiong et al. 2020, arXiv:2002.04745):

    post: a = norm(x + attention(x));  y = norm(a + feed_forward(a))
    pre:  a = x + attention(norm(x));  y = a + feed_forward(norm(a))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from deepspeed._transformer.config import DeepSpeedTransformerConfig
from deepspeed._transformer.norm import invertible_layer_norm
from drivetrain.errors import ConfigError

_GIVEN = 8
"""Weights of a layer of BERT, in order: query, key, value, output of attention, normalisation
after it, first and second of the feed-forward, normalisation after it."""


class DeepSpeedTransformerLayer(nn.Module):
    """One encoder layer, with DeepSpeed's names of parameters. Widths: H hidden, I intermediate.

    Args:
        config: sizes and switches; read again in every forward, except for the sizes.
        initial_weights: eight tensors of a layer of BERT, in its order: query, key, value, output
            of attention, normalisation, both of the feed-forward, normalisation. Behind
            ``pre_layer_norm`` the last one stands in front of attention.
        initial_biases: likewise; both or none.

    Attributes:
        attn_qkvw: (3H, H), query, key and value one after another; ``attn_qkvb`` (3H).
        attn_ow: (H, H), behind attention; ``attn_ob`` (H).
        attn_nw: (H), normalisation between attention and feed-forward; ``attn_nb`` (H).
        inter_w: (I, H), into the feed-forward; ``inter_b`` (I).
        output_w: (H, I), out of it; ``output_b`` (H).
        norm_w: (H), the other normalisation; ``norm_b`` (H).

    Raises:
        ConfigError: a size is missing or does not fit, or tensors are not those of a layer.
    """

    attn_qkvw: nn.Parameter
    attn_qkvb: nn.Parameter
    attn_ow: nn.Parameter
    attn_ob: nn.Parameter
    attn_nw: nn.Parameter
    attn_nb: nn.Parameter
    inter_w: nn.Parameter
    inter_b: nn.Parameter
    output_w: nn.Parameter
    output_b: nn.Parameter
    norm_w: nn.Parameter
    norm_b: nn.Parameter

    def __init__(
        self,
        config: DeepSpeedTransformerConfig,
        initial_weights: Sequence[torch.Tensor] | None = None,
        initial_biases: Sequence[torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        config.check()
        self.config = config
        hidden = config.hidden_size
        inner = config.intermediate_size if config.intermediate_size > 0 else 4 * hidden
        shapes: dict[str, tuple[int, ...]]
        shapes = {"attn_qkv": (3 * hidden, hidden), "attn_o": (hidden, hidden)}
        shapes |= {"attn_n": (hidden,), "inter_": (inner, hidden)}
        shapes |= {"output_": (hidden, inner), "norm_": (hidden,)}
        for name, shape in shapes.items():
            self.register_parameter(f"{name}w", nn.Parameter(torch.empty(shape)))
            self.register_parameter(f"{name}b", nn.Parameter(torch.zeros(shape[0])))
        self.init_transformer_weights(config.adjust_init_range)
        if initial_weights is not None or initial_biases is not None:
            self._take(initial_weights or (), initial_biases or ())

    def init_transformer_weights(self, adjust_init_range: bool = False) -> None:
        """Draw weights from normal distributions; biases become 0.

        Args:
            adjust_init_range: see :class:`DeepSpeedTransformerConfig`.
        """
        deviation = self.config.initializer_range
        adjusted = deviation
        if adjust_init_range:
            adjusted /= (2.0 * self.config.num_hidden_layers) ** 0.5
        for weight in (self.attn_qkvw, self.inter_w):
            nn.init.normal_(weight, 0.0, deviation)
        for weight in (self.attn_ow, self.output_w):
            nn.init.normal_(weight, 0.0, adjusted)
        for weight in (self.attn_nw, self.norm_w):
            nn.init.ones_(weight)
        for name, parameter in self.named_parameters():
            if name.endswith("b"):
                nn.init.zeros_(parameter)

    @torch.no_grad()
    def _take(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> None:
        """Copy tensors of a layer of BERT."""
        for end, given in (("w", weights), ("b", biases)):
            if len(given) != _GIVEN:
                raise ConfigError(
                    "DeepSpeedTransformerLayer takes initial_weights and initial_biases together, "
                    f"each of {_GIVEN} tensors, got {len(weights)} and {len(biases)}"
                )
            joined = [torch.cat(list(given[:3])), *given[3:]]
            names = ("attn_qkv", "attn_o", "attn_n", "inter_", "output_", "norm_")
            for name, tensor in zip(names, joined, strict=True):
                parameter = self.get_parameter(f"{name}{end}")
                if parameter.shape != tensor.shape:
                    raise ConfigError(
                        f"DeepSpeedTransformerLayer: {name}{end} has shape "
                        f"{tuple(parameter.shape)}, what is given {tuple(tensor.shape)}"
                    )
                parameter.copy_(tensor)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        *unused: Any,
        **named: Any,
    ) -> torch.Tensor | tuple[torch.Tensor]:
        """Compute the layer. Sizes: B batch, S sequence, H hidden.

        Args:
            hidden_states: (B, S, H).
            attention_mask: added to scores, so 0 where attention may go and a large negative number
                elsewhere; broadcast to (B, heads, S, S), such as (B, 1, 1, S).
            head_mask: must be ``None``.
            unused: what layers of Transformers take as well; must be ``None`` or false.
            named: as ``unused``.

        Returns:
            (B, S, H), in a tuple if the config says so.

        Raises:
            ConfigError: an argument is not supported.
        """
        asked = {name: value for name, value in named.items() if name != "grads"}
        for value in (head_mask, *unused, *asked.values()):
            if isinstance(value, torch.Tensor) or value:
                raise ConfigError(
                    "DeepSpeedTransformerLayer takes hidden_states and attention_mask only: an "
                    "encoder layer without cache, head mask, cross attention or attention outputs"
                )
        first, second = (self.norm_w, self.norm_b), (self.attn_nw, self.attn_nb)
        if self.config.pre_layer_norm:
            attended = self._attend(self._norm(hidden_states, *first), attention_mask)
            between = hidden_states + self._dropped(attended)
            output = between + self._dropped(self._feed_forward(self._norm(between, *second)))
        else:
            attended = self._attend(hidden_states, attention_mask)
            between = self._norm(hidden_states + self._dropped(attended), *second)
            output = self._norm(between + self._dropped(self._feed_forward(between)), *first)
        return (output,) if self.config.return_tuple else output

    @property
    def _drops(self) -> bool:
        return self.training and self.config.training

    def _attend(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Self-attention of (B, S, H), with the product behind it."""
        batch, length, hidden = states.shape
        joined = functional.linear(states, self.attn_qkvw, self.attn_qkvb)
        split = joined.view(batch, length, 3, self.config.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each (B, heads, S, H / heads)
        rate = self.config.attn_dropout_ratio if self._drops else 0.0
        attention = partial(functional.scaled_dot_product_attention, dropout_p=rate)
        given = None if mask is None else mask.to(query.dtype)
        again = self.config.attn_dropout_checkpoint
        found = _kept_or_again(attention, again, query, key, value, given)
        return functional.linear(
            found.transpose(1, 2).reshape(batch, length, hidden), self.attn_ow, self.attn_ob
        )

    def _feed_forward(self, states: torch.Tensor) -> torch.Tensor:
        inner = functional.linear(states, self.inter_w, self.inter_b)
        return _kept_or_again(self._activated, self.config.gelu_checkpoint, inner)

    def _activated(self, inner: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.gelu(inner), self.output_w, self.output_b)

    def _norm(self, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        epsilon = self.config.layer_norm_eps
        if self.config.normalize_invertible:
            return invertible_layer_norm(states, weight, bias, epsilon)
        return functional.layer_norm(states, weight.shape, weight, bias, epsilon)

    def _dropped(self, states: torch.Tensor) -> torch.Tensor:
        return functional.dropout(states, self.config.hidden_dropout_ratio, self._drops)


def _kept_or_again(
    function: Callable[..., torch.Tensor], again: bool, *args: torch.Tensor | None
) -> torch.Tensor:
    """Call a function and, if ``again``, once more in backward rather than keep what is inside."""
    if not again or not torch.is_grad_enabled():
        return function(*args)
    result: torch.Tensor = checkpoint(function, *args, use_reentrant=False)
    return result

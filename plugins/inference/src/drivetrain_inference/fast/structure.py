"""Recognising a decoder by its parts: what is in its modules, not what they are called by class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from drivetrain_kernels.ops.decoder import ACTIVATIONS
from torch import nn

from drivetrain.contracts import WeightFormat

_BLOCK = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj"}
_BODY = {"embed_tokens", "layers", "norm", "rotary_emb"}
_MOVING_ROTATIONS = ("dynamic", "longrope")


class UnlikeError(Exception):
    """The module is built otherwise; says in what."""


class PackedLayer(Protocol):
    """A linear layer whose weight its own package keeps packed, and which multiplies by itself.

    Its ``weight`` is no tensor, and has the ``format`` that it is packed in.
    """

    weight: Any
    in_features: int
    out_features: int

    @staticmethod
    def joined(layers: Sequence[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
        """[rows, in] -> [rows, out] of layers of this kind with one input, one after another."""


Layer = nn.Linear | PackedLayer


def is_packed(layer: Any) -> bool:
    """Whether a module is a :class:`PackedLayer`."""
    form = getattr(getattr(layer, "weight", None), "format", None)
    return isinstance(form, WeightFormat) and hasattr(layer, "joined")


@dataclass(frozen=True)
class Block:
    """One block: the modules whose weights it computes with.

    Args:
        norms: before attention, and before the gated layer.
        attention: queries, keys, values, output.
        gated: gate, up, down.
    """

    norms: tuple[nn.Module, nn.Module]
    attention: tuple[Layer, ...]
    gated: tuple[Layer, ...]


@dataclass(frozen=True)
class Structure:
    """A decoder with RMS norms before its layers, rotated heads and a gated activation.

    Args:
        embedding: of tokens.
        blocks: in order.
        norm: after the last block.
        head: to logits.
        rotary: makes (cosine, sine) [1, tokens, rotated] of (x, positions [1, tokens]).
        activation: one of ``ACTIVATIONS``.
    """

    embedding: nn.Embedding
    blocks: tuple[Block, ...]
    norm: nn.Module
    head: nn.Linear
    rotary: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    activation: str


def recognise(module: nn.Module) -> Structure:
    """The structure of a causal language model.

    Raises:
        UnlikeError: it is built otherwise.
    """
    bodies = [m for m in module.modules() if isinstance(getattr(m, "layers", None), nn.ModuleList)]
    if len(bodies) != 1:
        raise UnlikeError(f"it has {len(bodies)} lists of layers, expected one")
    body: Any = bodies[0]
    _exactly(body, _BODY, "the body")
    head = getattr(module, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear) or not isinstance(body.embed_tokens, nn.Embedding):
        raise UnlikeError("it has no plain embedding and head")
    kind = getattr(body.rotary_emb, "rope_type", "default")
    if kind in _MOVING_ROTATIONS:
        raise UnlikeError(f"its rotation ({kind}) depends on the length of the text")
    blocks = tuple(_block(each, f"layers.{i}") for i, each in enumerate(body.layers))
    kinds = {_activation(each.mlp.act_fn) for each in body.layers}
    if len(kinds) != 1:
        raise UnlikeError("its layers have different activations")
    _norm_eps(body.norm, "norm")
    return Structure(body.embed_tokens, blocks, body.norm, head, body.rotary_emb, kinds.pop())


def norm_eps(norm: nn.Module) -> float:
    """What an RMS norm adds to the mean of squares."""
    return _norm_eps(norm, type(norm).__name__)


def _block(block: Any, place: str) -> Block:
    _exactly(block, _BLOCK, place)
    _exactly(block.self_attn, _ATTENTION, f"{place}.self_attn")
    _exactly(block.mlp, _MLP, f"{place}.mlp", ignored=("act_fn",))
    norms = (block.input_layernorm, block.post_attention_layernorm)
    for name, norm in zip(("input_layernorm", "post_attention_layernorm"), norms, strict=True):
        _norm_eps(norm, f"{place}.{name}")
    attention = block.self_attn
    return Block(
        norms,
        tuple(_linears(attention, ("q_proj", "k_proj", "v_proj", "o_proj"), place)),
        tuple(_linears(block.mlp, ("gate_proj", "up_proj", "down_proj"), place)),
    )


def _linears(parent: Any, names: tuple[str, ...], place: str) -> Iterator[Layer]:
    for name in names:
        found = getattr(parent, name)
        if type(found) is not nn.Linear and not is_packed(found):
            raise UnlikeError(f"{place}: {name} is a {type(found).__name__}, not a Linear")
        yield found


def _exactly(module: nn.Module, names: set[str], place: str, ignored: tuple[str, ...] = ()) -> None:
    found = {name for name, _ in module.named_children()} - set(ignored)
    if found != names:
        odd = sorted(found ^ names)
        raise UnlikeError(f"{place} has or lacks {', '.join(odd)}")
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if own:
        raise UnlikeError(f"{place} has parameters of its own: {', '.join(own)}")


def _norm_eps(norm: nn.Module, place: str) -> float:
    names = [name for name, _ in norm.named_parameters()]
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if names != ["weight"] or not isinstance(eps, float):
        raise UnlikeError(f"{place} is no RMS norm with a weight and an epsilon")
    return eps


def _activation(function: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """The name of an activation, told by what it does."""
    points = torch.linspace(-6, 6, 97, dtype=torch.float64)
    known: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": nn.functional.silu,
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
        "relu": nn.functional.relu,
    }
    assert set(known) == set(ACTIVATIONS)
    for name, candidate in known.items():
        if torch.allclose(function(points), candidate(points), rtol=0, atol=1e-9):
            return name
    raise UnlikeError("its activation is none of " + ", ".join(ACTIVATIONS))

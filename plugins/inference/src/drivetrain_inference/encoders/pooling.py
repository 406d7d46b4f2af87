"""From hidden states to one vector for each text, as the files of sentence-transformers say."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from drivetrain.errors import ConfigError

Pool = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes hidden states [texts, length, width] and a mask [texts, length], 1.0 for tokens and 0.0 for
padding at the end; returns [texts, width]."""


def _mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def _mean_by_root(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).sqrt()


def _weighted_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    places = mask * torch.arange(1, mask.shape[1] + 1, dtype=mask.dtype, device=mask.device)
    return (states * places[..., None]).sum(1) / places.sum(1, keepdim=True)


def _largest(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return states.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)


def _first(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return states[:, 0]


def _last(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(len(states), device=states.device)
    return states[rows, mask.sum(1).long() - 1]


POOLS: dict[str, Pool] = {
    "cls": _first,
    "lasttoken": _last,
    "max": _largest,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean": _weighted_mean,
}
"""By the names of sentence-transformers."""

_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

_ACTIVATIONS = {
    kind.__name__: kind for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.Sigmoid)
}


class Head(nn.Module):
    """What follows the encoder: pooling, dense layers, normalisation.

    Args:
        pools: names of poolings, whose vectors are put one after another.
        layers: applied to the vectors in turn.
        normalizes: whether vectors get length 1.
    """

    def __init__(
        self, pools: Sequence[str], layers: Sequence[nn.Module], *, normalizes: bool
    ) -> None:
        super().__init__()
        self.pools, self.normalizes = tuple(pools), normalizes
        self.layers = nn.Sequential(*layers)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Vectors [texts, width] in fp32 of states [texts, length, width]."""
        states, mask = states.float(), mask.to(torch.float32)
        vectors = torch.cat([POOLS[name](states, mask) for name in self.pools], dim=1)
        vectors = self.layers(vectors)
        return nn.functional.normalize(vectors, dim=1) if self.normalizes else vectors


def head_of(folder: Path, *, causal: bool) -> Head:
    """The head that a folder describes; else the mean of all tokens, or the last of causal models.

    Args:
        folder: of the model; sentence-transformers keeps its parts in ``modules.json``.
        causal: whether a token sees only those before it.

    Raises:
        ConfigError: there are parts that are not known here; names them.
    """
    listed = folder / "modules.json"
    if not listed.is_file():
        return Head(["lasttoken" if causal else "mean"], [], normalizes=True)
    pools: list[str] = []
    layers: list[nn.Module] = []
    normalizes = False
    for part in json.loads(listed.read_text("utf-8")):
        kind, place = str(part["type"]).rpartition(".")[2], _inside(folder, str(part["path"]))
        if kind == "Transformer" and not pools:
            continue
        if kind == "Pooling" and not pools:
            pools = _pools(place)
        elif kind == "Dense" and pools and not normalizes:
            layers.append(_dense(place))
        elif kind == "Normalize" and pools:
            normalizes = True
        else:
            raise ConfigError(
                f"{listed} has a part {part['type']!r}, which is not known at its place; known are "
                "Transformer, Pooling, Dense and Normalize, in this order"
            )
    if not pools:
        raise ConfigError(f"{listed} has no part that pools, so there is no vector for a text")
    return Head(pools, layers, normalizes=normalizes)


def _inside(folder: Path, name: str) -> Path:
    place = (folder / name).resolve()
    if not place.is_relative_to(folder.resolve()):
        raise ConfigError(f"{folder / 'modules.json'} names {name!r}, which is outside of it")
    return place


def _pools(place: Path) -> list[str]:
    known = json.loads((place / "config.json").read_text("utf-8"))
    named = known.get("pooling_mode")
    found = [named] if isinstance(named, str) else list(named or ())
    found = found or [name for key, name in _KEYS.items() if known.get(key)]
    unknown = [name for name in found if name not in POOLS]
    if unknown or not found:
        raise ConfigError(
            f"{place / 'config.json'}: pooling {', '.join(unknown) or 'of no kind'} is not known; "
            f"known are {', '.join(POOLS)}"
        )
    return found


def _dense(place: Path) -> nn.Module:
    from safetensors.torch import load_file

    known = json.loads((place / "config.json").read_text("utf-8"))
    name = str(known.get("activation_function", "Tanh")).rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise ConfigError(
            f"{place / 'config.json'}: activation {name!r} is not known; "
            f"known are {', '.join(_ACTIVATIONS)}"
        )
    layer = nn.Linear(known["in_features"], known["out_features"], bias=known.get("bias", True))
    file = place / "model.safetensors"
    if not file.is_file():
        raise ConfigError(f"{file} is missing: other files than safetensors are never read")
    weights = load_file(file)
    layer.load_state_dict({name.removeprefix("linear."): value for name, value in weights.items()})
    return nn.Sequential(layer, _ACTIVATIONS[name]())

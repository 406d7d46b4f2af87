"""Divide a row of lengths into micro-batches of so many tokens, and make tensors of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from drivetrain.errors import ConfigError, TrainingError

Array = npt.NDArray[Any]

IGNORED = -100
"""The label that losses leave out."""


def divide(
    lengths: Array,
    max_tokens: int,
    *,
    smallest: int = 1,
    largest: int | None = None,
    padded: bool = False,
) -> Array:
    """Divide samples, as they come, into micro-batches that are as large as may be.

    Each takes samples until one more would be too many tokens or samples. A sample that cannot
    begin a micro-batch of ``smallest`` is left out, and the next one tried.

    Args:
        lengths: [samples], tokens, each at most ``max_tokens``.
        max_tokens: of a micro-batch.
        smallest: fewest samples.
        largest: most samples.
        padded: tokens are those of the longest sample, for each.

    Returns:
        [micro-batches, 2]: first sample, and the one after the last.
    """
    found: list[tuple[int, int]] = []
    total = len(lengths)
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    begin = 0
    while begin < total:
        if padded:
            end = _padded_end(lengths, begin, max_tokens, largest)
        else:
            reach = int(ends[begin]) + max_tokens
            end = int(np.searchsorted(ends, reach, side="right")) - 1
            end = end if largest is None else min(end, begin + largest)
        if end - begin < smallest:
            begin += 1
            continue
        found.append((begin, end))
        begin = end
    return np.array(found, np.int64).reshape(-1, 2)


def _padded_end(lengths: Array, begin: int, max_tokens: int, largest: int | None) -> int:
    longest, end = 0, begin
    while end < len(lengths) and (largest is None or end - begin < largest):
        longest = max(longest, int(lengths[end]))
        if longest * (end - begin + 1) > max_tokens:
            break
        end += 1
    return end


def scale_rate(rate: float, samples: float, base: float, method: str) -> float:
    """A learning rate for a step of ``samples``, where it was meant for ``base``.

    ``linear``: times samples / base (Goyal et al. 2017, https://arxiv.org/abs/1706.02677);
    ``sqrt``: times its root (Krizhevsky 2014, https://arxiv.org/abs/1404.5997); ``none``.

    Raises:
        ConfigError: another method.
    """
    if method == "linear":
        return rate * samples / base
    if method == "sqrt":
        return rate * math.sqrt(samples / base)
    if method == "none":
        return rate
    raise ConfigError(f"lr_scaling_method is linear, sqrt or none, not {method!r}")


def pack_samples(samples: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Join samples in one row: ``input_ids``, ``position_ids`` and ``labels``, each [1, tokens].

    Positions begin at 0 in every sample, by which models of Transformers (without a mask) know that
    tokens attend within their own sample; :func:`segments` tells it to ``drivetrain.attention``.
    The first label of each sample is ignored, as nothing of it comes before.

    Args:
        samples: tensors of tokens, or mappings with ``input_ids`` and perhaps ``labels``.
    """
    rows = [_row(sample) for sample in samples]
    labels = [label.clone() for _, label in rows]
    for label in labels:
        label[:1] = IGNORED
    positions = [torch.arange(len(tokens)) for tokens, _ in rows]
    return {
        "input_ids": torch.cat([tokens for tokens, _ in rows])[None],
        "position_ids": torch.cat(positions)[None],
        "labels": torch.cat(labels)[None],
    }


def pad_samples(samples: Sequence[Any]) -> dict[str, torch.Tensor]:
    """One row for each sample: ``input_ids``, ``attention_mask`` and ``labels``, [b, longest]."""
    from torch.nn.utils.rnn import pad_sequence

    rows = [_row(sample) for sample in samples]
    masks = [torch.ones_like(tokens) for tokens, _ in rows]
    return {
        "input_ids": pad_sequence([tokens for tokens, _ in rows], batch_first=True),
        "attention_mask": pad_sequence(masks, batch_first=True),
        "labels": pad_sequence([label for _, label in rows], True, IGNORED),
    }


def segments(position_ids: torch.Tensor) -> torch.Tensor:
    """Which sample of a packed row each token belongs to, from 0: [b, s] of positions, [b, s]."""
    return (position_ids == 0).cumsum(-1) - 1


def checked_for_packing(module: nn.Module) -> nn.Module:
    """Refuse a model of Transformers that keeps a cache: then it does not look at positions.

    Raises:
        ConfigError: says what to set.
    """
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    for part in module.modules() if modeling is not None else ():
        if isinstance(part, modeling.PreTrainedModel) and getattr(part.config, "use_cache", False):
            raise ConfigError(
                "data_efficiency.data_sampling.dynamic_batching.pack: with a cache "
                f"{type(part).__name__} lets tokens attend to other samples of their row: set "
                "model.config.use_cache = False"
            )
    return module


def _row(sample: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(sample, Mapping):
        tokens = torch.as_tensor(np.asarray(sample["input_ids"])).long()
        labels = sample.get("labels")
        return tokens, tokens if labels is None else torch.as_tensor(np.asarray(labels)).long()
    tokens = torch.as_tensor(np.asarray(sample))
    if tokens.dim() != 1 or tokens.is_floating_point():
        raise TrainingError(
            f"a sample is a row of tokens or a mapping with input_ids, not {type(sample).__name__} "
            f"{tuple(tokens.shape)}: give a collate_fn"
        )
    return tokens.long(), tokens.long()

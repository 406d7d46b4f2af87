"""Measures of a sample: how long, how rare, how hard for a model, how often there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from drivetrain.errors import ConfigError, TrainingError

Array = npt.NDArray[Any]

Measure = Callable[[Any], Any]
"""Takes a batch (a list of samples, or what ``collate_fn`` makes of it)."""


@dataclass(frozen=True)
class Metric:
    """One thing to compute over a data set.

    Args:
        name: of the folder and the files.
        measure: returns one number for each sample of a batch, or with kind ``sum`` a vector.
        kind: ``value``: whole numbers, by which samples are ordered. ``sum``: vectors that are
            added up over all samples. ``row``: a row for each sample, of which ``reduce`` makes
            whole numbers when all are there.
        dtype: of what ``measure`` returns; checked where ``strict``.
        after: metric of kind ``sum`` that has to be complete first; then ``measure`` is what
            ``given(vector)`` returns.
        given: see ``after``.
        reduce: see ``kind``; takes [samples, n] and returns [samples].
        strict: refuse results of another dtype instead of rounding and casting them.
    """

    name: str
    measure: Measure | None = None
    kind: Literal["value", "sum", "row"] = "value"
    dtype: Any = np.int64
    after: Metric | None = None
    given: Callable[[Array], Measure] | None = None
    reduce: Callable[[Array], Array] | None = None
    strict: bool = False


def tokens_of(sample: Any) -> Array:
    """The tokens of a sample: of a mapping ``input_ids``, of a tuple the first, else itself.

    Raises:
        TrainingError: they are no whole numbers.
    """
    if isinstance(sample, Mapping):
        for key in ("input_ids", "tokens", "text"):
            if key in sample:
                return tokens_of(sample[key])
        raise TrainingError(f"a sample has none of input_ids, tokens and text, but {list(sample)}")
    if isinstance(sample, tuple):
        return tokens_of(sample[0])
    if isinstance(sample, (str, bytes)):
        return np.frombuffer(sample.encode() if isinstance(sample, str) else sample, np.uint8)
    found = np.asarray(sample).reshape(-1)
    if found.dtype.kind not in "iu":
        raise TrainingError(
            f"tokens are whole numbers, got {found.dtype}; give a function of yours"
        )
    return found


def length(name: str = "seqlen") -> Metric:
    """Tokens of a sample."""
    return Metric(name, _lengths)


def _lengths(samples: Sequence[Any]) -> Array:
    return np.array([len(tokens_of(sample)) for sample in samples], np.int64)


def vocabulary(size: int, name: str = "vocabulary") -> Metric:
    """How often every token is in the data set, [size]."""
    if size < 1:
        raise ConfigError(f"a vocabulary has at least one token, got {size}")

    def counts(samples: Sequence[Any]) -> Array:
        flat = np.concatenate([tokens_of(sample) for sample in samples])
        if len(flat) and (flat.max() >= size or flat.min() < 0):
            raise TrainingError(
                f"a sample has token {flat.max() if flat.max() >= size else flat.min()}, but the "
                f"vocabulary was said to have {size}"
            )
        return np.bincount(flat, minlength=size)

    return Metric(name, counts, "sum")


def vocabulary_rarity(size: int, name: str = "vocabularyrarity") -> Metric:
    """Minus the sum of log p over a sample's tokens, rounded; p is a token's share of the data set.

    Li et al. 2024, https://arxiv.org/abs/2212.03597, section 3.1.
    """

    def given(counts: Array) -> Measure:
        cost = -np.log(np.maximum(counts, 1) / max(1, int(counts.sum())))

        def rarity(samples: Sequence[Any]) -> Array:
            return np.rint([cost[tokens_of(sample)].sum() for sample in samples]).astype(np.int64)

        return rarity

    return Metric(name, after=vocabulary(size), given=given)


def model_loss(
    model: Any, loss: Callable[[Any, Any], Any] | None = None, name: str = "loss"
) -> Metric:
    """A sample's loss under a model, in thousandths, rounded.

    Args:
        model: a module; left in evaluation mode.
        loss: ``loss(model, sample) -> scalar``; by default the model is called with the sample as
            a batch of one, and returns its loss or something with ``loss``.
        name: of the metric.
    """
    import torch

    model.eval()
    call = loss or _loss_of_one

    def measure(samples: Sequence[Any]) -> Array:
        with torch.no_grad():
            found = [float(call(model, sample)) for sample in samples]
        return _thousandths(found, name)

    return Metric(name, measure)


def gradient_norm(
    model: Any, loss: Callable[[Any, Any], Any] | None = None, name: str = "gradient_norm"
) -> Metric:
    """L2 norm of a sample's gradient under a model, in thousandths, rounded; see `model_loss`."""
    import torch

    model.eval()
    call = loss or _loss_of_one

    def measure(samples: Sequence[Any]) -> Array:
        trained = [p for p in model.parameters() if p.requires_grad]
        found = []
        for sample in samples:
            with torch.enable_grad():
                value = call(model, sample)
            gradients: Any = torch.autograd.grad(value, trained, allow_unused=True)
            used = [gradient for gradient in gradients if gradient is not None]
            squares = [gradient.double().square().sum() for gradient in used]
            found.append(float(torch.stack(squares).sum().sqrt()))
        return _thousandths(found, name)

    return Metric(name, measure)


def _thousandths(values: Sequence[float], name: str) -> Array:
    found = np.asarray(values, np.float64)
    if not np.isfinite(found).all():
        raise TrainingError(f"the metric {name} of a sample is not finite")
    return np.rint(1000 * found).astype(np.int64)


def _loss_of_one(model: Any, sample: Any) -> Any:
    import torch
    from torch.utils import _pytree as pytree

    def batched(leaf: Any) -> Any:
        return torch.as_tensor(leaf).unsqueeze(0)

    if isinstance(sample, Mapping):
        output = model(**{key: batched(value) for key, value in sample.items()})
    elif isinstance(sample, tuple):
        output = model(*pytree.tree_map(batched, sample))
    else:
        output = model(batched(sample))
    loss = getattr(output, "loss", None)
    if loss is None and isinstance(output, Mapping):
        loss = output.get("loss")
    if loss is None:
        loss = output[0] if isinstance(output, tuple) else output
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise TrainingError("the model returns no loss for one sample; give loss=function")
    return loss


def near_duplicates(
    threshold: float = 0.8, shingle: int = 5, permutations: int = 128, name: str = "duplicates"
) -> Metric:
    """How many samples before it a sample is a near duplicate of.

    Sets of ``shingle`` tokens in a row are compared by MinHash (Broder 1997), candidates found by
    locality-sensitive hashing through the package ``datasketch``; two samples are near duplicates
    if their estimated Jaccard similarity is at least ``threshold``.

    Args:
        threshold: in (0, 1].
        shingle: tokens in a row that are one element of a set.
        permutations: hash functions; the estimate's standard error is at most 0.5 / sqrt of it.
        name: of the metric.

    Raises:
        ConfigError: ``datasketch`` is not installed.
    """
    try:
        datasketch: Any = import_module("datasketch")
    except ImportError:
        raise ConfigError(
            "near duplicates need the package datasketch: "
            "pip install drivetrain-data-efficiency[duplicates]"
        ) from None

    def signatures(samples: Sequence[Any]) -> Array:
        rows = []
        for sample in samples:
            tokens = np.ascontiguousarray(tokens_of(sample), np.int64)
            count = max(1, len(tokens) - shingle + 1)
            elements = {tokens[i : i + shingle].tobytes() for i in range(count)}
            sketch = datasketch.MinHash(num_perm=permutations)
            sketch.update_batch(sorted(elements))
            rows.append(sketch.hashvalues)
        return np.asarray(rows, np.uint64)

    def counted(rows: Array) -> Array:
        index = datasketch.MinHashLSH(threshold=threshold, num_perm=permutations)
        found = np.zeros(len(rows), np.int64)
        for number, row in enumerate(rows):
            sketch = datasketch.MinHash(num_perm=permutations)
            sketch.hashvalues = np.array(row, sketch.hashvalues.dtype)
            alike = list(index.query(sketch))
            found[number] = sum((rows[o] == row).mean() >= threshold for o in alike)
            index.insert(number, sketch)
        return found

    return Metric(name, signatures, "row", np.uint64, reduce=counted)

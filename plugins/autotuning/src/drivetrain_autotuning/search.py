"""Which config to try next: a model of those that were tried, by Gaussian processes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from drivetrain_autotuning.space import Choice

_SEEDS = 3
_LITTLE = 0.003
"""Improvement in the logarithm of the score that is not worth another trial."""

_CLOSE, _FINALISTS = 0.9, 3
"""Choices whose scores are at least this part of the best are tried again: so many at most."""


def search(
    choices: Sequence[Choice],
    score: Callable[[Choice], float | None],
    *,
    how: str,
    most: int,
    patience: int,
    foretold: Mapping[Choice, float] | None = None,
) -> dict[Choice, float | None]:
    """Try choices until there is little to gain; returns those tried with their scores.

    By a model, the best few are then tried once more, as far as there are trials left: of several
    measurements the largest is one that was lucky.

    Args:
        choices: all of them.
        score: tries one: larger is better and above 0; ``None`` if it fails. Of one that is tried
            again it returns what both trials say together.
        how: ``gridsearch``, ``random`` or ``model_based``.
        most: trials.
        patience: trials without a better one, after which it ends.
        foretold: scores of choices, known beforehand but for a factor. What is modelled is then how
            far each is from the truth, and the first choices are those of which most is foretold.
    """
    tried: dict[Choice, float | None] = {}
    best, since = 0.0, 0
    shuffled = [choices[at] for at in np.random.default_rng(0).permutation(len(choices))]
    order = list(choices) if how == "gridsearch" else shuffled
    points = _features(choices)
    before = _expected(choices, foretold or {})
    while len(tried) < min(most, len(choices)) and since < patience:
        chosen = next(choice for choice in order if choice not in tried)
        if how == "model_based":
            found = _next(choices, points, tried, before)
            if found is None:
                break
            chosen = found
        result = tried[chosen] = score(chosen)
        better = result is not None and result > best
        best, since = (max(best, result or 0.0)), 0 if better else since + 1
    if how == "model_based":
        close = [choice for choice, found in tried.items() if (found or 0.0) >= _CLOSE * best]
        close.sort(key=lambda choice: -(tried[choice] or 0.0))
        if len(close) > 1:
            for choice in close[: min(_FINALISTS, most - len(tried))]:
                tried[choice] = score(choice)
    return tried


def _features(choices: Sequence[Choice]) -> NDArray[np.float64]:
    """One row for each choice, each column from 0 to 1; words get a column for each value."""
    columns: list[list[float]] = []
    for place in range(len(choices[0]) if choices else 0):
        values = [choice[place][1] for choice in choices]
        if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            columns.append([math.log2(1 + max(0.0, float(v))) for v in values])
        else:
            kinds = sorted({str(v) for v in values})
            columns += [[float(str(v) == kind) for v in values] for kind in kinds[1:]]
    table = np.array(columns, dtype=np.float64).T.reshape(len(choices), -1)
    spread = np.ptp(table, axis=0)
    kept = table[:, spread > 0]
    return (kept - kept.min(axis=0)) / np.ptp(kept, axis=0) if kept.size else kept


def _expected(
    choices: Sequence[Choice], foretold: Mapping[Choice, float]
) -> NDArray[np.float64] | None:
    """Logarithms of what is foretold; their mean where nothing is. ``None`` if nothing is known."""
    known = [math.log(found) for choice in choices if (found := foretold.get(choice, 0.0)) > 0]
    if not known:
        return None
    mean = sum(known) / len(known)
    scores = (foretold.get(choice, 0.0) for choice in choices)
    return np.array([math.log(score) if score > 0 else mean for score in scores])


def _next(
    choices: Sequence[Choice],
    points: NDArray[np.float64],
    tried: dict[Choice, Any],
    before: NDArray[np.float64] | None,
) -> Choice | None:
    """The choice of most expected improvement; ``None`` where that is too little."""
    left = [place for place, choice in enumerate(choices) if choice not in tried]
    done = [place for place, choice in enumerate(choices) if choice in tried]
    scores = [tried[choices[place]] for place in done]
    worked = [score for score in scores if score]
    if len(worked) < _SEEDS or not points.size:
        if before is not None:
            return choices[max(left, key=lambda at: float(before[at]))]
        return choices[_farthest(points, left, done)]
    good = [place for place in done if tried[choices[place]]]
    logs = np.log([tried[choices[place]] for place in good])
    mean, spread, likely = _foretold(points[good], logs, points[left])
    if before is not None:
        wrong, how_wrong, likelier = _foretold(points[good], logs - before[good], points[left])
        if likelier > likely:  # else what was foretold tells less than nothing
            mean, spread = before[left] + wrong, how_wrong
    gain = mean - math.log(max(worked))
    expected = gain * _below(gain / spread) + spread * _density(gain / spread)
    expected *= _works(points[left], points[done], [bool(score) for score in scores])
    place = int(np.argmax(expected))
    return choices[left[place]] if expected[place] > _LITTLE * _chance(len(done)) else None


def _foretold(
    known: NDArray[np.float64], scores: NDArray[np.float64], wanted: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Mean and standard deviation of scores at points, by a Gaussian process; its likelihood."""
    from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
    from sklearn.gaussian_process import GaussianProcessRegressor  # type: ignore[import-untyped]
    from sklearn.gaussian_process.kernels import Matern, WhiteKernel  # type: ignore[import-untyped]

    kernel = Matern([1.0] * known.shape[1], (0.3, 10.0), nu=2.5) + WhiteKernel(1e-3, (1e-5, 1e-1))
    model = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # few points say little of lengths
        model.fit(known, scores)
    mean, spread = model.predict(wanted, return_std=True)
    # Of normalised scores, and so of a density that is wider by their deviation.
    scale = max(float(scores.std()), 1e-9)
    likely = float(model.log_marginal_likelihood_value_) - len(scores) * math.log(scale)
    return mean, np.maximum(spread, 1e-9), likely


def _works(
    wanted: NDArray[np.float64], known: NDArray[np.float64], worked: list[bool]
) -> NDArray[np.float64]:
    """How likely choices work: the share of those tried nearby that did."""
    distances = ((wanted[:, None, :] - known[None, :, :]) ** 2).sum(axis=2)
    near = np.exp(-distances / 0.25)
    share: NDArray[np.float64] = near @ np.array(worked, dtype=np.float64) + 0.2
    found: NDArray[np.float64] = share / (near.sum(axis=1) + 0.2)
    return found


def _density(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the normal distribution."""
    return np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def _below(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the normal distribution below ``x``."""
    return np.array([0.5 * (1 + math.erf(each / math.sqrt(2))) for each in x])


def _chance(trials: int) -> float:
    """Early trials are worth more, since little is known."""
    return min(1.0, trials / 10)


def _farthest(points: NDArray[np.float64], left: list[int], done: list[int]) -> int:
    """The choice that is least like those tried; the first one is that in the middle."""
    if not points.size:
        return left[0]
    if not done:
        return min(left, key=lambda at: float(np.abs(points[at] - 0.5).sum()))
    return max(
        left, key=lambda at: min(float(np.linalg.norm(points[at] - points[o])) for o in done)
    )

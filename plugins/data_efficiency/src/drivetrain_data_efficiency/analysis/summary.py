"""What is in a metric's files: numbers, and a picture of how values are spread."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt

from drivetrain.errors import ConfigError
from drivetrain_data_efficiency.analysis.fingerprint import FILE
from drivetrain_data_efficiency.analysis.indexed import IndexedDataset, exists
from drivetrain_data_efficiency.analysis.reduction import write_values

Array = npt.NDArray[Any]

_PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)


@dataclass(frozen=True)
class Summary:
    """Facts about one metric.

    Args:
        name: of the metric.
        samples: how many.
        distinct: values that differ.
        percentiles: percent -> value.
        mean: of all samples.
        counts: samples by bin.
        edges: of the bins, one more than ``counts``.
    """

    name: str
    samples: int
    distinct: int
    percentiles: dict[int, int]
    mean: float
    counts: list[int]
    edges: list[float]

    def lines(self) -> list[str]:
        """Text for a terminal."""
        spread = ", ".join(f"{p} % {value:,}" for p, value in self.percentiles.items())
        count = f"{self.samples:,} samples, {self.distinct:,} values"
        return [f"{self.name}: {count}, mean {self.mean:,.1f}", f"  {spread}"]

    def picture(self, width: int = 720, height: int = 320) -> str:
        """A histogram as SVG."""
        left, top, bottom = 64, 36, 40
        most = max(self.counts)
        bar = (width - left - 16) / len(self.counts)
        box = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12"'
        title = f"{escape(self.name)}: {self.samples:,} samples, median {self.percentiles[50]:,}"
        rows = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {box}>',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            f'<text x="{left}" y="22" font-size="14">{title}</text>',
        ]
        tall = height - top - bottom
        for number, count in enumerate(self.counts):
            size = tall * count / most
            rows.append(
                f'<rect x="{left + number * bar:.1f}" y="{top + tall - size:.1f}" '
                f'width="{max(bar - 1, 0.5):.1f}" height="{size:.1f}" fill="#3b6ea5"/>'
            )
        base = top + tall
        rows.append(f'<path d="M{left} {top}V{base}H{width - 16}" stroke="#444" fill="none"/>')
        for share in (0, 0.5, 1):
            y = base - tall * share
            text = f"{most * share:,.0f}"
            rows.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{text}</text>')
        for number in range(5):
            place = number / 4
            x = left + place * bar * len(self.counts)
            value = self.edges[0] + place * (self.edges[-1] - self.edges[0])
            rows.append(
                f'<text x="{x:.0f}" y="{base + 18}" text-anchor="middle">{value:,.0f}</text>'
            )
        return "\n".join([*rows, "</svg>\n"])


def summary(folder: Path, bins: int = 60) -> Summary:
    """Summarise the metric in a folder; reads distinct values and their counts, not samples.

    Raises:
        ConfigError: the folder has no files of a metric.
    """
    name = folder.name
    prefix = folder / f"{name}_index_to_metric"
    if not exists(prefix):
        raise ConfigError(f"{folder} has no files of a metric ({prefix.name}.idx is missing)")
    values = np.asarray(IndexedDataset(prefix).flat, np.int64)
    sizes = np.asarray(IndexedDataset(folder / f"{name}_index_to_sample").sizes, np.int64)
    ends = np.cumsum(sizes)
    total = int(ends[-1])
    places = [min(int(np.ceil(p / 100 * total)), total) for p in _PERCENTILES]
    ranks = np.searchsorted(ends, np.maximum(places, 1))
    counts, edges = np.histogram(values, bins=min(bins, max(1, len(values))), weights=sizes)
    return Summary(
        name,
        total,
        len(values),
        dict(zip(_PERCENTILES, values[ranks].tolist(), strict=True)),
        float((values * sizes).sum() / total),
        counts.astype(np.int64).tolist(),
        edges.tolist(),
    )


def metric_folders(folder: Path) -> list[Path]:
    """The folders of complete metrics in a folder, or the folder itself."""
    if exists(folder / f"{folder.name}_index_to_metric"):
        return [folder]
    found = [f for f in sorted(folder.iterdir()) if exists(f / f"{f.name}_index_to_metric")]
    if not found:
        raise ConfigError(f"{folder} has no metrics: run drivetrain data analyze first")
    return found


def merge_metrics(target: Path, sources: Sequence[Path]) -> list[str]:
    """Join analyses of several data sets into that of all of them one after another.

    Args:
        target: new folder.
        sources: folders of analyses, in the order of their data sets.

    Returns:
        Names of the metrics that all of them have.

    Raises:
        ConfigError: they have no metric in common, or ``target`` has files.
    """
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty; merge into a new folder")
    of_each = [{folder.name for folder in metric_folders(source)} for source in sources]
    names = sorted(set.intersection(*of_each))
    if not names:
        raise ConfigError(f"{', '.join(map(str, sources))} have no metric in common")
    for name in names:
        parts = [
            np.array(IndexedDataset(source / name / f"{name}_sample_to_metric").flat)
            for source in sources
        ]
        whole = np.concatenate([part.astype(np.int64) for part in parts])
        write_values(target / name, name, whole)
        prints = [source / name / FILE for source in sources]
        merged = {"merged": [json.loads(p.read_text("utf-8")) for p in prints if p.is_file()]}
        (target / name / "sources.json").write_text(json.dumps(merged), "utf-8")
    return names

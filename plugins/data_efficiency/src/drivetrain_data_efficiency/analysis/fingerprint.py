"""Tell data sets apart without reading them: a digest of their length and of some samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from drivetrain.errors import ConfigError
from drivetrain_data_efficiency.section import MetricSection

FILE = "fingerprint.json"
SAMPLES = 32


def fingerprint(dataset: Any) -> dict[str, Any]:
    """Number of samples and a digest of ``SAMPLES`` of them, evenly spread, as plain data."""
    total = len(dataset)
    places = sorted({int(place) for place in np.linspace(0, total - 1, SAMPLES)}) if total else []
    digest = hashlib.sha256()
    for place in places:
        _feed(digest, dataset[place])
    return {"samples": total, "digest": digest.hexdigest()}


def _feed(digest: Any, value: Any) -> None:
    """Add a sample: its numbers whatever they are in, its text, its parts by name."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"\n{key}:".encode())
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)) and not all(isinstance(v, (int, float)) for v in value):
        for item in value:
            digest.update(b"\n-")
            _feed(digest, item)
    elif isinstance(value, (str, bytes)):
        digest.update(value.encode() if isinstance(value, str) else value)
    elif value is not None:
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
        digest.update(f"{array.dtype.kind}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes() if array.dtype != object else b"")


def check_fingerprints(metrics: Mapping[str, MetricSection], dataset: Any) -> None:
    """Refuse metrics' files that lie beside the fingerprint of another data set.

    Raises:
        ConfigError: names the files and both data sets.
    """
    for name, metric in metrics.items():
        if metric.opens and metric.index_to_sample_path is not None:
            check_folder(Path(metric.index_to_sample_path).parent, name, dataset)


def check_folder(folder: Path, name: str, dataset: Any) -> None:
    """Refuse the files of a metric that lie beside the fingerprint of another data set.

    Files without one, such as DeepSpeed's, are compared by their number of samples alone, later.

    Raises:
        ConfigError: names the folder and both data sets.
    """
    file = folder / FILE
    if not file.is_file():
        return
    saved, now = json.loads(file.read_text("utf-8")), fingerprint(dataset)
    if saved != now:
        raise ConfigError(
            f"the files of the metric {name} in {folder} are of another data set "
            f"({saved['samples']} samples, digest {saved['digest'][:12]}) than this one "
            f"({now['samples']}, {now['digest'][:12]}): run the analyzer over this data set"
        )

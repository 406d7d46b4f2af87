"""Every pair of axes, ZeRO's stages, offloading, precision and schedule trains like one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any

import pytest
import torch
from pairs import all_pairs
from three_axes import Curve, alone, close, make, train, with_experts

from drivetrain.testing import run_distributed

STEPS, MOST_RANKS = 3, 8

VALUES: dict[str, Sequence[Any]] = {
    "pp": (1, 2, 4),
    "tp": (1, 2),
    "dp": (1, 2),
    "ep": (None, 1, 2),  # without experts, all of them on each rank, or half
    "stage": (0, 1, 2, 3),
    "offload": (False, True),
    "precision": ("float64", "float32", "bf16", "fp16"),
    "micro_batches": (8, 16),
    "schedule": ("1f1b", "gpipe", "interleaved", "zb_h1", "zb_v"),
    "clipping": (0.0, 0.5),
}
BOUNDS = {"float64": 1e-8, "float32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
"""Precision -> relative difference of losses, which three steps of SGD hardly widen."""


def possible(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What there are ranks and blocks for, in place of ``row``; pairs are in one of them."""
    if row["dp"] == 1 and row["ep"] == 2:
        yield from possible({**row, "dp": 2})
        yield from possible({**row, "ep": 1})
    elif row["pp"] * row["tp"] * row["dp"] > MOST_RANKS:
        yield {**row, "tp": 1}
        yield from possible({**row, "dp": 1}) if row["ep"] != 2 else ({**row, "pp": 2},)
    else:
        yield row


def legal(row: dict[str, Any]) -> bool:
    """Whether four blocks suffice, ranks can share out experts, and there is what to offload."""
    several = row["schedule"] in ("interleaved", "zb_v")
    apart = row["ep"] == 2 and row["dp"] == 1
    away = row["offload"] and row["stage"] == 0
    return not (several and row["pp"] == 4) and not apart and not away


def rows() -> list[dict[str, Any]]:
    found = [one for row in all_pairs(VALUES) for one in possible(row)]
    fixed = []
    for row in found:
        if row["offload"] and row["stage"] == 0:
            fixed += [{**row, "offload": False}, {**row, "stage": 2}]
        else:
            fixed.append(row)
    done = []
    for row in fixed:
        if row["schedule"] in ("interleaved", "zb_v") and row["pp"] == 4:
            done += [{**row, "schedule": "zb_h1"}, {**row, "pp": 2}]
        else:
            done.append(row)
    return done


ROWS = rows()
SMALL = [i for i, row in enumerate(ROWS) if row["pp"] == 2 and row["tp"] + row["dp"] < 4]
CHEAP = [next(i for i in reversed(SMALL) if ROWS[i]["ep"] == ep) for ep in VALUES["ep"]]
"""Rows that every run of the suite has: two stages, at most four ranks."""


def label(row: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in row.items())


def test_the_rows_contain_every_legal_pair_of_values() -> None:
    for a, b in combinations(VALUES, 2):
        for x, y in product(VALUES[a], VALUES[b]):
            some = {key: values[0] for key, values in VALUES.items()}
            chosen = {**some, "stage": 2, "dp": 2, a: x, b: y}
            if legal(chosen):
                assert any(row[a] == x and row[b] == y for row in ROWS), (a, x, b, y)


def run(row: dict[str, Any]) -> Curve:
    zero = {"offload_optimizer": {"device": "cpu"}} if row["offload"] else {}
    changes: dict[str, Any] = {"zero": zero, "micro_batches": row["micro_batches"]}
    changes["dtype"] = torch.float64 if row["precision"] == "float64" else torch.float32
    if row["precision"] in ("bf16", "fp16"):
        changes[row["precision"]] = {"enabled": True}
    if row["precision"] == "fp16":
        changes["fp16"]["loss_scale"] = 128.0
    if row["pp"] > 1:
        changes["pipeline"] = {"schedule": row["schedule"]}
    if row["ep"] is not None:
        changes |= {"model": with_experts(), "moe": {"ep_size": row["ep"]}}
    layout = row["pp"], row["tp"], row["dp"]
    engine = make(*layout, row["stage"], gradient_clipping=row["clipping"], **changes)
    curve = train(engine, 0, STEPS)
    close(engine)
    return curve


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=label(row), marks=() if number in CHEAP else pytest.mark.long)
        for number, row in enumerate(ROWS)
    ],
)
def test_a_layout_trains_like_one_process(row: dict[str, Any]) -> None:
    model = None if row["ep"] is None else with_experts()
    expected = alone(0, STEPS, row["clipping"], row["micro_batches"], model)[0]
    bound = BOUNDS[row["precision"]]
    world = row["pp"] * row["tp"] * row["dp"]
    for curve in run_distributed(run, world, row, timeout=200):
        for (loss, norm), (want, want_norm) in zip(curve, expected, strict=True):
            assert loss == pytest.approx(want, rel=bound)
            assert norm == pytest.approx(want_norm, rel=5 * bound)

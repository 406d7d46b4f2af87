"""Sizes of tiles follow from memory, and packed rows are packed at every size of the axis."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from drivetrain_sequence.measured import LEAST, SHARES, UNKNOWN, bytes_of_token
from sequence_models import VOCABULARY, batch, engine_of, plain, tiny, train

from drivetrain.engine.engine import Engine
from drivetrain.testing import run_distributed

MEASURED = dict.fromkeys(("loss_tile", "mlp_tile", "norm_tile"), "measured")

HEAD = 2 * 8 * (2 * VOCABULARY + 1)
"""Bytes of a token through the head and its loss, in float64: logits, their log-softmax and the
loss, and a gradient of each."""


@contextmanager
def memory(engine: Engine, free: int, used: int = 2**30) -> Iterator[None]:
    """A device of which so many bytes are free for this rank."""
    accelerator = engine.job.accelerator
    total = (free + used) * engine.job.ranks.ranks_on_host
    with (
        mock.patch.object(accelerator, "total_memory", return_value=total),
        mock.patch.object(accelerator, "memory_allocated", return_value=used),
    ):
        yield


def sizes(caplog: pytest.LogCaptureFixture, free: int) -> dict[str, int]:
    """What the first step says of the sizes that it has chosen."""
    caplog.clear()
    engine = engine_of(tiny("llama"), sequence_parallel=MEASURED)
    with caplog.at_level(logging.INFO, "drivetrain.sequence"), memory(engine, free):
        train(engine, "plain", steps=2)
    engine.destroy()
    said = [record.args for record in caplog.records if record.name == "drivetrain.sequence"]
    assert len(said) == len(MEASURED)
    return {str(args[0]): args[1] for args in said if isinstance(args, tuple)}  # type: ignore[misc]


def test_a_tile_takes_a_share_of_the_memory_that_is_free(caplog: pytest.LogCaptureFixture) -> None:
    few, many = sizes(caplog, 2**22), sizes(caplog, 2**26)
    assert few.keys() == many.keys() == MEASURED.keys()
    for key in MEASURED:
        assert many[key] == pytest.approx(16 * few[key], rel=0.02)
    assert many["loss_tile"] == 2**26 // SHARES // HEAD
    assert set(sizes(caplog, 1).values()) == {LEAST}
    assert set(sizes(caplog, -(2**30)).values()) == {UNKNOWN}  # a device that does not say


def test_a_token_takes_what_is_made_for_it_and_gradients_of_that() -> None:
    mlp = torch.nn.Sequential(
        torch.nn.Linear(8, 24), torch.nn.GELU(), torch.nn.Dropout(0.5), torch.nn.Linear(24, 8)
    )
    x, before = torch.randn(2, 9, 8), torch.get_rng_state()
    assert bytes_of_token(mlp, mlp, [x], 1) == 2 * 4 * (24 + 24 + 8)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(part.training for part in mlp.modules())


class Watched(torch.nn.LayerNorm):
    """Notes how many tokens go through it at a time."""

    def __init__(self) -> None:
        super().__init__(32, dtype=torch.float64)
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.shape[1])
        return super().forward(x)


def watched() -> tuple[Any, Watched]:
    model = tiny("llama")
    model.model.norm = norm = Watched()
    return model, norm


def in_measured_tiles(sp: int) -> tuple[list[float], list[torch.Tensor], list[int]]:
    """Losses, weights, and tokens that went through a norm; the first rank of two has more free."""
    model, norm = watched()
    engine = engine_of(model, sequence_parallel_size=sp, sequence_parallel=MEASURED)
    free = 2**40 if sp > 1 and os.environ["RANK"] == "0" else 1
    with memory(engine, free):
        losses = train(engine, "padded")
    weights = [p.detach().clone() for p in model.parameters()]
    engine.destroy()
    return losses, weights, norm.seen


def test_measured_tiles_change_nothing_and_all_ranks_have_the_same() -> None:
    model, _ = watched()
    expected = plain(model, "padded")
    alone, ranks = in_measured_tiles(1), run_distributed(in_measured_tiles, 2, 2)
    for losses, weights, _ in (alone, *ranks):
        assert losses == pytest.approx(expected, rel=1e-6)
        for ours, theirs in zip(weights, model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)
    assert LEAST // 2 in alone[2]  # of two rows
    assert LEAST // 2 in ranks[0][2]
    assert ranks[0][2] == ranks[1][2]


@pytest.mark.parametrize(
    "config",
    [
        {"sequence_parallel_size": 1},
        {"sequence_parallel": {"mlp_tile": 4}},
        {"sequence_parallel": {"loss_tile": 5}},
    ],
    ids=str,
)
def test_packed_rows_are_packed_at_size_one_as_they_are_at_two(config: dict[str, Any]) -> None:
    engine = engine_of(tiny("llama"), **config)
    assert train(engine, "packed") == pytest.approx(plain(tiny("llama"), "packed"), rel=1e-6)
    kept = engine(input_ids=batch(0, "plain")["input_ids"], use_cache=True).past_key_values
    assert kept is not None  # by who asks for it
    engine.destroy()

"""put, query, can_schedule and flush, over sequences that the caller keeps."""

from __future__ import annotations

import pytest
import torch
from drivetrain_inference import SchedulingError, SchedulingResult, serve
from tiny_decoders import VOCABULARY, decoder

from drivetrain.errors import ConfigError

OPTIONS = {"block_size": 4, "max_batch_tokens": 16, "max_sequences": 3, "cache_blocks": 10}
OPTIONS |= {"max_tracked_sequences": 4, "max_context": 30}


@pytest.fixture
def engine():
    with serve(decoder(), {"inference": OPTIONS}) as found:
        yield found


def test_logits_are_those_of_the_last_token_of_each(engine):
    tokens = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = engine.module(tokens).logits
    found = engine.put([7, 3], [tokens[0, :5], tokens[1, :9].tolist()])
    torch.testing.assert_close(
        found, torch.stack([wanted[0, 4], wanted[1, 8]]), rtol=1e-4, atol=1e-4
    )
    found = engine.put([3, 7], [tokens[1, 9:10], tokens[0, 5:12]])
    torch.testing.assert_close(
        found, torch.stack([wanted[1, 9], wanted[0, 11]]), rtol=1e-4, atol=1e-4
    )


def test_flush_frees_blocks(engine):
    engine.put([1], [[1] * 9])
    assert engine.ragged.free_blocks == 7
    engine.flush(1)
    engine.flush(99)
    assert engine.ragged.free_blocks == 10


def test_query_says_what_fits(engine):
    engine.put([1], [[1] * 6])
    assert engine.query(1, 10, 1) == (6, 1)
    assert engine.query(1, 2, 0) == (2, 0)
    assert engine.query(2, 7, 9) == (7, 2)
    assert engine.query(2, 100, 100) == (30, 8)
    assert engine.ragged.get_remaining_block_capacity(1) == 2
    engine.put([2, 3, 4], [[1], [1], [1]])
    assert engine.query(5, 1, 1) == (0, 0)


@pytest.mark.parametrize(("uids", "lengths", "result"), [
    ([1, 2], [3, 4], SchedulingResult.Success),
    ([1, 2, 3, 4, 5], [1] * 5, SchedulingResult.EngineSequenceLimitExceeded),
    ([1, 2, 3, 4], [1] * 4, SchedulingResult.BatchSequenceLimitExceeded),
    ([1, 2], [9, 9], SchedulingResult.BatchTokenLimitExceeded),
    ([1], [15], SchedulingResult.SequenceTokenLimitExceeded),
    ([1, 2, 3], [10, 3, 3], SchedulingResult.KVCacheLimitExceeded),
])  # fmt: skip
def test_limits_have_names(engine, uids, lengths, result):
    engine.put([1], [[1] * 16])
    if result is SchedulingResult.KVCacheLimitExceeded:
        engine.put([2], [[1] * 12])
    assert engine.can_schedule(uids, lengths) is result
    if result is not SchedulingResult.Success:
        free = engine.ragged.free_blocks
        with pytest.raises(SchedulingError, match=result.name):
            engine.put(uids, [[1] * n for n in lengths])
        assert engine.ragged.free_blocks == free


def test_a_sequence_without_tokens_is_refused(engine):
    with pytest.raises(ConfigError, match="each sequence once, with at least one token"):
        engine.put([1], [[]])
    with pytest.raises(ConfigError, match="each sequence once"):
        engine.put([1, 1], [[1], [2]])

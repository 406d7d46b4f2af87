"""What follows from the records of ranks, without any rank."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from drivetrain_watchdog import divergence
from drivetrain_watchdog.history import RECENT, History, Words, members, name_of, text_of
from drivetrain_watchdog.rules import find_cause
from drivetrain_watchdog.watch import Watch
from drivetrain_watchdog.whereabouts import Whereabouts
from torch.distributed import HashStore

from drivetrain.communication.failure import Failure
from drivetrain.contracts import Collective, Kind, Purpose, Tag

TAG = Tag(Purpose.GRADIENT, "bucket", "test")


def record(
    counts: dict[str, int], needs: dict[str, int] | None = None, **facts: Any
) -> dict[str, Any]:
    wait = None
    if needs is not None:
        wait = {"what": f"a collective {needs}", "where": "", "needs": needs, "exact": True}
        wait["exact"] = facts.pop("exact", True)
    return {
        "lines": {name: [count, 0] for name, count in counts.items()},
        "wait": wait,
        "where": "block.1, forward",
        "at": "train.py:7 in main",
        "step": 4,
        "still": 0.0,
        "silent": 0.0,
        "caught": "",
        "left": False,
        "last": {},
        "stopped": False,
        **facts,
    }


def cause(records: list[dict[str, Any]], patience: float = 300.0) -> tuple[int, bool, str]:
    """Whom rank 0 waits for, whether for ever, and the words."""
    found = find_cause(0, records[0], lambda rank: records[rank], patience)
    return (-1, False, "") if found is None else (found.rank, found.is_certain, found.text)


WAITING = record({"0..2/1": 5}, {"0..2/1": 5})
COME = record({"0..2/1": 5}, {"0..2/1": 5})


def test_a_rank_that_computes_may_be_slow() -> None:
    rank, certain, text = cause([WAITING, COME, record({"0..2/1": 4})])
    assert (rank, certain) == (2, False)
    assert "is at train.py:7 in main (block.1, forward), in step 5" in text


@pytest.mark.parametrize(
    "fact", [{"still": 301.0}, {"silent": 301.0}, {"stopped": True}, {"left": True}]
)
def test_a_rank_that_will_not_come(fact: dict[str, Any]) -> None:
    assert cause([WAITING, COME, record({"0..2/1": 4}, **fact)])[:2] == (2, True)


def test_patience_may_be_without_end() -> None:
    assert cause([WAITING, COME, record({"0..2/1": 4}, still=1e9)], patience=0.0)[:2] == (2, False)


def test_ranks_that_have_come_are_not_to_blame() -> None:
    left = record({"0..2/1": 5}, left=True)
    assert cause([WAITING, COME, left])[0] == -1
    assert cause([WAITING, COME, record({"0..2/1": 9}, still=1e9)])[0] == -1


def test_a_rank_that_waits_itself_is_followed() -> None:
    through = record({"0..1/1": 3, "1..2/1": 7}, {"1..2/1": 7})
    records = [record({"0..1/1": 4}, {"0..1/1": 4}), through, record({"1..2/1": 6}, left=True)]
    rank, certain, text = cause(records)
    assert (rank, certain) == (2, True)
    assert text.startswith("rank 0 waits in a collective {'0..1/1': 4}; rank 1 waits in")


def test_a_circle_is_certain_only_where_each_waits_for_all() -> None:
    back = record({"0..1/1": 3, "0,1": 7}, {"0,1": 7})
    first = record({"0..1/1": 4, "0,1": 6}, {"0..1/1": 4})
    assert cause([first, back])[:2] == (0, True)
    # A broadcast that came from elsewhere: rank 0 may go on.
    loose = record({"0..1/1": 4, "0,1": 6}, {"0..1/1": 4}, exact=False)
    assert cause([loose, back])[0] == -1


def test_messages_are_needed_from_one_rank() -> None:
    first = record({"1>0": 2}, {"1>0": 2})
    assert cause([first, record({"1>0": 1}, left=True)])[:2] == (1, True)
    assert cause([first, record({"1>0": 2}, left=True)])[0] == -1


# -- histories -------------------------------------------------------------------------------------


def history(*keys: str) -> History:
    words = Words()
    made = History(words)
    for key in keys:
        made.add(words.number(key, lambda key=key: key), f"at {key}")
    return made


def test_digests_agree_as_long_as_histories_do() -> None:
    one, other = history(*"abcab"), history(*"abcba")
    same = [one.at(n).digest == other.at(n).digest for n in range(1, 6)]  # type: ignore[union-attr]
    assert same == [True, True, True, False, False]


def test_a_history_forgets_what_is_old() -> None:
    made = history(*"ab" * RECENT)
    assert made.at(RECENT) is None
    assert made.at(2 * RECENT + 1) is None
    assert len(made.recent()) == RECENT
    assert [made.recent()[0].place, made.recent()[-1].place] == [RECENT + 1, 2 * RECENT]


def story(texts: str, first: int = 1) -> dict[str, Any]:
    words = sorted(set(texts))
    numbers = [words.index(text) for text in texts]
    return {"first": first, "texts": numbers, "wheres": numbers, "words": words, "places": words}


def test_the_odd_rank_of_several_is_named() -> None:
    stories = {0: story("abcd"), 1: story("bcxd", first=2), 2: story("abcd")}
    stories[1] = story("bxd", first=2)
    said = divergence.describe("0..2/1", stories, {})
    assert said.startswith("ranks part at collective 3 (rank 1 differs from most): rank 1 issues x")
    assert "rank 0 issues c (c), as 2 of 3 ranks do" in said


def test_two_ranks_are_both_named() -> None:
    said = divergence.describe("0>1", {0: story("abc"), 1: story("abd")}, {1: record({})})
    assert said.startswith("ranks part at message from rank 0 to rank 1, number 3: ")
    assert "rank 0 issues c" in said
    assert "rank 1 issues d (d), and is at train.py:7 in main" in said


def test_a_difference_may_be_too_old() -> None:
    said = divergence.describe("0..1/1", {0: story("ab", 9), 1: story("ab", 9)}, {0: record({})})
    assert "longer ago than they remember" in said


@pytest.mark.parametrize("ranks", [(0, 1), (0, 2, 4), (3,), (0, 1, 3), (2, 1), (0, 5)])
def test_names_of_groups_tell_the_ranks(ranks: tuple[int, ...]) -> None:
    assert list(members(name_of(ranks))) == list(ranks)


def test_a_collective_in_words() -> None:
    tensors = torch.ones(2), torch.ones(2, 1)
    gather = Collective(Kind.ALL_GATHER, tensors, ("dp", "sp"), TAG)
    assert text_of(gather) == "all_gather of gradient/bucket/test over 'dp+sp', float32 [2]"
    splits = [1, 1]
    exchange = Collective(Kind.ALL_TO_ALL, tensors[1:] * 2, "dp", TAG, input_splits=splits)
    assert text_of(exchange).endswith("float32 [-1, 1]")


def test_a_rank_that_has_come_and_is_not_heard_of_any_more_is_cut_off() -> None:
    away = {**COME, "silent": 20.0}
    assert cause([WAITING, COME, away], patience=30.0) == (-1, False, "")
    rank, certain, text = cause([WAITING, COME, away], patience=15.0)
    assert (rank, certain) == (2, True)
    assert "to which rank 2 has come, but that gives no sign of life for 20 s, last seen at" in text
    assert cause([WAITING, COME, away], patience=0.0) == (-1, False, "")


def test_a_silent_rank_is_the_cause_though_it_waited_when_it_was_last_heard_of() -> None:
    behind = record({"0..2/1": 4}, {"0..2/1": 5}, silent=20.0)
    rank, certain, text = cause([WAITING, COME, behind], patience=15.0)
    assert (rank, certain) == (2, True)
    assert "which gives no sign of life for 20 s" in text


# -- two watches over one store ------------------------------------------------------------------


class Board:
    """Keeps what is announced, as the job's board does."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self._failure: Failure | None = None

    def announce(self, what: str) -> None:
        self._failure = self._failure or Failure(None, what)

    def first(self) -> Failure | None:
        return self._failure


def watch_of(rank: int, board: Board) -> Watch:
    """One whose thread has ended, so that a test says when it looks."""
    ranks = SimpleNamespace(rank=rank, local_rank=rank, ranks_on_host=2)
    job = SimpleNamespace(
        failures=board, rank=rank, world_size=2, ranks=ranks, progress=SimpleNamespace(steps=1)
    )
    watch = Watch(job, Whereabouts(job), 0.0)  # type: ignore[arg-type]
    watch.close()
    return watch


def test_what_a_rank_told_before_ranks_parted_is_no_answer() -> None:
    """Rank 1 tells of itself at each new kind; what it told then lacks the one that differs."""
    board = Board(HashStore())
    watches = [watch_of(rank, board) for rank in (0, 1)]
    said = [("gather", "gather", "reduce"), ("gather", "gather", "agree")]
    for watch, kinds in zip(watches, said, strict=True):
        for kind in kinds:
            if kind == "agree":
                watch.tell_ahead()
            watch.history("0..1/1").add(watch.words.number(kind, lambda kind=kind: kind), "")
    board.store.set("watchdog/rank/1", json.dumps(watches[1].record()))
    watches[0]._look_once()
    assert watches[0].verdict is None, "rank 1 has not yet said what differs"
    watches[1]._look_once()
    watches[0]._look_once()
    found = board.first()
    assert found is not None
    assert "part at collective 3: rank 1 issues agree" in found.what
    assert "rank 0 issues reduce" in found.what

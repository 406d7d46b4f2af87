"""Where the collectives of ranks part: the first that differs, and who issued what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from drivetrain_watchdog.rules import Record, caught, place

Story = Mapping[str, Any]
"""A history as ranks send it: ``first`` count, then ``texts`` and ``wheres`` by count."""

_SHOWN = 4


def first_difference(one: Story, other: Story) -> int | None:
    """The first count at which two histories differ, of those that both remember."""
    begin = max(one["first"], other["first"])
    end = min(one["first"] + len(one["texts"]), other["first"] + len(other["texts"]))
    for count in range(begin, end):
        if _at(one, count)[0] != _at(other, count)[0]:
            return count
    return None


def describe(name: str, stories: Mapping[int, Story], records: Mapping[int, Record]) -> str:
    """Say where ranks part.

    Args:
        name: of the group, or of the messages from one rank to another.
        stories: rank -> history; two at least, of which some differ.
        records: rank -> what else it has written.
    """
    ranks = list(stories)
    counts = [
        count
        for rank in ranks[1:]
        if (count := first_difference(stories[ranks[0]], stories[rank])) is not None
    ]
    what = "collective"
    if ">" in name:
        source, to = name.split(">")
        what = f"message from rank {source} to rank {to}, number"
    if not counts:
        return (
            f"ranks have issued different collectives, longer ago than they remember: "
            f"{', '.join(f'rank {rank} is {place(records[rank])}' for rank in records)}"
        )
    count = min(counts)
    texts = {r: _at(s, count) for r, s in stories.items() if _has(s, count)}
    usual, number = Counter(text for text, _ in texts.values()).most_common(1)[0]
    odd = [rank for rank, (text, _) in texts.items() if text != usual]
    rest = [rank for rank in texts if rank not in odd]
    both_alike = number * 2 == len(texts)
    head = f"ranks part at {what} {count}"
    sides = [
        *_side(odd, texts, records),
        *_side(rest[: 1 if len(rest) > 1 else None], texts, records),
    ]
    if len(rest) > 1:
        sides[-1] += f", as {len(rest)} of {len(texts)} ranks do"
    verdict = "" if both_alike else f" (rank {', '.join(map(str, odd[:_SHOWN]))} differs from most)"
    hint = "; all ranks have to run the same passes, steps and saves in the same order"
    return f"{head}{verdict}: {'; '.join(sides)}{hint}"


def _side(
    ranks: Sequence[int], texts: Mapping[int, tuple[str, str]], records: Mapping[int, Record]
) -> list[str]:
    found = []
    for rank in ranks[:_SHOWN]:
        text, where = texts[rank]
        said = f"rank {rank} issues {text}" + (f" ({where})" if where else "")
        if rank in records:
            said += f", and is {place(records[rank])}{caught(records[rank])}"
        found.append(said)
    return found


def _has(story: Story, count: int) -> bool:
    return 0 <= count - int(story["first"]) < len(story["texts"])


def _at(story: Story, count: int) -> tuple[str, str]:
    index = count - int(story["first"])
    return story["words"][story["texts"][index]], story["places"][story["wheres"][index]]

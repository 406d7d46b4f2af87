"""A request goes where its beginning is known, but never waits long for it."""

from __future__ import annotations

from types import SimpleNamespace

from drivetrain_server.workers.prefixes import Prefixes, keys_of
from drivetrain_server.workers.router import Router


def replica(load, *prompts):
    known = Prefixes()
    for prompt in prompts:
        known.remember(keys_of(prompt))
    return SimpleNamespace(load=load, prefixes=known)


def test_keys_stand_for_all_that_comes_before():
    one, other = keys_of("a" * 600), keys_of("b" + "a" * 599)
    assert len(one) == 2
    assert not set(one) & set(other)
    assert keys_of("a" * 512 + "c" * 300)[:2] == one
    assert len(keys_of(list(range(200)))) == 3
    assert keys_of("short") == []


def test_a_beginning_that_is_known_is_worth_a_short_queue_and_no_long_one():
    long = "x" * 2000
    idle, knows = replica(0), replica(5, long)
    assert Router._chosen([idle, knows], keys_of(long)) is knows
    knows.load = 400
    assert Router._chosen([idle, knows], keys_of(long)) is idle
    knows.load = 5
    assert Router._chosen([idle, knows], keys_of("y" * 2000)) is idle


def test_old_beginnings_are_forgotten():
    known = Prefixes(most=4)
    known.remember(keys_of("a" * 1024))
    known.remember(keys_of("b" * 512))
    assert known.matched(keys_of("b" * 512)) == 2
    assert known.matched(keys_of("a" * 1024)) == 0

"""The shelf and all workers have the same adapters, whoever dies, refuses or asks at once."""

from __future__ import annotations

import asyncio
import logging

import pytest
from drivetrain_server.workers.exchange import Exchange
from drivetrain_server.workers.shelf import Shelf
from drivetrain_server.workers.tickets import RefusedError, Ticket, WorkerLostError

from drivetrain.errors import ConfigError


class Worker:
    """A replica whose worker does at once what it is told."""

    def __init__(self, exchange, loaded=()):
        self.exchange, self.loaded, self.missed = exchange, list(loaded), set()
        self.ready, self.life, self.refuses, self.dies = True, object(), set(), False
        self.pause = asyncio.Event()
        self.pause.set()
        self.tickets = []

    def tell(self, order):
        ticket = Ticket(order, 0, lambda ticket, _: self.tickets.remove(ticket))
        self.tickets.append(ticket)
        self.task = asyncio.create_task(self.do(ticket, order["name"], order["path"]))
        return ticket

    async def do(self, ticket, name, path):
        await self.pause.wait()
        if self.dies:
            self.ready = False
            ticket.fail(WorkerLostError("it has died"))
        elif (name in self.refuses) if path else (name not in self.loaded):
            ticket.fail(RefusedError(f"{name} is refused", 400, None))
        else:
            self.loaded = [each for each in self.loaded if each != name] + [name] * bool(path)
            ticket.begin(0)

    def open(self, life):
        if life is not self.life:
            raise WorkerLostError("it has died")
        self.ready = True

    def restart(self, shelf, failed=()):
        """A new process loads what is on the shelf."""
        self.ready, self.life, self.dies = False, object(), False
        self.missed.clear()
        self.loaded = [each for each in shelf.paths if each not in failed]
        why = dict.fromkeys(failed, "it is damaged")
        return lambda: self.exchange.settle(self, why, self.life)


@pytest.fixture
def shelf(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    found = Shelf(str(tmp_path), "tiny")
    del found.paths["two"]
    return found


def run(shelf, case, workers=2):
    async def whole():
        exchange = Exchange(shelf)
        exchange.replicas = [Worker(exchange, shelf.paths) for _ in range(workers)]
        await case(exchange, *exchange.replicas)
        for each in exchange.replicas:
            assert sorted(each.loaded) == sorted(shelf.paths)
            assert each.ready
            assert not each.tickets

    asyncio.run(whole())


def test_a_worker_that_starts_hears_what_it_has_missed_before_it_serves(shelf):
    async def case(exchange, one, two):
        settle = two.restart(shelf)
        await exchange.load("two")
        await exchange.forget("one")
        assert one.loaded == ["two"]
        assert not two.ready
        await settle()

    run(shelf, case)


def test_a_worker_that_dies_meanwhile_leaves_no_other_behind(shelf):
    async def case(exchange, one, two):
        two.dies = True
        await exchange.load("two")
        await two.restart(shelf)()
        two.dies = True
        await exchange.forget("one")
        with pytest.raises(ConfigError, match="there is no adapter 'one'"):
            await exchange.forget("one")
        await two.restart(shelf)()

    run(shelf, case)


def test_a_worker_that_has_loaded_before_a_change_ends_hears_of_it(shelf):
    async def case(exchange, one, two):
        settle = two.restart(shelf)
        one.pause.clear()
        change = asyncio.create_task(exchange.load("two"))
        await asyncio.sleep(0)
        settled = asyncio.create_task(settle())
        await asyncio.sleep(0.01)
        assert not two.ready
        one.pause.set()
        await asyncio.gather(change, settled)
        assert "two" in two.loaded

    run(shelf, case)


def test_an_old_process_s_news_do_not_open_a_new_one(shelf):
    async def case(exchange, one, two):
        before, life = two.restart(shelf), two.life
        after = two.restart(shelf)
        with pytest.raises(WorkerLostError):
            await exchange.settle(two, {}, life)
        assert not two.ready
        assert before is not after
        await after()

    run(shelf, case)


def test_a_load_and_a_delete_of_one_name_follow_each_other(shelf):
    async def case(exchange, one, two):
        two.pause.clear()
        load = asyncio.create_task(exchange.load("two"))
        await asyncio.sleep(0)
        forget = asyncio.create_task(exchange.forget("two"))
        await asyncio.sleep(0.01)
        assert one.loaded == ["one", "two"]
        two.pause.set()
        await asyncio.gather(load, forget)
        assert one.loaded == ["one"]

    run(shelf, case)


def test_what_one_worker_refuses_nobody_has(shelf):
    async def case(exchange, one, two):
        two.refuses = {"one", "two"}
        with pytest.raises(RefusedError, match=r"^two is refused$"):
            await exchange.load("two")
        assert list(shelf.paths) == ["one"]
        with pytest.raises(RefusedError, match="'one' is forgotten, as its folder no longer"):
            await exchange.load("one")

    run(shelf, case)


def test_what_a_new_worker_cannot_load_leaves_the_shelf_by_name(shelf, caplog):
    async def case(exchange, one, two):
        await exchange.load("two")
        with caplog.at_level(logging.ERROR):
            await two.restart(shelf, failed=["one"])()
        assert one.loaded == ["two"]
        assert "adapter one is no longer served: it is damaged" in caplog.text

    run(shelf, case)


def test_while_no_worker_serves_nothing_is_loaded_and_all_can_be_forgotten(shelf):
    async def case(exchange, one):
        settle = one.restart(shelf)
        with pytest.raises(WorkerLostError, match="no worker serves"):
            await exchange.load("two")
        await exchange.forget("one")
        assert shelf.paths == {}
        await settle()

    run(shelf, case, workers=1)


@pytest.mark.parametrize("name", ["..", ".", "../one", "one/../two", "", "tiny", "a" * 200])
def test_no_name_leads_out_of_the_folder(shelf, name):
    with pytest.raises(ConfigError, match="is no name of an adapter"):
        shelf.path(name)

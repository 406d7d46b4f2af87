"""How ranks come together: who is waited for is said, and who died on the way is named."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from bare_jobs import plan

from drivetrain.communication import meeting, network, process_group, pulse
from drivetrain.communication.meeting import Meeting
from drivetrain.communication.process_group import Ranks
from drivetrain.errors import CommunicationError
from drivetrain.job.job import Job, init_distributed
from drivetrain.testing import RanksFailedError, run_distributed


def is_killed_on_the_way(place: str) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == "1":
        if place == "at the door":
            meeting.PrefixStore.add = die
        else:
            Meeting.join = die
    began = time.monotonic()
    try:
        init_distributed("gloo")
    finally:
        assert time.monotonic() - began < 30


@pytest.mark.parametrize("place", ["at the door", "while it joins"])
def test_a_rank_that_is_killed_before_all_have_joined_is_named(place):
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(is_killed_on_the_way, 3, place)
    for rank in (0, 2):
        assert caught.value.errors[rank].error.startswith(
            "CommunicationError: rank 1 ended (killed, or crashed) before all ranks had joined; "
            f"noticed by rank {rank} of 3 on host "
        )


def comes_late() -> list[str]:
    meeting.PATIENCE_SECONDS, meeting._LOOK_SECONDS = 0.5, 0.1
    said: list[str] = []
    logger = logging.getLogger("drivetrain.meeting")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    if os.environ["RANK"] == "2":
        time.sleep(2)
    init_distributed("gloo")
    logger.removeHandler(handler)
    return said


def test_ranks_that_wait_say_for_whom():
    patient, other, late = run_distributed(comes_late, 3)
    assert late == []
    for rank, words in enumerate((patient, other)):
        first = words[0]
        assert first.startswith(f"rank {rank} of 3 on host ")
        assert "meeting at 127.0.0.1:" in first
        assert first.endswith("for rank 2")


def waits_in_vain() -> str:
    if os.environ["RANK"] == "1":
        return ""
    meeting._LOOK_SECONDS = 0.1
    ranks = Ranks.current()
    with pytest.raises(CommunicationError) as caught:
        process_group.start("gloo", ranks, timeout=timedelta(seconds=1))
    return str(caught.value)


def test_a_rank_that_never_comes_is_named_when_time_is_up():
    first, _ = run_distributed(waits_in_vain, 2)
    assert first.endswith("waited 0:00:01 in vain for rank 1")


# -- whether a process lives -----------------------------------------------------------------------


def test_a_process_seems_to_live_until_it_has_ended():
    gate, key = socket.socketpair()
    child = os.fork()
    if child == 0:
        place = pulse.listen("127.0.0.1")
        key.send(str(place[1]).encode())
        signal.pause()
        os._exit(0)
    own = pulse.listen("127.0.0.1")
    places = {4: ("127.0.0.1", int(gate.recv(16))), 7: own, 9: pulse.NOWHERE}
    assert places[4] != own, "a forked process has a place of its own"
    assert pulse.ended(places, own, 5) == []
    os.kill(child, signal.SIGSTOP)
    assert pulse.ended(places, own, 5) == []
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert pulse.ended(places, own, 5) == [4]
    # For a process on another host the loopback address is somebody else's.
    assert pulse.ended(places, ("192.0.2.9", 5), 5) == []
    gate.close()
    key.close()


# -- the interface -------------------------------------------------------------------------------


def test_the_route_to_this_machine_is_its_loopback_interface():
    route = network.route_to("127.0.0.1")
    assert (route.own, route.other, route.is_loopback) == ("127.0.0.1", "127.0.0.1", True)
    assert route.interface in {name for _, name in socket.if_nameindex()}
    assert network.route_to("no-such-host.invalid") is None
    assert network.is_own("127.0.0.1")
    assert not network.is_own("192.0.2.77")


def reduces_with_a_useless_host_name(interface: str | None) -> tuple[float, str | None]:
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    with Job.open(plan()):
        x = torch.ones(3)
        dist.all_reduce(x)
    return x.sum().item(), os.environ.get("GLOO_SOCKET_IFNAME")


def test_gloo_uses_the_interface_that_leads_to_the_meeting_place():
    loopback = network.interface_of("127.0.0.1")
    assert run_distributed(reduces_with_a_useless_host_name, 2, None) == [(6.0, loopback)] * 2


def test_an_interface_that_the_user_chose_stays():
    with pytest.raises(RanksFailedError, match="no-such-interface"):
        run_distributed(reduces_with_a_useless_host_name, 2, "no-such-interface")

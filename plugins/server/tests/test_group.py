"""The ranks of one worker: whoever ends is named, and nobody else is listened to."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from drivetrain_server.workers.group import Group
from drivetrain_server.workers.wire import Wire
from drivetrain_server.workers.worker import Follower

from drivetrain.errors import DrivetrainError


@pytest.fixture
def group(monkeypatch):
    monkeypatch.setattr(Group, "_place", lambda *_: {})
    return Group({}, 1, lambda _: None)


def test_an_order_that_cannot_be_sent_waits_for_the_word_of_the_watcher(group):
    ours, theirs = socket.socketpair()
    theirs.close()
    heard = []
    watch = threading.Thread(target=lambda: (time.sleep(0.2), heard.append("rank 1 has ended")))
    watch.start()
    group._wires, group._watches = [Wire(ours)], [watch]
    with pytest.raises(DrivetrainError, match="rank 1 takes no orders any more"):
        group.tell([], close=False)
    assert heard == ["rank 1 has ended"]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="asks Linux for sockets")
def test_ranks_meet_where_no_other_host_can_reach_them(group):
    lines = [
        line.split()[1:4:2]  # address, state
        for name in ("tcp", "tcp6")
        if (path := Path("/proc/net") / name).exists()
        for line in path.read_text().splitlines()[1:]
    ]
    port = f":{group._store.port:04X}"
    listening = [address for address, state in lines if state == "0A" and address.endswith(port)]
    assert listening == [f"0100007F{port}"]
    group._store.set("a", "b")
    assert group._store.get("a") == b"b"


def test_a_rank_that_follows_prepares_requests_beside_the_thread_that_computes():
    ours, theirs = socket.socketpair()
    done = []

    class Noting(Follower):
        def _prepared(self, message):
            if message["id"] == 2:
                raise ValueError("no grammar")
            prepared = threading.current_thread()
            return lambda: done.append((prepared, threading.current_thread()))

    engine = SimpleNamespace(tokenizer=None, step=list, close=lambda: None)
    leader, follower = Wire(ours), Noting(Wire(theirs), engine)
    leader.send({"orders": [{"do": "add", "id": 1}], "close": False})
    leader.send({"orders": [{"do": "add", "id": 2}], "close": False})
    leader.send({"orders": [], "close": True})
    with pytest.raises(ValueError, match="no grammar"):
        follower.run()
    ((prepared, carried_out),) = done
    assert carried_out is threading.current_thread()
    assert prepared is not carried_out

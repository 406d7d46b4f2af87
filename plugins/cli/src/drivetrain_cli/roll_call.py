"""Saying for which machines this one waits, while torchrun says nothing."""

from __future__ import annotations

import platform
import socket
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

_PATIENCE_SECONDS = 5.0
"""How long to wait before the first word; then it doubles, up to a minute."""

_LOOK_SECONDS = 0.5


class RollCall(threading.Thread):
    """Meets the other machines' calls in the store through which torchrun meets them.

    Args:
        host: where the store is.
        port: its port.
        job: name of the job.
        machines: how many must come.
        rank: this machine's place; None where machines come in any order.
    """

    def __init__(self, host: str, port: int, job: str, machines: int, rank: int | None) -> None:
        super().__init__(name="roll-call", daemon=True)
        self._host, self._port = host, port
        self._job, self._machines, self._rank = job, machines, rank

    @classmethod
    def start_for(cls, options: Namespace) -> None:
        """Start it for what torchrun was told, unless this machine is the only one."""
        machines = int(str(options.nnodes).partition(":")[0])
        if machines == 1 or options.standalone:
            return
        if options.rdzv_endpoint:
            host, _, port = options.rdzv_endpoint.rpartition(":")
            cls(host.strip("[]"), int(port), options.rdzv_id, machines, None).start()
        else:
            host, port = options.master_addr, options.master_port
            cls(host, int(port), options.rdzv_id, machines, int(options.node_rank)).start()

    def run(self) -> None:
        """Look until all are there, and say from time to time who is not."""
        began, patience = time.monotonic(), _PATIENCE_SECONDS
        for missing in self._missing():
            waited = time.monotonic() - began
            if waited > patience:
                patience = waited + min(waited, 60.0)
                here = "" if self._rank is None else f", machine {self._rank + 1},"
                sys.stderr.write(
                    f"{platform.node()}{here} is waiting for machine {missing} of "
                    f"{self._machines} at {self._host}:{self._port}\n"
                )
                sys.stderr.flush()
            time.sleep(_LOOK_SECONDS)

    def _missing(self) -> Iterator[str]:
        """Which machines are not there, each time anew, until none is missing."""
        while not self._is_open():
            yield "1"
        store = self._connect()
        if self._rank is None:
            store.add("came", 1)
            while (came := store.add("came", 0)) < self._machines:
                yield _listed(range(came, self._machines))
            return
        store.set(f"here/{self._rank}", "")
        while absent := [n for n in range(self._machines) if not store.check([f"here/{n}"])]:
            yield _listed(absent)

    def _is_open(self) -> bool:
        try:
            socket.create_connection((self._host, self._port), _LOOK_SECONDS).close()
        except OSError:
            return False
        return True

    def _connect(self) -> Store:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            self._host,
            self._port,
            None,
            False,
            timedelta(seconds=30),
            wait_for_workers=False,
        )
        return PrefixStore(f"drivetrain/machines/{self._job}", store)


def _listed(places: range | list[int]) -> str:
    return ", ".join(str(place + 1) for place in places)

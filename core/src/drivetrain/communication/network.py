"""Which address and interface of this machine lead to another one."""

from __future__ import annotations

import array
import ipaddress
import socket
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

_SIOCGIFCONF = 0x8912
_ENTRY_BYTES = 40  # of struct ifreq on 64-bit Linux
_MOST_ENTRIES = 512
_IF_INET6 = Path("/proc/net/if_inet6")


@dataclass(frozen=True)
class Route:
    """How this machine reaches another.

    Args:
        own: this machine's address on the way.
        other: the other machine's address, as its name resolves here.
        interface: name of the network interface of ``own``; empty where the system does not say.
    """

    own: str
    other: str
    interface: str

    @property
    def is_loopback(self) -> bool:
        """True if the way does not leave this machine by its address."""
        return is_loopback(self.own)

    def __str__(self) -> str:
        return f"{self.own} on {self.interface}" if self.interface else self.own


def route_to(host: str) -> Route | None:
    """The route that the system takes to ``host``; None if it knows no such name or no way.

    Nothing is sent to the host.
    """
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return None
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                own = _plain(str(probe.getsockname()[0]))
        except OSError:  # no way from here; the name may have another address
            continue
        return Route(own, _plain(str(address[0])), interface_of(own))
    return None


def is_loopback(address: str) -> bool:
    """True for addresses that mean this machine on every machine."""
    return ipaddress.ip_address(address).is_loopback


def is_own(address: str) -> bool:
    """True if ``address`` belongs to an interface of this machine."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def interface_of(address: str) -> str:
    """The name of the interface that has ``address``; empty where the system does not say."""
    if sys.platform != "linux":
        return ""
    return (_interfaces6() if ":" in address else _interfaces4()).get(address, "")


def _interfaces4() -> dict[str, str]:
    """IPv4 address -> interface."""
    import fcntl

    room = array.array("B", bytes(_ENTRY_BYTES * _MOST_ENTRIES))
    start, size = room.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, _SIOCGIFCONF, struct.pack("iL", size, start))
    used = struct.unpack("iL", answer)[0]
    entries = [room.tobytes()[at : at + _ENTRY_BYTES] for at in range(0, used, _ENTRY_BYTES)]
    # A name of 16 bytes (an alias adds ":1" to its interface's), then a socket address.
    return {
        socket.inet_ntoa(entry[20:24]): entry[:16].rstrip(b"\0").decode().partition(":")[0]
        for entry in entries
    }


def _interfaces6() -> dict[str, str]:
    """IPv6 address -> interface."""
    lines = _IF_INET6.read_text().splitlines() if _IF_INET6.exists() else []
    words = [line.split() for line in lines]
    return {str(ipaddress.ip_address(bytes.fromhex(word[0]))): word[5] for word in words}


def _plain(address: str) -> str:
    return address.partition("%")[0]  # a link-local address bears its interface

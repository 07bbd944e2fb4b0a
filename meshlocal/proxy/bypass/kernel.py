"""The part of the bypass that is in the kernel: program.c and its maps, and what of them the proxy writes and reads."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.resources import files
from typing import NamedTuple

from meshlocal.net.bpf import (
    ARRAY,
    HASH,
    INET4_CONNECT,
    INET6_CONNECT,
    SOCK_ADDR,
    Link,
    Map,
    Program,
    netns_cookie,
    with_maps,
)
from meshlocal.policy.model import HostPort

SLOTS = 16
"""Instances that one list has at most; program.c has the same number."""

_REMEMBERED = 8 * SLOTS
"""Instances of one listener whose counts are kept after they left its list."""

LISTENERS = 1024
COUNTERS = 1 << 14
"""Listeners, and counters of all of them, at most."""

_LISTS, _COUNTERS = 0x6D6C6D01, 0x6D6C6D02
"""What program.c calls its maps."""

_KEY = struct.Struct("=Q16sII")
_LIST = struct.Struct("=IIII")
_SLOT = struct.Struct("=16sII")
_PROGRAMS = tuple(
    (name, attach, files(__package__).joinpath(f"{name}.bin").read_bytes())
    for name, attach in (("connect4", INET4_CONNECT), ("connect6", INET6_CONNECT))
)


class Counts(NamedTuple):
    """What happened at one listener.

    Attributes:
        connects: that went to each instance.
        missed: that found nobody listening, and reached the proxy.
    """

    connects: dict[HostPort, int]
    missed: int


class _Listed:
    """A listener that has, or had, a list."""

    def __init__(self, turn: int, missed: int) -> None:
        self.turn = turn
        self.missed = missed
        self.counters: dict[HostPort, int] = {}


class Kernel:
    """The program at one cgroup, and its lists. Each call is a system call or two, and waits for nothing.

    Args:
        cgroup: the folder of a cgroup of version 2.

    Raises:
        OSError: there is no such cgroup, or the kernel refuses; the text says what.
    """

    def __init__(self, cgroup: str) -> None:
        self._listed: dict[HostPort, _Listed] = {}
        self._free: list[int] = list(range(COUNTERS - 1, -1, -1))
        with ExitStack() as opened:
            self._netns = netns_cookie()
            self._lists = opened.enter_context(Map(HASH, _KEY.size, _LIST.size + SLOTS * _SLOT.size, LISTENERS))
            self._counters = opened.enter_context(Map(ARRAY, 4, 8, COUNTERS))
            folder = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.callback(os.close, folder)
            for name, attach, instructions in _PROGRAMS:
                code = with_maps(instructions, {_LISTS: self._lists, _COUNTERS: self._counters})
                program = opened.enter_context(Program(SOCK_ADDR, attach, code, f"ml_{name}", "GPL"))
                opened.enter_context(Link(program, folder, attach))
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Detach it: connects are the proxy's again."""
        self._opened.close()

    def set(self, listener: HostPort, instances: Sequence[HostPort]) -> None:
        """Send connects to a listener to the next of these that listens. What was counted before stays.

        Raises:
            OSError: there is no room in the maps.
            ValueError: there are none, or more than `SLOTS`.
        """
        if not 0 < len(instances) <= SLOTS:
            raise ValueError(f"{len(instances)} instances; a list takes 1 to {SLOTS}")
        listed = self._listed.get(listener)
        if listed is None:
            listed = self._listed[listener] = _Listed(self._counter(), self._counter())
        if len(listed.counters) > _REMEMBERED:
            # A listener whose instances come and go: who is gone for long is forgotten.
            for gone in [place for place in listed.counters if place not in instances]:
                self._give_back(listed.counters.pop(gone))
        for instance in instances:
            if instance not in listed.counters:
                listed.counters[instance] = self._counter()
        slots = b"".join(
            _SLOT.pack(_address(host), socket.htons(port), listed.counters[host, port]) for host, port in instances
        )
        value = _LIST.pack(len(instances), listed.turn, listed.missed, 0) + slots
        self._lists.set(self._key(listener), value.ljust(_LIST.size + SLOTS * _SLOT.size, b"\0"))

    def remove(self, listener: HostPort) -> None:
        """Leave connects to a listener alone. What was counted stays."""
        self._lists.delete(self._key(listener))

    def forget(self, listener: HostPort) -> None:
        """The listener is gone, and what was counted of it."""
        self.remove(listener)
        listed = self._listed.pop(listener, None)
        if listed is not None:
            for number in (listed.turn, listed.missed, *listed.counters.values()):
                self._give_back(number)

    def counts(self, listener: HostPort) -> Counts:
        """What was counted of a listener."""
        listed = self._listed.get(listener)
        if listed is None:
            return Counts({}, 0)
        return Counts(
            {place: self._read(number) for place, number in listed.counters.items()}, self._read(listed.missed)
        )

    def _key(self, listener: HostPort) -> bytes:
        host, port = listener
        return _KEY.pack(self._netns, _address(host), socket.htons(port), 0)

    def _counter(self) -> int:
        if not self._free:
            raise OSError(f"more than {COUNTERS} counters of bypassed connects")
        return self._free.pop()

    def _give_back(self, number: int) -> None:
        self._counters.set(number.to_bytes(4, "little"), bytes(8))
        self._free.append(number)

    def _read(self, number: int) -> int:
        found = self._counters.get(number.to_bytes(4, "little"))
        return int.from_bytes(found or b"", "little")


def _address(host: str) -> bytes:
    """16 bytes of an address, of IPv4 as IPv6 has it (RFC 4291, 2.5.5.2)."""
    parsed = ipaddress.ip_address(host)
    return parsed.packed if parsed.version == 6 else bytes(10) + b"\xff\xff" + parsed.packed

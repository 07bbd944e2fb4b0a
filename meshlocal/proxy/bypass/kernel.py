"""The part of the bypass that is in the kernel: program.c and its maps, and what of them the proxy writes and reads."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import secrets
import socket
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.resources import files
from typing import NamedTuple, TypeAlias

from meshlocal.net.bpf import (
    ARRAY,
    HASH,
    INET4_CONNECT,
    INET6_CONNECT,
    SOCK_ADDR,
    BpfError,
    Link,
    Map,
    Program,
    netns_cookie,
    pinned,
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
_LIST = struct.Struct("=QIIII")
_SLOT = struct.Struct("=16sII")
_VERSION = struct.Struct("=Q")
_VALUE = _LIST.size + SLOTS * _SLOT.size + _VERSION.size
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
        pin: a folder of a BPF file system, in which it stays when this is closed, with its last lists; one that is
            there from before is taken over. None: it goes with this.

    Raises:
        OSError: there is no such cgroup, another process has what is pinned, or the kernel refuses; the text says what.

    Attributes:
        cgroup: its number.
    """

    def __init__(self, cgroup: str, pin: str | None = None) -> None:
        self._listed: dict[HostPort, _Listed] = {}
        self._free: deque[int] = deque(range(COUNTERS))
        with ExitStack() as opened:
            self._netns = netns_cookie()
            if pin is not None:
                opened.callback(os.close, _owned(pin))
            self._lists, self._counters = (opened.enter_context(each) for each in _maps(pin))
            folder = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.callback(os.close, folder)
            # A cgroup's number is that of its folder.
            self.cgroup = os.fstat(folder).st_ino
            self._adopt()
            for name, attach, instructions in _PROGRAMS:
                code = with_maps(instructions, {_LISTS: self._lists, _COUNTERS: self._counters})
                program = opened.enter_context(Program(SOCK_ADDR, attach, code, f"ml_{name}", "GPL"))
                opened.enter_context(_link(program, folder, attach, None if pin is None else f"{pin}/{name}"))
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Let it go: connects are the proxy's again, unless it is pinned."""
        self._opened.close()

    def _adopt(self) -> None:
        """Go on with the lists that are there."""
        taken: set[int] = set()
        for netns, listener, turn, missed, slots in _read_lists(self._lists):
            numbers = dict(slots)
            taken |= {turn, missed, *numbers.values()}
            if netns == self._netns:
                listed = self._listed[listener] = _Listed(turn, missed)
                listed.counters = numbers
        self._free = deque(number for number in self._free if number not in taken)

    def adopted(self) -> dict[HostPort, tuple[HostPort, ...]]:
        """The lists of this network namespace that were there from before."""
        return {listener: tuple(listed.counters) for listener, listed in self._listed.items()}

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
            self._want(2)
            listed = self._listed[listener] = _Listed(self._counter(), self._counter())
        self._want(sum(instance not in listed.counters for instance in instances))
        for instance in instances:
            # Who is in the list stands last: the first are those who left longest ago.
            number = listed.counters.pop(instance, None)
            listed.counters[instance] = self._counter() if number is None else number
        slots = b"".join(
            _SLOT.pack(_address(host), socket.htons(port), listed.counters[host, port]) for host, port in instances
        )
        # Of each list that is ever written: program.c says what it is for.
        version = secrets.randbits(64)
        value = _LIST.pack(version, len(instances), listed.turn, listed.missed, 0) + slots
        self._lists.set(self._key(listener), value.ljust(_VALUE - _VERSION.size, b"\0") + _VERSION.pack(version))
        # Only now, when no list has them any more.
        while len(listed.counters) > _REMEMBERED + len(instances):
            self._give_back(listed.counters.pop(next(iter(listed.counters))))

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

    def _want(self, counters: int) -> None:
        if len(self._free) < counters:
            raise OSError(f"more than {COUNTERS} counters of bypassed connects")

    def _counter(self) -> int:
        # Those given back come last: somebody may be counting still.
        return self._free.popleft()

    def _give_back(self, number: int) -> None:
        self._counters.set(number.to_bytes(4, "little"), bytes(8))
        self._free.append(number)

    def _read(self, number: int) -> int:
        found = self._counters.get(number.to_bytes(4, "little"))
        return int.from_bytes(found or b"", "little")


_FORMAT = 1
"""Of the maps' entries: those of another one are not taken over."""


def _owned(pin: str) -> int:
    """Make the folder that things are pinned to, and have it alone; the descriptor that says so."""
    os.makedirs(pin, 0o700, exist_ok=True)
    folder = os.open(pin, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(folder)
        raise OSError(f"another proxy has {pin}") from None
    return folder


def _maps(pin: str | None) -> Iterator[Map]:
    """The lists and the counters: those that are pinned, or new ones, which then are."""
    for name, kind, key, value, entries in _MAPS:
        path = None if pin is None else f"{pin}/{name}-{_FORMAT}"
        if path is not None and os.path.exists(path):
            yield Map(kind, key, value, entries, pinned(path))
            continue
        made = Map(kind, key, value, entries)
        if path is not None:
            try:
                made.pin(path)
            except BaseException:
                made.close()
                raise
        yield made


_MAPS = (
    ("lists", HASH, _KEY.size, _VALUE, LISTENERS),
    ("counters", ARRAY, 4, 8, COUNTERS),
)


def _link(program: Program, cgroup: int, attach: int, pin: str | None) -> Link:
    """The program at the cgroup: in the place of the one that is pinned, if one is."""
    if pin is not None and os.path.exists(pin):
        link = Link(pinned(pin))
        try:
            if link.cgroup() == os.fstat(cgroup).st_ino:
                link.update(program)
                return link
            link.detach()
        except BpfError:
            # The cgroup that it was at is gone, and it with it.
            pass
        link.close()
        os.unlink(pin)
    link = Link.to(program, cgroup, attach)
    if pin is not None:
        try:
            link.pin(pin)
        except BaseException:
            link.close()
            raise
    return link


_Slots: TypeAlias = "list[tuple[HostPort, int]]"


def _read_lists(lists: Map) -> Iterator[tuple[int, HostPort, int, int, _Slots]]:
    """Network namespace, listener, the counters of turns and of what was missed, and instances with their counters."""
    for key in lists.keys():  # noqa: SIM118 - it is no mapping
        value = lists.get(key)
        if value is None:
            continue
        netns, address, port, _ = _KEY.unpack(key)
        _, length, turn, missed, _ = _LIST.unpack_from(value)
        slots = []
        for position in range(min(length, SLOTS)):
            host, instance_port, number = _SLOT.unpack_from(value, _LIST.size + position * _SLOT.size)
            slots.append(((_host(host), socket.ntohs(instance_port)), number))
        yield netns, (_host(address), socket.ntohs(port)), turn, missed, slots


class Pinned(NamedTuple):
    """A list that is pinned.

    Attributes:
        here: it is of this network namespace.
        listener: whose it is.
        counts: of its instances, and of what found none.
    """

    here: bool
    listener: HostPort
    counts: Counts


def read_pinned(pin: str) -> list[Pinned]:
    """What is pinned in a folder.

    Raises:
        OSError: nothing is, or it may not be read.
    """
    with ExitStack() as opened:
        lists, counters = (
            opened.enter_context(Map(kind, key, value, entries, pinned(f"{pin}/{name}-{_FORMAT}")))
            for name, kind, key, value, entries in _MAPS
        )

        def read(number: int) -> int:
            return int.from_bytes(counters.get(number.to_bytes(4, "little")) or b"", "little")

        netns = netns_cookie()
        return [
            Pinned(where == netns, listener, Counts({place: read(number) for place, number in slots}, read(missed)))
            for where, listener, _, missed, slots in _read_lists(lists)
        ]


def detach_pinned(pin: str) -> None:
    """Take away what is pinned in a folder, and the folder. Whoever runs with it is left without a bypass.

    Raises:
        OSError: it is not there, or may not be taken away.
    """
    links = [path for name, _, _ in _PROGRAMS if os.path.exists(path := f"{pin}/{name}")]
    maps = [path for name, *_ in _MAPS if os.path.exists(path := f"{pin}/{name}-{_FORMAT}")]
    if not links and not maps:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), pin)
    for path in links:
        with Link(pinned(path)) as link:
            link.detach()
    for path in (*links, *maps):
        os.unlink(path)
    os.rmdir(pin)


def _host(packed: bytes) -> str:
    address = ipaddress.IPv6Address(packed)
    return str(address.ipv4_mapped or address)


def _address(host: str) -> bytes:
    """16 bytes of an address, of IPv4 as IPv6 has it (RFC 4291, 2.5.5.2)."""
    parsed = ipaddress.ip_address(host)
    return parsed.packed if parsed.version == 6 else bytes(10) + b"\xff\xff" + parsed.packed

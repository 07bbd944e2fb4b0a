"""Connecting to one instance, and knowing which instances this host can connect to at all."""

from __future__ import annotations

import errno
import fcntl
import functools
import ipaddress
import os
import socket
import struct
from pathlib import Path
from typing import Generic, TypeVar

import trio

from meshlocal.policy.families import Families

_REASONS = {
    errno.ECONNREFUSED: "refused",
    errno.ENETUNREACH: "unreachable",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETDOWN: "unreachable",
    errno.EHOSTDOWN: "unreachable",
    errno.ENONET: "unreachable",
    errno.ECONNRESET: "reset",
    errno.ECONNABORTED: "reset",
    errno.EPIPE: "reset",
    errno.ETIMEDOUT: "timeout",
    errno.EMFILE: "no_descriptors",
    errno.ENFILE: "no_descriptors",
    errno.EADDRNOTAVAIL: "no_ports",
    errno.ENOBUFS: "no_memory",
    errno.ENOMEM: "no_memory",
}

_NON_BLOCKING_STREAM = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
_SIOCGIFADDR = 0x8915  # netdevice(7)
_LINK_SCOPE = 0x20  # IPV6_ADDR_LINKLOCAL in the kernel's net/ipv6.h, as /proc/net/if_inet6 shows it
_DAD_FAILED = 0x08  # IFA_F_DADFAILED in linux/if_addr.h: another host has the address


def is_own_address(address: str) -> bool:
    """Whether what is sent to an address stays on this host, as the kernel routes it now.

    What goes to an address of its own, it sends from that very address (ip-route(8), table local; RFC 1122, 3.2.1.3),
    and to all of 127.0.0.0/8 from within it. A connect of a datagram socket asks for the route, and sends nothing. What
    this host's own NAT rules make of a connection afterwards does not show.
    """
    family, sockaddr = _sockaddr(address, 9)
    try:
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as asking:
            asking.connect(sockaddr)
            here, there = (ipaddress.ip_address(end[0].partition("%")[0]) for end in (asking.getsockname(), sockaddr))
    except (OSError, ValueError):
        return False
    return here == there or (here.is_loopback and there.is_loopback)


S = TypeVar("S")


class Connecting(Generic[S]):
    """A connect(2) that has begun. Its socket belongs to the caller, who closes it whatever comes of it.

    Args:
        address: an IP address.
        port: of it.
        path: a Unix socket's, in place of both. Such a connect is made at once or fails, also where the queue of those
            that wait to be accepted is full (EAGAIN).

    Attributes:
        socket: the socket.
        pending: it is to be waited for.
        security: for the caller: what is to be spoken over it once it is made; None: nothing but what is said.

    Between `__init__` and `finish` a caller may wait for the socket to become writable as often as it likes, give up
    and wait again: that is what lets a proxy look after its client only when an instance is slow to answer.

    Raises:
        OSError: the connect failed at once; the socket is closed.
    """

    __slots__ = ("_port", "pending", "security", "socket")

    def __init__(self, address: str, port: int, path: str = "") -> None:
        sockaddr: tuple[str, int] | tuple[str, int, int, int] | bytes
        # Encoded here: Python would go by the locale.
        family, sockaddr = (socket.AF_UNIX, path.encode()) if path else _sockaddr(address, port)
        self._port = port if not path else 0
        self.socket = socket.socket(family, _NON_BLOCKING_STREAM)
        self.pending = False
        self.security: S | None = None
        try:
            if not path:
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            number = self.socket.connect_ex(sockaddr)
            if number == errno.EINPROGRESS:
                # A peer on the same host has answered by now, a refusal included: asking again spares a trip
                # through the event loop, which costs as much as the rest.
                number = self.socket.connect_ex(sockaddr)
                if number in (errno.EALREADY, errno.EINPROGRESS):
                    self.pending = True
                    number = 0
            if number:
                raise OSError(number, os.strerror(number))
        except BaseException:
            self.socket.close()
            raise

    def finish(self) -> None:
        """Tell how it ended, once the socket is writable or was never `pending`.

        Raises:
            OSError: no connection; `classify_connect_error` says why in a word.
        """
        number = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if self.pending else 0
        if number == 0 and self._port >= _first_local_port():
            own = self.socket.getsockname()
            if own[1] == self._port and own[:2] == self.socket.getpeername()[:2]:
                # The kernel happened to choose the port dialled as our own, and TCP connected the socket to itself
                # (simultaneous open, RFC 9293, 3.5). Nobody listens there, and an open socket would keep the port
                # from an instance that wants to come back.
                number = errno.ECONNREFUSED
        if number:
            raise OSError(number, os.strerror(number))


def connect_socket(path: str | None) -> Connecting[S] | None:
    """Connect to a Unix socket, if there is a path, and somebody can be connected there now; None: there is nobody."""
    if path is None:
        return None
    try:
        return Connecting("", 0, path)
    except OSError:
        return None


async def dial(address: str, port: int, path: str | None = None) -> socket.socket:
    """Connect to a Unix socket if there is one, else to an IP address, without a resolver.

    The caller's cancel scope is the deadline.

    Returns:
        A connected, non-blocking socket, with TCP_NODELAY if it has that; the caller closes it.

    Raises:
        OSError: no connection; `classify_connect_error` says why in a word. The socket is closed then, as it is on
            cancellation.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    connecting: Connecting[object] = connect_socket(path) or Connecting(address, port)
    try:
        if connecting.pending:
            await trio.lowlevel.wait_writable(connecting.socket)
        connecting.finish()
    except BaseException:
        connecting.socket.close()
        raise
    return connecting.socket


def classify_connect_error(error: OSError) -> str:
    """Why a connect failed: refused, unreachable, reset, timeout, no_descriptors, no_ports, no_memory or other."""
    return _REASONS.get(error.errno or 0, "other")


def usable_families(proc: Path = Path("/proc")) -> Families:
    """What this host can reach now, by its interfaces' addresses. Sends nothing; never fails.

    A family is usable if an interface other than the loopback has an address of it that is not link-local. What
    cannot be found out counts as usable: an attempt that fails costs less than an instance left out.
    """
    return Families(ipv4=_has_ipv4(), ipv6=_has_ipv6(proc))


@functools.cache
def _first_local_port() -> int:
    """The least port that the kernel chooses by itself, which only root changes (ip(7), ip_local_port_range)."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 1


def _sockaddr(address: str, port: int) -> tuple[int, tuple[str, int] | tuple[str, int, int, int]]:
    """Family and address for connect(2); anything but a numeric address would be looked up there, blocking all."""
    family = _family(address)
    if family == socket.AF_INET:
        return family, (address, port)
    host, _, zone = address.partition("%")
    # Each time anew: an interface that comes back may have another number.
    scope = (int(zone) if zone.isdecimal() else socket.if_nametoindex(zone)) if zone else 0
    return family, (host, port, 0, scope)


@functools.lru_cache(maxsize=1024)
def _family(address: str) -> int:
    try:
        if ":" not in address:
            socket.inet_pton(socket.AF_INET, address)
            return socket.AF_INET
        socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
    except (OSError, ValueError):
        raise OSError(errno.EINVAL, f"{address!r} is no IP address") from None
    return socket.AF_INET6


def _has_ipv4() -> bool:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            return any(_is_routable(probe, name) for _, name in socket.if_nameindex())
    except OSError as error:
        return error.errno != errno.EAFNOSUPPORT


def _is_routable(probe: socket.socket, interface: str) -> bool:
    request = struct.pack("16s24x", interface.encode()[:15])
    try:
        answer = fcntl.ioctl(probe, _SIOCGIFADDR, request)
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
            return False
        raise
    address = ipaddress.IPv4Address(answer[20:24])
    return not (address.is_loopback or address.is_link_local)


def _has_ipv6(proc: Path) -> bool:
    try:
        table = (proc / "net/if_inet6").read_text()
    except OSError:
        # A kernel without IPv6 has no such file, but the others beside it.
        return not (proc / "net/dev").exists()
    return any(_is_routable_ipv6(line.split()) for line in table.splitlines())


def _is_routable_ipv6(row: list[str]) -> bool:
    """Whether a row of /proc/net/if_inet6 counts: address, interface index, prefix length, scope, flags, name."""
    if len(row) != 6:
        return False
    try:
        address, scope, flags = ipaddress.IPv6Address(bytes.fromhex(row[0])), int(row[3], 16), int(row[4], 16)
    except ValueError:
        return False
    return row[5] != "lo" and not address.is_loopback and scope != _LINK_SCOPE and not flags & _DAD_FAILED

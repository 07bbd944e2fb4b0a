"""What the kernel knows of a listening socket: how many connections wait to be accepted (sock_diag(7))."""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import NamedTuple

from meshlocal.net.netlink import Netlink

_NETLINK_SOCK_DIAG = 4
_BY_FAMILY = 20
_LISTEN = 10
_NO_COOKIE = 0xFFFFFFFF

# struct inet_diag_req_v2 with its inet_diag_sockid: ports and addresses in the order of the network.
_QUESTION = struct.Struct("=BBBxI 2s2s16s16sIII")
# struct inet_diag_msg, as far as the lengths of the queues.
_ANSWER = struct.Struct("=BBBB48xIII")


class AcceptQueue(NamedTuple):
    """The connections that wait at a listening socket.

    Attributes:
        waiting: how many.
        most: how many may; one more finds no room.
    """

    waiting: int
    most: int


class SocketDiagnosis(Netlink):
    """Asks the kernel about sockets.

    Raises:
        OSError: there is no such interface.
    """

    def __init__(self) -> None:
        super().__init__(_NETLINK_SOCK_DIAG)

    def accept_queue(self, host: str, port: int) -> AcceptQueue | None:
        """The queue of the socket that a connect to an address would reach; None: none listens, or it is not told."""
        address = ipaddress.ip_address(host)
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        place = (port.to_bytes(2, "big"), bytes(2), address.packed.ljust(16, b"\0"), bytes(16))
        question = _QUESTION.pack(family, socket.IPPROTO_TCP, 0, 1 << _LISTEN, *place, 0, _NO_COOKIE, _NO_COOKIE)
        answer = self.ask(_BY_FAMILY, question, _BY_FAMILY)
        if answer is None or len(answer) < _ANSWER.size:
            return None
        _, state, _, _, _, waiting, most = _ANSWER.unpack_from(answer)
        return AcceptQueue(waiting, most) if state == _LISTEN else None

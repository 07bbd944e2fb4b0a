"""Whether an address is one of this network namespace's own, as its local routes have it (rtnetlink(7))."""

from __future__ import annotations

import ipaddress
import socket
import struct

from meshlocal.net.netlink import Netlink

_NETLINK_ROUTE = 0
_NEW_ROUTE, _GET_ROUTE = 24, 26
_DESTINATION = 1
_LOCAL = 2

# struct rtmsg; the kind of route is its eighth byte.
_ROUTE = struct.Struct("=BBBBBBBBI")
_ATTRIBUTE = struct.Struct("=HH")


class Routes(Netlink):
    """Asks the kernel where addresses lead.

    Raises:
        OSError: there is no such interface.
    """

    def __init__(self) -> None:
        super().__init__(_NETLINK_ROUTE)

    def is_own(self, host: str) -> bool:
        """Whether packets to an address stay on this host, because the address is its own.

        That a socket can be bound there says less: with ip_nonlocal_bind it can be bound anywhere.
        """
        address = ipaddress.ip_address(host)
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        packed = address.packed
        body = _ROUTE.pack(family, len(packed) * 8, 0, 0, 0, 0, 0, 0, 0)
        body += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(packed), _DESTINATION) + packed
        answer = self.ask(_GET_ROUTE, body, _NEW_ROUTE)
        return answer is not None and len(answer) >= _ROUTE.size and answer[7] == _LOCAL

"""Whether an address is one of this network namespace's own, as its local routes have it (rtnetlink(7))."""

from __future__ import annotations

import ipaddress
import socket
import struct

_NETLINK_ROUTE = 0
_GET_ROUTE = 26
_NEW_ROUTE = 24
_REQUEST = 1
_DESTINATION = 1
_LOCAL = 2

_HEADER = struct.Struct("=IHHII")
_ROUTE = struct.Struct("=BBBBBBBBI")
_ATTRIBUTE = struct.Struct("=HH")


class Routes:
    """Asks the kernel where addresses lead; any user may.

    Raises:
        OSError: there is no such interface.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE)
        self._socket.setblocking(False)

    def close(self) -> None:
        """Ask no more."""
        self._socket.close()

    def is_own(self, host: str) -> bool:
        """Whether packets to an address stay on this host, because the address is its own.

        That a socket can be bound there says less: with ip_nonlocal_bind it can be bound anywhere.
        """
        address = ipaddress.ip_address(host)
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        packed = address.packed
        body = _ROUTE.pack(family, len(packed) * 8, 0, 0, 0, 0, 0, 0, 0)
        body += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(packed), _DESTINATION) + packed
        try:
            self._socket.send(_HEADER.pack(_HEADER.size + len(body), _GET_ROUTE, _REQUEST, 0, 0) + body)
            # The kernel has answered by the time that it took the question.
            answer = self._socket.recv(4096)
        except OSError:
            return False
        if len(answer) < _HEADER.size + _ROUTE.size or _HEADER.unpack_from(answer)[1] != _NEW_ROUTE:
            return False
        kind: int = _ROUTE.unpack_from(answer, _HEADER.size)[7]
        return kind == _LOCAL

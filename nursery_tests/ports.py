"""Ports that are still free when a test comes to use them."""

import itertools
import os
import socket
from contextlib import ExitStack

# Below those that the system hands out (ip(7), ip_local_port_range: 32768 and up): a connection of anybody's could have
# one of these by the time that a test listens on it. Test runs beside each other begin at different places.
_PORTS = range(21000, 32000)
_numbers = itertools.count(os.getpid() * 37)


def free_port(*hosts: str) -> int:
    """A port that nobody listens on, on any of the hosts (127.0.0.1 if none is named); each call gives another."""
    for number in itertools.islice(_numbers, len(_PORTS)):
        port = _PORTS[number % len(_PORTS)]
        with ExitStack() as stack:
            try:
                for host in hosts or ("127.0.0.1",):
                    family = socket.AF_INET6 if ":" in host else socket.AF_INET
                    stack.enter_context(socket.create_server((host, port), family=family))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")

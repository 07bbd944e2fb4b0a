"""What `explain` says of Unix sockets: what is connected to where, and why not."""

from __future__ import annotations

from typing import Any

from meshlocal.app.explaining import socket_lines, sockets_in_steps
from meshlocal.policy.locality import Locality, Selector
from meshlocal.policy.model import Instance, ServiceKey, ServiceSnapshot, index, make_instance
from meshlocal.policy.picker import Picker
from meshlocal.policy.steps import finish
from meshlocal.policy.unix_sockets import UnixSockets


class Skipping:
    """TLS to all instances but those at one port."""

    def skips(self, instance: Instance, tier: int | None) -> bool:
        return instance.key.port == 9

    def port(self, instance: Instance) -> int:
        return 8443


def told(sockets: UnixSockets | None, security: Any = None) -> list[str]:
    labels = (
        ("n1", "a.sock", 1),
        ("n1", "../b.sock", 2),
        ("n1", "", 3),
        ("n2", "c.sock", 4),
        ("n1", "d.sock", 9),
    )
    instances = [make_instance("10.0.0.1", port, labels={"node": node, "socket": name}) for node, name, port in labels]
    snapshot = ServiceSnapshot(ServiceKey("b"), "1", index(instances))
    picker = Picker.build(Selector(Locality({"node": "n1"}), None), snapshot)
    return socket_lines(finish(sockets_in_steps(picker, sockets, security)))


def test_where_instances_are_connected() -> None:
    """Of this node's, those that name a socket; an empty label is none."""
    assert told(UnixSockets("/run/s", "n1")) == [
        "by socket: 10.0.0.1:1 at /run/s/a.sock, where it can be connected",
        "not by socket: 10.0.0.1:2, its label socket: '../b.sock' is no path within /run/s",
        "by socket: 10.0.0.1:9 at /run/s/d.sock, where it can be connected",
    ]
    assert told(None) == []


def test_what_is_spoken_to_in_tls_is_connected_at_its_port() -> None:
    assert told(UnixSockets("/run/s", "n1"), Skipping()) == [
        "not by socket: 10.0.0.1:1, its label socket: the proxy speaks TLS to it, at its port",
        "not by socket: 10.0.0.1:2, its label socket: the proxy speaks TLS to it, at its port",
        "by socket: 10.0.0.1:9 at /run/s/d.sock, where it can be connected",
    ]

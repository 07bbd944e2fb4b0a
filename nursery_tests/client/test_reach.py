"""By which way an instance is connected to: its Unix socket, its port, or the one where it speaks TLS."""

from __future__ import annotations

import socket
from pathlib import Path
from random import Random

import pytest

from meshlocal.client.connecting import Dialled, begin_dial
from meshlocal.client.security import Reach, reach
from meshlocal.client.services import ServiceState
from meshlocal.net.pipe import Pipe
from meshlocal.policy.config import AttemptPolicy
from meshlocal.policy.locality import Locality, Selector
from meshlocal.policy.model import Instance, ServiceKey, make_instance
from meshlocal.policy.picker import Pick
from meshlocal.policy.unix_sockets import UnixSockets

SOCKETS = UnixSockets("/run/s", "n1")


class Tls:
    """TLS at port 8443, but in plaintext in some tiers."""

    def __init__(self, *skipped: int) -> None:
        self._skipped = skipped

    def skips(self, instance: Instance, tier: int) -> bool:
        return tier in self._skipped

    def port(self, instance: Instance) -> int:
        return 8443

    async def secure(self, sock: socket.socket, pick: Pick, protocol: str | None) -> Pipe:
        raise NotImplementedError


ALL, FAR = Tls(), Tls(0)


@pytest.mark.parametrize(
    ("security", "sockets", "tier", "expected"),
    [
        (None, None, 0, Reach(80, None, None)),
        (None, SOCKETS, 0, Reach(80, "/run/s/b.sock", None)),
        (ALL, None, 0, Reach(8443, None, ALL)),
        (ALL, SOCKETS, 0, Reach(8443, None, ALL)),
        (FAR, SOCKETS, 0, Reach(80, "/run/s/b.sock", None)),
        (FAR, SOCKETS, 1, Reach(8443, None, FAR)),
        (FAR, None, 0, Reach(80, None, None)),
    ],
)
def test_how_an_instance_is_reached(
    security: Tls | None, sockets: UnixSockets | None, tier: int, expected: Reach
) -> None:
    """What is spoken to in plaintext has its socket, also where `tls.skip_tiers` says so; TLS has its port."""
    instance = make_instance("10.0.0.1", 80, labels={"node": "n1", "socket": "b.sock"})
    assert reach(instance, tier, security, sockets) == expected


def test_an_instance_that_tls_skips_is_connected_by_its_socket(tmp_path: Path) -> None:
    instance = make_instance("127.0.0.1", 1, labels={"node": "n1", "socket": "b.sock"})
    state = ServiceState(ServiceKey("b"), Selector(Locality({"node": "n1"}), None), AttemptPolicy(), Random(1))
    state.sockets = UnixSockets(str(tmp_path), "n1")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "b.sock"))
        listener.listen()
        dialled = begin_dial(state, Pick(instance, 0, None), FAR)
        assert isinstance(dialled, Dialled)
        assert dialled.upstream is not None
        assert (dialled.by_socket, state.statistics.tls_skipped) == (True, 1)
        dialled.upstream.plain.close()  # type: ignore[union-attr]  # it has one

"""policy/families: instances of a family that this host cannot reach are left out (L4)."""

from __future__ import annotations

import pytest

from meshlocal.policy.families import Families
from meshlocal.policy.model import make_instance

IPV4, LOOPBACK, IPV6 = ["10.0.0.1"], ["127.0.0.1", "127.9.8.7", "::1", "0:0:0:0:0:0:0:1"], ["fd00::1"]


@pytest.mark.parametrize(
    ("families", "reached"),
    [
        (Families(), IPV4 + LOOPBACK + IPV6),
        (Families(ipv4=True, ipv6=False), IPV4 + LOOPBACK),
        (Families(ipv4=False, ipv6=True), LOOPBACK + IPV6),
        (Families(ipv4=False, ipv6=False), LOOPBACK),
    ],
)
def test_what_each_host_reaches(families: Families, reached: list[str]) -> None:
    addresses = IPV4 + LOOPBACK + IPV6
    assert [address for address in addresses if families.reaches(make_instance(address, 80))] == reached

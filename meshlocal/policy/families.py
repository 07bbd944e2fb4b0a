"""Which address families a host can reach (behaviour rule L4)."""

from __future__ import annotations

from typing import NamedTuple

from meshlocal.policy.model import Instance

_LOOPBACK_V4 = "127."
_LOOPBACK_V6 = "::1"


class Families(NamedTuple):
    """The families that a host can reach, beside its own loopback addresses, which it always can.

    Attributes:
        ipv4: an interface other than loopback has an IPv4 address.
        ipv6: an interface other than loopback has an IPv6 address that is not link-local.
    """

    ipv4: bool = True
    ipv6: bool = True

    def reaches(self, instance: Instance) -> bool:
        """Whether the instance's address can be reached from this host."""
        address = instance.key.address
        if ":" in address:
            return self.ipv6 or address == _LOOPBACK_V6
        return self.ipv4 or address.startswith(_LOOPBACK_V4)

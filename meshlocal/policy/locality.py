"""Which instances a proxy may use, and how near each is (behaviour rules L1 to L6)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import msgspec

from meshlocal.policy.families import Families
from meshlocal.policy.model import NODE, Instance, known

OTHER = "other"
"""The last tier's name: instances that share no preferred label with the proxy."""


class LeftOut(StrEnum):
    """Why an instance is in no tier (L4, L6)."""

    PROTOCOL = "protocol"
    PORT_NAME = "port_name"
    FAMILY = "address_family"
    NOT_READY = "not_ready"
    NOT_SERVING = "terminating_and_not_serving"
    OUTSIDE = "outside"


class Locality(msgspec.Struct, frozen=True):
    """Where a proxy stands, and what it counts as near.

    Attributes:
        labels: the proxy's own labels, `node` among them where it is known (L1).
        prefer: label keys, nearest tier first (L3).
        within: a label key that an instance must share with the proxy to be used at all (L6).
        families: the address families that this host can reach (L4).
    """

    labels: Mapping[str, str]
    prefer: tuple[str, ...] = (NODE,)
    within: str | None = None
    families: Families = Families()

    @property
    def node(self) -> str:
        """The proxy's own node; empty if unknown (L1)."""
        return self.own(NODE)

    def own(self, key: str) -> str:
        """The proxy's own value of a label; empty if unknown."""
        return known(self.labels.get(key))

    @property
    def unknown(self) -> tuple[str, ...]:
        """The labels whose own value a proxy should know and does not: `node`, and those it prefers (L1, L5)."""
        return tuple(key for key in dict.fromkeys((NODE, *self.prefer)) if not self.own(key))

    @property
    def tiers(self) -> tuple[str, ...]:
        """The names of the tiers, nearest first."""
        return (*self.prefer, OTHER)


class Selector:
    """The pure function from an instance to its tier, for one service as seen from one place.

    Args:
        locality: where the proxy stands.
        port_name: only instances whose port has this name; None for any.
        protocol: only instances of this transport protocol.
    """

    __slots__ = ("_families", "_own", "_port_name", "_protocol", "_within", "locality", "tiers")

    def __init__(self, locality: Locality, port_name: str | None = None, protocol: str = "tcp") -> None:
        self.locality = locality
        self.tiers = locality.tiers
        self._own = tuple((key, locality.own(key)) for key in locality.prefer)
        self._within = None if locality.within is None else (locality.within, locality.own(locality.within))
        self._families = locality.families
        self._port_name = port_name
        self._protocol = protocol

    def left_out(self, instance: Instance) -> LeftOut | None:
        """Why the instance must not be used; None if it may be."""
        key = instance.key
        if key.protocol != self._protocol:
            return LeftOut.PROTOCOL
        if self._port_name is not None and key.port_name != self._port_name:
            return LeftOut.PORT_NAME
        if not self._families.reaches(instance):
            return LeftOut.FAMILY
        conditions = instance.conditions
        if conditions.terminating:
            if not conditions.serving:
                return LeftOut.NOT_SERVING
        elif not conditions.ready:
            return LeftOut.NOT_READY
        if self._within is not None:
            label, own = self._within
            if not own or known(instance.labels.get(label)) != own:
                return LeftOut.OUTSIDE
        return None

    def tier(self, instance: Instance) -> int:
        """The index of the first preferred label that the instance shares with the proxy, else of `other` (L2, L3)."""
        labels = instance.labels
        for position, (key, own) in enumerate(self._own):
            if own and known(labels.get(key)) == own:
                return position
        return len(self._own)

"""Which connects to a tcp listener may go straight to an instance, past the proxy (behaviour rule B1). Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection
from enum import StrEnum
from typing import NamedTuple

from meshlocal.policy.health import Health
from meshlocal.policy.model import HostPort
from meshlocal.policy.picker import Picker

LATER = 10.0
"""Seconds after which something that nobody tells of is looked at again."""

_LOOKED_AT = 8
"""Times what a list takes, beyond which instances are not looked at one by one."""


class NoBypass(StrEnum):
    """Why connects to a listener reach the proxy."""

    KIND = "listener_kind"
    ADDRESS = "listener_address"
    TLS = "tls"
    SPILL = "spill"
    LIMITS = "limits"
    NO_SNAPSHOT = "no_snapshot"
    NO_LOCAL = "no_local"
    ELSEWHERE = "elsewhere"
    FAMILY = "address_family"
    MANY = "many"
    UNFIT = "unfit"
    CROWDED = "crowded"
    TRIAL = "trial"
    DRAINING = "draining"
    KERNEL = "kernel"


WHY_NOT = {
    NoBypass.KIND: "only tcp listeners are bypassed",
    NoBypass.ADDRESS: "the listener is at every address, or at one of a link; name the one that callers connect to",
    NoBypass.TLS: "the proxy speaks TLS to its instances",
    NoBypass.SPILL: "spill counts what is under way, which the proxy would not see",
    NoBypass.LIMITS: "limits count what is under way, which the proxy would not see",
    NoBypass.NO_SNAPSHOT: "nothing was heard of the service yet",
    NoBypass.NO_LOCAL: "the first tier has no instance",
    NoBypass.ELSEWHERE: "an instance of the first tier is not in the proxy's network namespace",
    NoBypass.FAMILY: "an instance of the first tier is of another address family than the listener",
    NoBypass.MANY: "the first tier has more instances than a list takes",
    NoBypass.UNFIT: "every instance of the first tier is ejected, or fails its checks",
    NoBypass.CROWDED: "the accept queue of every instance of the first tier is full",
    NoBypass.TRIAL: "an instance that was ejected is due for its trial, which a request through the proxy makes",
    NoBypass.DRAINING: "the proxy drains",
    NoBypass.KERNEL: "the kernel does not take it; see the log",
}
"""The reasons in words, for people."""


class Decision(NamedTuple):
    """What connects to a listener do.

    Attributes:
        instances: those that they go to in turn; none: they reach the proxy.
        why_not: why they do.
        again: seconds after which time alone may change it; None: it does not.
    """

    instances: tuple[HostPort, ...]
    why_not: NoBypass | None = None
    again: float | None = None


def decide(
    picker: Picker | None,
    health: Health,
    now: float,
    listener: HostPort,
    is_own: Callable[[str], bool],
    most: int,
    crowded: Collection[HostPort] = (),
) -> Decision:
    """Where connects to a listener go (B1).

    They are rewritten to the first tier's instances that are admitted, if each of these is an address of this host's
    own; else the rotation over them would not be even (O2). One that is ejected is left out, until it is due for its
    trial (H1): then requests come to the proxy, as one of them is the trial.

    Args:
        picker: of its service; None before the first snapshot.
        health: of the service's instances.
        now: the time, on the clock of `health`.
        listener: its address and port.
        is_own: whether an address is one of this network namespace.
        most: instances that a list takes.
        crowded: instances whose accept queues are full: a connect would wait there for seconds.
    """
    if picker is None:
        return Decision((), NoBypass.NO_SNAPSHOT)
    first = picker.first_tier()
    if len(first) > _LOOKED_AT * most:
        return Decision((), NoBypass.MANY)
    places = tuple(dict.fromkeys(instance.key[:2] for instance in first))
    if not places:
        return Decision((), NoBypass.NO_LOCAL)
    admitted = tuple(place for place in places if health.is_admitted(place))
    waits = [left for place in places if (left := health.standing(place, now).left) is not None]
    if any(health.is_due(place, now) for place in places):
        return Decision((), NoBypass.TRIAL)
    again = min(waits, default=None)
    if not admitted:
        return Decision((), NoBypass.UNFIT, again)
    if len(admitted) > most:
        return Decision((), NoBypass.MANY, again)
    if any((":" in host) != (":" in listener[0]) for host, _ in admitted):
        return Decision((), NoBypass.FAMILY, again)
    if not all(is_own(host) for host, _ in admitted):
        # Addresses come and go, and nobody tells.
        return Decision((), NoBypass.ELSEWHERE, min(again, LATER) if again is not None else LATER)
    roomy = tuple(place for place in admitted if place not in crowded)
    return Decision(roomy, None if roomy else NoBypass.CROWDED, again)


def is_crowded(waiting: int, most: int, before: bool) -> bool:
    """Whether an instance's accept queue is full, or has been and is not half empty yet.

    Args:
        waiting: connections in it.
        most: for which there is room.
        before: it was crowded when it was looked at last.
    """
    return waiting > most // 2 if before else waiting >= max(most, 1)

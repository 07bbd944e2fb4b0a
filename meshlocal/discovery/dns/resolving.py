"""What DNS says of a name: its records, that there are none, or that nobody could say (RFC 1034, RFC 2308).

dnspython asks. What it would import as it reads an answer is imported here: an import reads files, which the event loop
may not (P1).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple

import dns.asyncresolver
import dns.exception
import dns.message
import dns.rdatatype
import dns.resolver
import trio

from meshlocal.net.blocking import Blocking

for _name in (
    "dns._trio_backend",
    "dns.rdtypes.ANY.CNAME",
    "dns.rdtypes.ANY.NS",
    "dns.rdtypes.ANY.OPT",
    "dns.rdtypes.ANY.SOA",
    "dns.rdtypes.IN.A",
    "dns.rdtypes.IN.AAAA",
    "dns.rdtypes.IN.SRV",
):
    importlib.import_module(_name)

LIFETIME = 5.0
"""Seconds for one question, all servers tried."""

NEGATIVE_TTL = 30.0
"""Seconds that an answer holds which says that there is nothing, and not for how long."""

_CONFIG_AGE = 30.0
"""Seconds after which the system's configuration is read again."""


class ResolveError(Exception):
    """Nobody could say. The text says why."""


class Record(NamedTuple):
    """One record.

    Attributes:
        host: the address, or of SRV the target's name.
        port: of SRV; else 0.
        priority: of SRV; the lower comes first.
        weight: of SRV.
    """

    host: str
    port: int = 0
    priority: int = 0
    weight: int = 0


class Records(NamedTuple):
    """An answer.

    Attributes:
        records: all of them; none: there are none, or no such name.
        ttl: seconds that it holds.
    """

    records: Sequence[Record]
    ttl: float


class Resolver:
    """Asks servers.

    Args:
        server: whom, address and port; None: those that the system's configuration names.
    """

    def __init__(self, server: tuple[str, int] | None) -> None:
        self._server = server
        self._files = Blocking()
        self._made: dns.asyncresolver.Resolver | None = None
        self._made_at = 0.0

    async def resolve(self, name: str, kind: str) -> Records:
        """The records of a kind that a name has.

        Raises:
            ResolveError: no server gave an answer.
            BlockedError: the system's configuration cannot be read.
        """
        resolver = await self._resolver()
        try:
            # Its own limit goes by the time of day, which may jump.
            with trio.fail_after(2 * LIFETIME):
                answer = await resolver.resolve(f"{name}.", kind, lifetime=LIFETIME, raise_on_no_answer=False)
        except dns.resolver.NXDOMAIN as error:
            responses = list(error.responses().values())  # type: ignore[no-untyped-call]  # dnspython has no type for it
            return Records((), _negative_ttl(responses[-1] if responses else None))
        except (dns.exception.DNSException, OSError, trio.TooSlowError) as error:
            raise ResolveError(f"{name} {kind}: {str(error) or type(error).__name__}") from None
        if answer.rrset is None:
            return Records((), _negative_ttl(answer.response))
        if kind == "SRV":
            found = [
                Record(each.target.to_text(omit_final_dot=True), each.port, each.priority, each.weight)
                for each in answer.rrset
            ]
        else:
            found = [Record(each.address) for each in answer.rrset]
        found.sort(key=lambda each: (each.priority, -each.weight, each.host, each.port))
        return Records(found, float(answer.chaining_result.minimum_ttl))

    async def _resolver(self) -> dns.asyncresolver.Resolver:
        now = trio.current_time()
        if self._made is None or now - self._made_at > _CONFIG_AGE:
            self._made = await self._files.run(_make, self._server)
            self._made_at = now
        return self._made


def _make(server: tuple[str, int] | None) -> dns.asyncresolver.Resolver:
    try:
        made = dns.asyncresolver.Resolver(configure=server is None)
    except dns.exception.DNSException as error:
        raise ResolveError(f"the system's resolvers: {error}") from None
    if server is not None:
        made.nameservers, made.port = [server[0]], server[1]
    return made


def _negative_ttl(response: dns.message.Message | None) -> float:
    """How long it holds that there is nothing (RFC 2308, section 5)."""
    for rrset in response.authority if response is not None else ():
        if rrset.rdtype == dns.rdatatype.SOA:
            return float(min(rrset.ttl, rrset[0].minimum))
    return NEGATIVE_TTL

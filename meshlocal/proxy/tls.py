"""TLS at the proxy's two ends: clients of tls and https listeners, and instances (rules T1 to T4).

`ProxyTls` is what a configuration makes of its files; making it, and looking at the files again, is for a thread.
"""

from __future__ import annotations

import logging
import socket
import ssl
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

import trio

import meshlocal.net.pipe_pair  # noqa: F401 - what relays TLS, which nobody may import once the event loop runs
from meshlocal.net.dial import is_own_address
from meshlocal.net.following import Followed
from meshlocal.net.listen import Started
from meshlocal.net.log import RateLimited, get_log
from meshlocal.net.pipe import Pipe
from meshlocal.net.sockets import abort, format_address
from meshlocal.net.tls import SvidSource, TlsContext, client_context, has_expired, server_context
from meshlocal.net.tls_error import TlsError
from meshlocal.net.tls_pipe import TlsPipe
from meshlocal.net.wall_clock import wall_clock
from meshlocal.policy.config import ProxyConfig
from meshlocal.policy.config_tls import TlsConfig, UpstreamTlsConfig
from meshlocal.policy.identity import IdentityPattern, allowed, client_cert_value, fill, identities, is_svid
from meshlocal.policy.model import NODE, Instance, ServiceKey
from meshlocal.policy.picker import Pick

_log = get_log(__name__)

_WARNING_INTERVAL = 5.0

HANDSHAKES = 1024
"""Handshakes with clients that are under way at once, at most. Who comes beyond is refused at once."""

PARTING_TIMEOUT = 1.0
"""Seconds that a client whose handshake failed may take to read why."""

SESSIONS = 1024
"""Sessions of one service that are kept to be resumed, at most."""

NOTHING_YET = "the workload API has given no certificate yet"

HTTP_PROTOCOLS = ("h2", "http/1.1")


class PipeServer(Protocol):
    """What serves connections whatever carries their bytes."""

    async def serve(self, service: ServiceKey | None, pipe: Pipe, peer: object) -> None:
        """Serve one connection to its end; the pipe is closed or cut then.

        Args:
            service: what it is for; None if each of its requests says its own.
            pipe: its bytes.
            peer: the client's address.
        """
        ...

    def accepting(self) -> AbstractContextManager[None]:
        """Entered for as long as there may be more connections."""
        ...

    def shed(self) -> None:
        """Close what is idle: descriptors ran out."""
        ...


class ListenerTls:
    """What listeners of one kind speak TLS with.

    Args:
        config: the proxy's section `tls`.
        protocols: what is spoken inside (ALPN).
        workload: gives what the section names no files of.

    Raises:
        FileProblemError: a file cannot be used.
    """

    def __init__(self, config: TlsConfig, protocols: tuple[str, ...], workload: SvidSource | None = None) -> None:
        certificate, authorities = config.certificate_file or workload, config.client_ca_file or workload
        assert certificate is not None
        self.config = config
        self.allow = tuple(map(IdentityPattern, config.allow))
        make = partial(
            server_context,
            certificate,
            config.key_file,
            client_ca_file=authorities,
            required=config.client_certificate == "required",
            minimum=config.min_version,
            protocols=protocols,
        )
        self.followed = Followed((certificate, config.key_file, authorities), make)


class UpstreamTls:
    """A service's `Security`.

    Args:
        config: the service's section `tls`.
        own: the proxy's, whose certificate stands in for one of its own.
        prefer: the tiers' names, but for the last.
        workload: gives what neither section names files of.

    Raises:
        FileProblemError: a file cannot be used.
    """

    def __init__(
        self,
        config: UpstreamTlsConfig,
        own: TlsConfig,
        prefer: Sequence[str] = (NODE,),
        workload: SvidSource | None = None,
    ) -> None:
        self._config = config
        self._skipped = frozenset(number for number, name in enumerate(prefer) if name in config.skip_tiers)
        certificate: str | SvidSource | None = config.certificate_file
        key_file = config.key_file
        if certificate is None:
            certificate, key_file = own.certificate_file or workload, own.key_file
        files = (config.ca_file or workload, certificate, key_file)
        self.followed: Mapping[str | None, Followed[TlsContext]] = {
            protocol: Followed(
                files,
                partial(
                    client_context,
                    *files,
                    check_name=config.identity is None,
                    minimum=config.min_version,
                    protocols=(protocol,) if protocol is not None else (),
                ),
            )
            for protocol in (None, *HTTP_PROTOCOLS)
        }
        self._sessions: OrderedDict[tuple[object, ...], ssl.SSLSession] = OrderedDict()

    def skips(self, instance: Instance, tier: int) -> bool:
        """See `Security.skips`: its label alone proves nothing, for a registry may lie."""
        return tier in self._skipped and is_own_address(instance.key.address)

    def port(self, instance: Instance) -> int:
        """See `Security.port`."""
        return self._config.port or instance.key.port

    async def secure(self, sock: socket.socket, pick: Pick, protocol: str | None) -> Pipe:
        """See `Security.secure`."""
        config = self._config
        context, number = self.followed[protocol].current
        # A session is of no use to another context.
        place = (pick.instance.key[:2], protocol, number)
        pipe: TlsPipe | None = None
        proved = False
        try:
            if context.trust_domain == "":
                raise TlsError(NOTHING_YET)
            wanted = fill(config.identity, pick.instance.labels) if config.identity is not None else None
            if config.identity is not None and wanted is None:
                raise TlsError("the instance lacks a label of the identity that it must prove")
            pipe = TlsPipe(
                sock,
                context,
                server_name=config.server_name,
                session=self._sessions.get(place),
                on_session=partial(self._keep, place),
            )
            await pipe.handshake()
            if has_expired(pipe.certificate, resumed=pipe.resumed, now=wall_clock()):
                raise TlsError("certificate has expired")
            if wanted is not None and not allowed(
                (IdentityPattern(wanted),), identities(pipe.certificate, context.trust_domain)
            ):
                raise TlsError("the instance proves another identity")
            if protocol == "h2" and pipe.protocol != "h2":
                raise TlsError("the instance speaks no HTTP/2 over TLS")
            proved = True
            return pipe
        except ValueError as error:
            # Of a name, say, that OpenSSL does not take.
            raise TlsError(str(error)) from None
        finally:
            if not proved:
                self._sessions.pop(place, None)
                abort(sock)

    def _keep(self, place: tuple[object, ...], session: ssl.SSLSession) -> None:
        self._sessions[place] = session
        self._sessions.move_to_end(place)
        if len(self._sessions) > SESSIONS:
            self._sessions.popitem(last=False)


class ProxyTls:
    """What a configuration needs of TLS. To make it reads files.

    Args:
        config: the proxy's section.
        workload: gives what it names no files of.

    Raises:
        FileProblemError: a file cannot be used.

    Attributes:
        listeners: by scheme.
        services: by their sections.
    """

    def __init__(self, config: ProxyConfig, workload: SvidSource | None = None) -> None:
        kinds = {"tls": (), "https": HTTP_PROTOCOLS}
        schemes = {listen.scheme for listen in config.listen}
        self._config = config
        self.listeners = {
            scheme: ListenerTls(config.tls, protocols, workload)
            for scheme, protocols in kinds.items()
            if scheme in schemes
        }
        self.services = {
            tls: UpstreamTls(tls, config.tls, config.prefer, workload)
            for service in config.services.values()
            if (tls := service.tls) is not None
        }

    def security(self, key: ServiceKey) -> UpstreamTls | None:
        """A service's; None: its instances are spoken to in plaintext."""
        tls = self._config.service(key).tls
        return self.services[tls] if tls is not None else None

    def followed(self) -> Iterator[Followed[TlsContext]]:
        """What is made of files."""
        for listener in self.listeners.values():
            yield listener.followed
        for service in self.services.values():
            yield from service.followed.values()


class TlsServer:
    """Shakes hands with the clients of listeners of one kind, and has those served that may be. A `Server`.

    Args:
        tls: with which certificate, and who may be.
        inner: serves them.

    Attributes:
        tls: as given; another one is for connections that are accepted from then on.
        handshakes: how many came to which end: `ok`, `failed`, `timeout`, `not_allowed`, `limited`.
    """

    def __init__(self, tls: ListenerTls, inner: PipeServer) -> None:
        self.tls = tls
        self._inner = inner
        self._under_way = 0
        self.handshakes: Counter[str] = Counter()
        self._refused = RateLimited(_log, logging.WARNING, "tls connection refused", interval=_WARNING_INTERVAL)

    def take(
        self, connections: trio.Nursery, service: ServiceKey | None, client: socket.socket, peer: object
    ) -> Started:
        """See `Server.take`."""
        if self._under_way >= HANDSHAKES:
            self._refuse("limited", f"{HANDSHAKES} handshakes are under way", peer)
            abort(client)
            return Started.NOTHING
        self._under_way += 1
        connections.start_soon(self._serve, self.tls, service, client, peer)
        return Started.NOW

    async def _serve(self, tls: ListenerTls, service: ServiceKey | None, client: socket.socket, peer: object) -> None:
        pipe: TlsPipe | None = None
        try:
            pipe = await self._shake_hands(tls, client, peer)
        except Exception:  # noqa: BLE001 - a fault of ours in one connection must not take the others with it
            _log.exception("connection failed by a fault in the proxy", client=format_address(peer))
        finally:
            self._under_way -= 1
            if pipe is None:
                abort(client)
        if pipe is not None:
            await self._inner.serve(service, pipe, peer)

    async def _shake_hands(self, tls: ListenerTls, client: socket.socket, peer: object) -> TlsPipe | None:
        """What the client is served over; None: it is refused, and was told so as far as TLS can."""
        context = tls.followed.current[0]
        if context.validity is None:
            self._refuse("failed", NOTHING_YET, peer)
            return None
        pipe = TlsPipe(client, context, server=True)
        with trio.move_on_after(tls.config.handshake_timeout) as limit:
            try:
                await pipe.handshake()
                certificate = pipe.certificate
            except OSError as error:
                self._refuse("failed", error.strerror or str(error), peer)
                if isinstance(error, TlsError):
                    # It was told why.
                    with trio.move_on_after(PARTING_TIMEOUT):
                        await pipe.part()
                return None
        if limit.cancelled_caught:
            self._refuse("timeout", f"no handshake in {tls.config.handshake_timeout:g} s", peer)
            return None
        if has_expired(certificate, resumed=pipe.resumed, now=wall_clock()):
            self._refuse("failed", "certificate has expired", peer)
            return None
        proved = identities(certificate, context.trust_domain)
        if certificate and not is_svid(proved, context.trust_domain):
            self._refuse("not_allowed", f"no identity of the trust domain {context.trust_domain}", peer)
            return None
        if tls.allow and not allowed(tls.allow, proved):
            self._refuse("not_allowed", f"{', '.join(proved) or 'no identity'} is not in proxy.tls.allow", peer)
            return None
        pipe.identity = proved[0] if proved else ""
        pipe.told = client_cert_value(pipe.certificate_digest, proved).encode()
        self.handshakes["ok"] += 1
        return pipe

    def _refuse(self, how: str, problem: str, peer: object) -> None:
        self.handshakes[how] += 1
        self._refused(trio.current_time(), client=format_address(peer), problem=problem)

    def accepting(self) -> AbstractContextManager[None]:
        """See `Server.accepting`."""
        return self._inner.accepting()

    def shed(self) -> None:
        """See `Server.shed`."""
        self._inner.shed()

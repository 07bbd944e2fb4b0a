"""TLS contexts made of files (rules T1, T3).

All of it reads files, so that none of it may be called in the event loop (P1): who runs one calls it in a thread
(`meshlocal.net.following`).
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from meshlocal.net.following import FileProblemError, Followed, Versioned
from meshlocal.net.tls_error import TlsError
from meshlocal.net.wall_clock import utc_text, wall_clock
from meshlocal.policy.identity import IdentityPattern, allowed, identities
from meshlocal.wire.certificate import Validity, first_of_pem, validity
from meshlocal.wire.svid import Svid

DAY = 86_400.0
"""Seconds before its end from which on a certificate is warned of; one that lives for less than three days: a third of
its life."""

VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class PeerCertificate(Protocol):
    """A side of TLS that is asked for the other one's certificate: an object of `ssl`, or Trio's stream."""

    def getpeercert(self) -> Mapping[str, object] | None:
        """See `ssl.SSLObject.getpeercert`."""
        ...


class SvidSource(Versioned, Protocol):
    """Where a certificate and authorities come from that stand in no file."""

    path: str
    svid: Svid | None


class TlsContext(ssl.SSLContext):
    """A context that knows its certificate.

    Attributes:
        certificate_file: of its own certificate, or where else that comes from; empty: it has none.
        validity: of that.
        trust_domain: the only one of whose SPIFFE IDs its authorities may speak; None: they are trusted with all.
        identity: what a server must prove beside its name, for who calls `check`.
    """

    certificate_file: str = ""
    validity: Validity | None = None
    trust_domain: str | None = None
    identity: str | None = None

    def check(self, certificate: Mapping[str, object]) -> None:
        """See that the other side's certificate proves `identity`, if there is one.

        Args:
            certificate: as `ssl.SSLObject.getpeercert` gives it.

        Raises:
            ConnectionError: it does not.
        """
        if self.identity is not None:
            proved = identities(certificate, self.trust_domain)
            if not allowed((IdentityPattern(self.identity),), proved):
                raise ConnectionError(f"the server proves another identity: {', '.join(proved) or 'none'}")


def server_context(
    certificate_file: str | SvidSource,
    key_file: str | None,
    *,
    client_ca_file: str | SvidSource | None,
    required: bool,
    minimum: str,
    protocols: Sequence[str],
) -> TlsContext:
    """A server's context.

    Args:
        certificate_file: its chain, in PEM; or what gives one, without which no handshake succeeds.
        key_file: its key; None: it stands with the chain.
        client_ca_file: the authorities of clients' certificates, or what gives some; None: clients are not asked for
            one.
        required: they must have one, if they are asked.
        minimum: the least version of TLS, a key of `VERSIONS`.
        protocols: what is spoken inside, the best first (ALPN); empty: nothing is said of it.

    Raises:
        FileProblemError: a file cannot be used.
    """
    context = TlsContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = VERSIONS[minimum]
    # Nothing is renegotiated: it was a way to exhaust servers, and TLS 1.3 has none (RFC 8446, 4.1.2).
    context.options |= ssl.OP_NO_RENEGOTIATION
    load_chain(context, certificate_file, key_file)
    if client_ca_file is not None:
        load_authorities(context, client_ca_file)
        context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context


def client_context(
    ca_file: str | SvidSource | None,
    certificate_file: str | SvidSource | None,
    key_file: str | None,
    *,
    check_name: bool,
    minimum: str,
    protocols: Sequence[str],
) -> TlsContext:
    """A client's context, which believes no certificate that its authorities did not sign.

    Args:
        ca_file: the authorities of servers' certificates, in PEM, or what gives some; None: those of the system.
        certificate_file: its own chain, or what gives one, if it has one.
        key_file: its key; None: it stands with the chain.
        check_name: the server's name must be in its certificate.
        minimum: as in `server_context`.
        protocols: as in `server_context`.

    Raises:
        FileProblemError: a file cannot be used.
    """
    context = TlsContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = VERSIONS[minimum]
    context.check_hostname = check_name
    # A server that asked for it would have a write wait for what it sends.
    context.options |= ssl.OP_NO_RENEGOTIATION
    # A common name proves nothing (RFC 9525, 6.3).
    context.hostname_checks_common_name = False
    if ca_file is not None:
        load_authorities(context, ca_file)
    else:
        context.load_default_certs()
    if certificate_file is not None:
        load_chain(context, certificate_file, key_file)
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context


def load_authorities(context: TlsContext, file: str | SvidSource) -> None:
    """Have a context believe these authorities.

    Raises:
        FileProblemError: the file cannot be used.
    """
    if not isinstance(file, str):
        svid = file.svid
        context.trust_domain = svid.trust_domain if svid is not None else ""
        if svid is None:
            # Nobody, until there are some.
            return
        try:
            context.load_verify_locations(cadata=svid.bundle.decode("ascii"))
        except (OSError, ValueError) as error:
            raise FileProblemError(file.path, error) from None
        return
    try:
        context.load_verify_locations(file)
    except (OSError, ValueError) as error:
        raise FileProblemError(file, error) from None


def load_chain(context: TlsContext, certificate_file: str | SvidSource, key_file: str | None) -> None:
    """Have a context prove itself with this certificate, which must be valid now.

    Raises:
        FileProblemError: a file cannot be used.
    """
    if not isinstance(certificate_file, str):
        if certificate_file.svid is not None:
            _load_svid(context, certificate_file.svid, certificate_file.path)
        return
    for file in filter(None, (certificate_file, key_file)):
        try:
            # What ssl says of a file that is missing does not say which.
            Path(file).open("rb").close()
        except OSError as error:
            raise FileProblemError(file, error) from None
    try:
        # A key with a password would ask for it on the terminal.
        context.load_cert_chain(certificate_file, key_file, password=_no_password)
        _check_valid(context, certificate_file, Path(certificate_file).read_bytes())
    except (OSError, ValueError) as error:
        raise FileProblemError(certificate_file, error) from None


def _load_svid(context: TlsContext, svid: Svid, path: str) -> None:
    """The same with what stands in no file, and is not to: OpenSSL reads it from memory that has a descriptor
    (memfd_create(2)), which is gone as soon as it is read."""
    try:
        number = os.memfd_create("meshlocal", os.MFD_CLOEXEC)
        with open(number, "wb", buffering=0) as memory:
            memory.write(svid.chain + svid.key)
            context.load_cert_chain(f"/proc/self/fd/{number}", password=_no_password)
        _check_valid(context, path, svid.chain)
    except (OSError, ValueError) as error:
        raise FileProblemError(path, error) from None


def check_svid(svid: Svid, path: str) -> None:
    """See that a certificate, its key and the authorities that came with it can be used.

    Raises:
        FileProblemError: they cannot.
    """
    context = TlsContext(ssl.PROTOCOL_TLS_SERVER)
    _load_svid(context, svid, path)
    try:
        context.load_verify_locations(cadata=svid.bundle.decode("ascii"))
    except (OSError, ValueError) as error:
        raise FileProblemError(path, error) from None


def _check_valid(context: TlsContext, source: str, pem: bytes) -> None:
    """Note when a context's certificate is valid.

    Raises:
        ValueError: it is not, now.
    """
    found = validity(first_of_pem(pem))
    now = wall_clock()
    if now > found.not_after:
        raise ValueError(f"the certificate has expired, at {utc_text(found.not_after)}")
    if now < found.not_before:
        raise ValueError(f"the certificate is not valid before {utc_text(found.not_before)}")
    context.certificate_file, context.validity = source, found


def certificates(followed: Iterable[Followed[Any]]) -> dict[str, Validity]:
    """The own certificates among what follows files, by their files."""
    contexts = (each.current[0] for each in followed)
    return {
        context.certificate_file: context.validity
        for context in contexts
        if isinstance(context, TlsContext) and context.validity is not None
    }


def expiring(followed: Iterable[Followed[Any]], now: float) -> Iterator[str]:
    """What is to be said of certificates that end soon, or have ended.

    Args:
        followed: among them those made of certificates.
        now: seconds since 1970.
    """
    for file, period in certificates(followed).items():
        left, life = period.not_after - now, period.not_after - period.not_before
        if left <= 0:
            yield f"{file}: the certificate has expired, at {utc_text(period.not_after)}"
        elif left < min(DAY, life / 3):
            yield f"{file}: the certificate expires at {utc_text(period.not_after)}"


def certificate_of(peer: PeerCertificate) -> Mapping[str, object]:
    """The other side's certificate, as `ssl.SSLObject.getpeercert` gives it; empty if it showed none that was checked.

    Args:
        peer: whose handshake is over.

    Raises:
        TlsError: it has names that are no text.
    """
    try:
        return peer.getpeercert() or {}
    except ValueError as error:
        # An authority signs what it is given: a URI, say, that is no UTF-8.
        raise TlsError(f"a certificate that makes no sense: {error}") from None


def has_expired(certificate: Mapping[str, object], *, resumed: bool, now: float) -> bool:
    """Whether the other side's certificate has, since the session was made that was resumed: OpenSSL does not look
    again.

    Args:
        certificate: as `ssl.SSLObject.getpeercert` gives it.
        resumed: whether a session was; else OpenSSL looked.
        now: seconds since 1970.
    """
    until = certificate.get("notAfter")
    return resumed and isinstance(until, str) and ssl.cert_time_to_seconds(until) < now


def _no_password() -> str:
    raise ValueError("the key has a password")

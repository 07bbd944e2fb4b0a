"""The SPIFFE Workload API, as far as X.509 goes: its method, and what its answers say (SPIFFE Workload API, 5)."""

from __future__ import annotations

import base64
import re

from meshlocal.wire.certificate import split
from meshlocal.wire.grpc.method import Method
from meshlocal.wire.pb import workload_pb2 as pb
from meshlocal.wire.svid import Svid

FETCH_X509_SVID = Method(
    "/SpiffeWorkloadAPI/FetchX509SVID", pb.X509SVIDRequest, pb.X509SVIDResponse, server_streaming=True
)

METADATA = (("workload.spiffe.io", "true"),)
"""What each call must have, so that nobody is talked into making one (SPIFFE Workload Endpoint, 5)."""

_ID = re.compile(r"spiffe://([a-z0-9._-]{1,255})(/[A-Za-z0-9._-]+)*")
"""SPIFFE-ID, 2."""


def default_svid(response: pb.X509SVIDResponse) -> Svid:
    """The default identity of an answer, which is its first (5.3).

    Raises:
        ValueError: there is none, or it makes no sense. The text shows no part of a key.
    """
    if not response.svids:
        raise ValueError("the answer has no SVID")
    found = response.svids[0]
    if _ID.fullmatch(found.spiffe_id) is None:
        raise ValueError(f"spiffe_id: {found.spiffe_id[:256]!r} is no SPIFFE ID")
    parts = {}
    for name in ("x509_svid", "bundle"):
        try:
            certificates = split(getattr(found, name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if not certificates:
            raise ValueError(f"{name}: is empty")
        parts[name] = b"".join(_pem("CERTIFICATE", each) for each in certificates)
    if not found.x509_svid_key:
        raise ValueError("x509_svid_key: is empty")
    return Svid(found.spiffe_id, parts["x509_svid"], _pem("PRIVATE KEY", found.x509_svid_key), parts["bundle"])


def _pem(label: str, der: bytes) -> bytes:
    """RFC 7468, 2."""
    encoded = base64.b64encode(der)
    lines = [encoded[start : start + 64] for start in range(0, len(encoded), 64)]
    return b"-----BEGIN %b-----\n%b\n-----END %b-----\n" % (label.encode(), b"\n".join(lines), label.encode())

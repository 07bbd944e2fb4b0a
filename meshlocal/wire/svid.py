"""A workload's own certificate, as the SPIFFE Workload API gives it."""

from __future__ import annotations


class Svid:
    """A workload's own certificate with its key, and the authorities of its trust domain.

    Args:
        spiffe_id: who it proves the workload to be.
        chain: the certificate and those between it and its authority, in PEM.
        key: its key, in PEM.
        bundle: the authorities, in PEM.

    Attributes:
        spiffe_id, chain, key, bundle: as given.
        trust_domain: the first part of `spiffe_id`.
    """

    __slots__ = ("bundle", "chain", "key", "spiffe_id", "trust_domain")

    def __init__(self, spiffe_id: str, chain: bytes, key: bytes, bundle: bytes) -> None:
        self.spiffe_id = spiffe_id
        self.trust_domain = spiffe_id.split("/")[2]
        self.chain = chain
        self.key = key
        self.bundle = bundle

    def __repr__(self) -> str:
        # Nothing that shows one shows its key.
        return f"Svid({self.spiffe_id!r})"

"""The options of a `meshlocal:` source URL: which discovery server is followed, and how it is spoken to."""

from __future__ import annotations

import msgspec

from meshlocal.policy.addresses import AddressError, DiscoveryUrl
from meshlocal.policy.identity import is_identity
from meshlocal.policy.problems import quote
from meshlocal.policy.source_forms import MESHLOCAL as FORM
from meshlocal.policy.source_options import SourceOptionsError, read_options, write_options, yes_or_no

_TEXTS = ("zone", "cluster", "ca_file", "certificate_file", "key_file", "identity", "token_file")
_OPTIONS = (*_TEXTS, "allow_plaintext_tokens")


class MeshlocalOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What stands behind `meshlocal:`, written `grpc://HOST:PORT,grpc://HOST:PORT?OPTION=VALUE`.

    Attributes:
        urls: servers that know the same; the first that answers is followed.
        zone: the label `zone` of instances that come without one; empty: as the server that follows has it.
        cluster: likewise.
        ca_file: the authorities of their certificates, in PEM; empty: the system's.
        certificate_file: a certificate to show, in PEM; empty: none.
        key_file: its key; empty: it stands with the certificate.
        identity: the URI or DNS name that they must prove; empty: the host of their URL.
        token_file: the file with the token that they are sent; empty: none.
        allow_plaintext_tokens: the token may go over plaintext beyond this machine.
    """

    urls: tuple[DiscoveryUrl, ...]
    zone: str = ""
    cluster: str = ""
    ca_file: str = ""
    certificate_file: str = ""
    key_file: str = ""
    identity: str = ""
    token_file: str = ""
    allow_plaintext_tokens: bool = False

    def __str__(self) -> str:
        pairs = [(name, value) for name in _TEXTS if (value := getattr(self, name))]
        if self.allow_plaintext_tokens:
            pairs.append(("allow_plaintext_tokens", "yes"))
        return ",".join(map(str, self.urls)) + write_options(pairs)

    @classmethod
    def parse(cls, text: str) -> MeshlocalOptions:
        """Read what follows `meshlocal:`.

        Raises:
            AddressError, SourceOptionsError: it is written otherwise.
        """
        servers, question, query = text.partition("?")
        urls: list[DiscoveryUrl] = []
        for each in servers.split(","):
            try:
                url = DiscoveryUrl.parse(each)
            except AddressError as error:
                raise AddressError(f"expected {FORM} (or grpcs, ws, wss): {error}") from None
            if url.scheme == "file":
                raise AddressError(f"{quote(each)} is no server; a file is a source of its own")
            if url in urls:
                raise AddressError(f"{each} stands twice")
            urls.append(url)
        found = dict(read_options(query, _OPTIONS)) if question else {}
        allowed = yes_or_no(found, "allow_plaintext_tokens")
        if "key_file" in found and "certificate_file" not in found:
            raise SourceOptionsError("key_file takes certificate_file too")
        if "identity" in found and not is_identity(found["identity"]):
            raise SourceOptionsError(f"identity: expected a URI or a DNS name, got {quote(found['identity'])}")
        return cls(urls=tuple(urls), allow_plaintext_tokens=allowed, **found)

"""The options of an `etcd:` source URL: which cluster, where in it, and how it is spoken to."""

from __future__ import annotations

import msgspec

from meshlocal.policy.addresses import AddressError, check_host, format_host_port, parse_host_port
from meshlocal.policy.problems import quote
from meshlocal.policy.source_forms import ETCD as FORM
from meshlocal.policy.source_options import SourceOptionsError, read_options, write_options, yes_or_no

_OPTIONS = ("tls", "ca_file", "certificate_file", "key_file", "user", "password_file")


class EtcdOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What stands behind `etcd:`, written `//HOST:PORT,HOST:PORT/PREFIX?OPTION=VALUE`.

    Attributes:
        endpoints: host and port of members of one cluster; the first that answers is asked.
        prefix: instances have keys `PREFIX/SERVICE/INSTANCE`.
        tls: it is spoken to over TLS; any of the next three means so, too.
        ca_file: the authorities of its certificates, in PEM; empty: the system's.
        certificate_file: a certificate to show, in PEM; empty: none.
        key_file: its key; empty: it stands with the certificate.
        user: who authenticates; empty: nobody does.
        password_file: the file with the user's password.
    """

    endpoints: tuple[tuple[str, int], ...]
    prefix: str
    tls: bool = False
    ca_file: str = ""
    certificate_file: str = ""
    key_file: str = ""
    user: str = ""
    password_file: str = ""

    def __str__(self) -> str:
        hosts = ",".join(format_host_port(*endpoint) for endpoint in self.endpoints)
        files = ("ca_file", "certificate_file", "key_file", "user", "password_file")
        pairs = [(name, value) for name in files if (value := getattr(self, name))]
        if self.tls and not (self.ca_file or self.certificate_file):
            pairs.insert(0, ("tls", "yes"))
        return f"//{hosts}/{self.prefix}{write_options(pairs)}"

    @classmethod
    def parse(cls, text: str) -> EtcdOptions:
        """Read what follows `etcd:`.

        Raises:
            AddressError, SourceOptionsError: it is written otherwise.
        """
        address, question, query = text.partition("?")
        if not address.startswith("//"):
            raise AddressError(f"expected {FORM}, got {quote('etcd:' + text)}")
        hosts, slash, prefix = address[2:].partition("/")
        prefix = prefix.removesuffix("/")
        if not slash or not prefix.strip("/"):
            raise AddressError(f"expected {FORM}, got {quote('etcd:' + text)}: the prefix of its keys is missing")
        if not prefix.isprintable() or any(char in prefix for char in " #"):
            raise AddressError(f"{quote(prefix)} cannot be a prefix of keys")
        endpoints: list[tuple[str, int]] = []
        for each in hosts.split(","):
            host, port = parse_host_port(each, FORM, each)
            if port == 0:
                raise AddressError("port 0 is not within 1 to 65535")
            endpoint = check_host(host), port
            if endpoint in endpoints:
                raise AddressError(f"{each} stands twice")
            endpoints.append(endpoint)
        found = dict(read_options(query, _OPTIONS)) if question else {}
        tls = yes_or_no(found, "tls")
        if "key_file" in found and "certificate_file" not in found:
            raise SourceOptionsError("key_file takes certificate_file too")
        if ("user" in found) != ("password_file" in found):
            raise SourceOptionsError("user and password_file belong together")
        over_tls = tls or "ca_file" in found or "certificate_file" in found
        return cls(endpoints=tuple(endpoints), prefix=prefix, tls=over_tls, **found)

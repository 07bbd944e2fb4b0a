"""Registries that a discovery server reads, as the configuration names them: `SCHEME:` and options.

`KINDS` is the table of them. One more registry is one more row: how its options are read, and which function makes
sources of them. Another package adds rows by an entry point in the group `meshlocal.sources`, named by its scheme, that
gives a `SourceKind` (`meshlocal.app.sources.load_kinds`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from meshlocal.policy import source_forms
from meshlocal.policy.addresses import AddressError, file_path
from meshlocal.policy.problems import quote

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(.*)", re.DOTALL)


class SourceKind(NamedTuple):
    """One kind of registry.

    Attributes:
        form: how its URLs are written, for messages: `file:PATH`.
        parse: reads what follows `SCHEME:`; raises ValueError with a text that says what is wrong. `str` of what it
            gives is read again to the same.
        factory: `MODULE:FUNCTION`, imported only where there is such a URL. It is called with the options and a
            `meshlocal.discovery.source.SourceContext`, and gives the sources, or raises `SourceError`.
    """

    form: str
    parse: Callable[[str], object]
    factory: str


class FileOptions(msgspec.Struct, frozen=True):
    """What stands behind `file:`: the path as it was written."""

    path: str

    def __str__(self) -> str:
        return self.path

    @classmethod
    def parse(cls, text: str) -> FileOptions:
        """Read a path, as of `file:PATH` or `file:///PATH`.

        Raises:
            AddressError: it names no file.
        """
        return cls(file_path(text))


def _etcd(text: str) -> object:
    from meshlocal.policy.etcd_options import EtcdOptions

    return EtcdOptions.parse(text)


def _dns(text: str) -> object:
    from meshlocal.policy.dns_options import DnsOptions

    return DnsOptions.parse(text)


def _meshlocal(text: str) -> object:
    from meshlocal.policy.meshlocal_options import MeshlocalOptions

    return MeshlocalOptions.parse(text)


def _kubernetes(text: str) -> object:
    from meshlocal.policy.kubernetes_options import KubernetesOptions

    return KubernetesOptions.parse(text)


# What reads options is imported where there are such: a proxy, which has no sources, has no room for it.
KINDS: dict[str, SourceKind] = {
    "file": SourceKind(source_forms.FILE, FileOptions.parse, "meshlocal.discovery.file_source:open_file_source"),
    "etcd": SourceKind(source_forms.ETCD, _etcd, "meshlocal.discovery.etcd.source:open_etcd_source"),
    "dns": SourceKind(source_forms.DNS, _dns, "meshlocal.discovery.dns.source:open_dns_source"),
    "meshlocal": SourceKind(source_forms.MESHLOCAL, _meshlocal, "meshlocal.discovery.server_source:open_server_source"),
    "kubernetes": SourceKind(
        source_forms.KUBERNETES, _kubernetes, "meshlocal.discovery.kubernetes.source:open_kubernetes_sources"
    ),
}
"""By scheme."""

find_more: list[Callable[[], None]] = []
"""Called once for a scheme that is not in `KINDS`, so that it may be added: finding what others bring reads files."""


class SourceUrl(msgspec.Struct, frozen=True, eq=False):
    """A registry that the discovery server reads. Equal to another if it is written the same.

    Attributes:
        scheme: a key of `KINDS`.
        options: what the kind's `parse` gave.
    """

    scheme: str
    options: object

    def __str__(self) -> str:
        return f"{self.scheme}:{self.options}"

    def __eq__(self, other: object) -> bool:
        # Other people's options need not compare; `SourceKind.parse` says that their text tells them apart.
        return str(self) == str(other) if isinstance(other, SourceUrl) else NotImplemented

    def __hash__(self) -> int:
        return hash(str(self))

    @classmethod
    def parse(cls, text: str) -> SourceUrl:
        """Read `SCHEME:OPTIONS` of one of `KINDS`.

        Raises:
            AddressError: it is written otherwise.
        """
        match = _SCHEME.fullmatch(text)
        scheme = match[1].lower() if match is not None else ""
        if match is not None and scheme not in KINDS:
            while find_more:
                find_more.pop()()
        kind = KINDS.get(scheme)
        if match is None or kind is None:
            raise AddressError(f"expected {_forms()}, got {quote(text)}")
        try:
            return cls(scheme, kind.parse(match[2]))
        except AddressError:
            raise
        except ValueError as error:
            raise AddressError(str(error)) from None
        except (Exception, SystemExit) as error:
            # Somebody else's code, most likely: a URL that it fails at is refused like any other.
            raise AddressError(f"{scheme}: cannot be read: {type(error).__name__}: {error}") from error


def _forms() -> str:
    *first, last = [kind.form for kind in KINDS.values()]
    return f"{', '.join(first)} or {last}" if first else last

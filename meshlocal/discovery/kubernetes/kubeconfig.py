"""Kubeconfig files → how to reach a cluster, and as whom.

The format is kubectl's (kubeconfig v1, Config). Several files are merged as kubectl does: of entries with one name the
first wins, and so does the first `current-context`; relative paths are relative to the file that they stand in.

What is not supported is refused rather than passed over: user names with passwords (gone from Kubernetes since 1.19),
`auth-provider` (since 1.26), impersonation, and proxies other than `http://`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import msgspec

from meshlocal.discovery.kubernetes.connect_proxy import parse_proxy
from meshlocal.net.http_client import ConnectProxy
from meshlocal.policy.problems import KeyPath, Problem, describe, did_you_mean, format_path, quote
from meshlocal.wire.yaml_document import YamlDocument, YamlError, parse_yaml

EXEC_VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")
_REFUSED_USER_KEYS = {
    "username": "passwords are not supported: Kubernetes took them out in 1.19",
    "password": "passwords are not supported: Kubernetes took them out in 1.19",
    "auth-provider": "is not supported: Kubernetes took it out in 1.26; use exec",
    "as": "impersonation is not supported",
    "as-uid": "impersonation is not supported",
    "as-groups": "impersonation is not supported",
    "as-user-extra": "impersonation is not supported",
}


class KubeconfigError(ValueError):
    """A kubeconfig that cannot be used. Its text names the file, the line, the key and what is wrong."""


class Content(msgspec.Struct, frozen=True):
    """Bytes that are given, or a file that has them; a file may change at any time."""

    data: bytes = b""
    file: Path | None = None

    def __bool__(self) -> bool:
        return bool(self.data) or self.file is not None


class ExecPlugin(msgspec.Struct, frozen=True):
    """A program that prints credentials (an ExecCredential as JSON).

    Attributes:
        version: of the format, its apiVersion.
        command: a name to look up in PATH, or a path.
        arguments: after the command.
        environment: added to the process's own.
        hint: how to install it; shown when it is missing.
        cluster: what it is told of the cluster, as the format has it; None: nothing.
    """

    version: str
    command: str
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = {}
    hint: str = ""
    cluster: Mapping[str, Any] | None = None


class Access(msgspec.Struct, frozen=True):
    """How to reach one API server, and as whom.

    Attributes:
        origin: where this was read, for messages.
        scheme: `https` or `http`.
        host: an IP address without brackets, or a DNS name.
        port: 1 to 65535.
        path: before every path of the API; empty, or with a slash at its start and none at its end.
        authority: certificates that the server's must come from; none: the system's.
        insecure: the server's certificate is not checked at all.
        server_name: what the certificate is for; empty: `host`.
        proxy: an HTTP proxy; none: straight there.
        token: a bearer token; a file goes before a given one.
        certificate: the client's, with its `key`.
        plugin: gives token or certificate.
    """

    origin: str
    scheme: str
    host: str
    port: int
    path: str = ""
    authority: Content = Content()
    insecure: bool = False
    server_name: str = ""
    proxy: ConnectProxy | None = None
    token: Content = Content()
    certificate: Content = Content()
    key: Content = Content()
    plugin: ExecPlugin | None = None


class _Section:
    """One mapping of a kubeconfig, and where it stands."""

    def __init__(self, document: YamlDocument, folder: Path, path: KeyPath, data: object) -> None:
        self._document = document
        self._folder = folder
        self._path = path
        if data is None:
            data = {}
        if not isinstance(data, dict):
            raise self.error(f"expected a mapping, got {describe(data)}")
        self._data: dict[str, Any] = data

    def error(self, message: str, *steps: str | int) -> KubeconfigError:
        path = (*self._path, *steps)
        origin = f"{self._document.name}:{self._document.line_of(path)}"
        return KubeconfigError(str(Problem(format_path(path), message, origin)))

    def __contains__(self, key: str) -> bool:
        return self._data.get(key) is not None

    def text(self, key: str) -> str:
        value = self._data.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            hint = "; put it between quotes" if isinstance(value, bool | int | float) else ""
            raise self.error(f"expected text, got {describe(value)}{hint}", key)
        return value

    def switch(self, key: str) -> bool:
        value = self._data.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(f"expected true or false, got {describe(value)}", key)
        return bool(value)

    def section(self, key: str) -> _Section:
        return _Section(self._document, self._folder, (*self._path, key), self._data.get(key))

    def items(self, key: str) -> list[Any]:
        value = self._data.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.error(f"expected a list, got {describe(value)}", key)
        return value

    def sections(self, key: str) -> list[_Section]:
        return [
            _Section(self._document, self._folder, (*self._path, key, position), item)
            for position, item in enumerate(self.items(key))
        ]

    def plain(self) -> dict[str, Any]:
        return self._data

    def file(self, key: str) -> Path:
        return self._folder / Path(self.text(key)).expanduser()

    def content(self, key: str, data_key: str) -> Content:
        """A file's name under one key, or base64 under another, which goes first."""
        if text := self.text(data_key):
            try:
                return Content(base64.b64decode("".join(text.split()), validate=True))
            except (binascii.Error, ValueError):
                raise self.error("is no base64", data_key) from None
        return Content(file=self.file(key)) if self.text(key) else Content()


def parse_kubeconfigs(files: Sequence[tuple[Path, str]], context: str = "") -> Access:
    """Merge kubeconfig files, and read one context of them.

    Args:
        files: paths and contents, in order of precedence.
        context: its name; empty: the current one.

    Raises:
        KubeconfigError: something that the context needs is missing or wrong.
    """
    roots = [_read(path, text) for path, text in files]
    names = ", ".join(str(path) for path, _ in files)
    origin = ""
    if not context:
        context = next((name for root in roots if (name := root.text("current-context"))), "")
        origin = "current-context"
        if not context:
            raise KubeconfigError(f"{names}: has no current-context; name a context")
    chosen = _find(roots, "contexts", "context", context, names, origin)
    cluster_name, user_name = chosen.text("cluster"), chosen.text("user")
    if not cluster_name:
        raise chosen.error("names no cluster")
    cluster = _find(roots, "clusters", "cluster", cluster_name, names, f"context {quote(context)}")
    user = _find(roots, "users", "user", user_name, names, f"context {quote(context)}") if user_name else None
    access = _read_cluster(f"{names} (context {context})", cluster)
    return _with_user(access, user, cluster) if user is not None else access


def _read(path: Path, text: str) -> _Section:
    try:
        document = parse_yaml(text, str(path))
    except YamlError as error:
        raise KubeconfigError(str(error)) from None
    return _Section(document, path.parent, (), document.data)


def _find(roots: Sequence[_Section], many: str, one: str, name: str, names: str, asked_by: str) -> _Section:
    known = []
    for root in roots:
        for entry in root.sections(many):
            if entry.text("name") == name:
                return entry.section(one)
            known.append(entry.text("name"))
    origin = f" (from {asked_by})" if asked_by else ""
    raise KubeconfigError(f"{names}: {many}: has no {quote(name)}{origin}{did_you_mean(name, known)}")


def _read_cluster(origin: str, cluster: _Section) -> Access:
    server = cluster.text("server")
    url = _split(cluster, "server", server)
    if url.scheme not in ("https", "http") or not url.hostname or url.query or url.fragment or "@" in url.netloc:
        raise cluster.error(f"expected https://HOST[:PORT][/PATH], got {quote(server)}", "server")
    proxy = _read_proxy(cluster)
    return Access(
        origin=origin,
        scheme=url.scheme,
        host=url.hostname,
        port=url.port or (443 if url.scheme == "https" else 80),
        path=url.path.rstrip("/"),
        authority=cluster.content("certificate-authority", "certificate-authority-data"),
        insecure=cluster.switch("insecure-skip-tls-verify"),
        server_name=cluster.text("tls-server-name"),
        proxy=proxy,
    )


def _split(section: _Section, key: str, text: str) -> SplitResult:
    try:
        url = urlsplit(text)
        _ = url.port
    except ValueError:
        raise section.error(f"{quote(text)} is no URL", key) from None
    return url


def _read_proxy(cluster: _Section) -> ConnectProxy | None:
    text = cluster.text("proxy-url")
    if not text:
        return None
    try:
        return parse_proxy(text)
    except ValueError as error:
        raise cluster.error(str(error), "proxy-url") from None


def _with_user(access: Access, user: _Section, cluster: _Section) -> Access:
    for refused, message in _REFUSED_USER_KEYS.items():
        if refused in user:
            raise user.error(message, refused)
    certificate = user.content("client-certificate", "client-certificate-data")
    key = user.content("client-key", "client-key-data")
    if bool(certificate) != bool(key):
        given, missing = ("certificate", "key") if certificate else ("key", "certificate")
        raise user.error(f"has a client {given}, but no client {missing}")
    token = Content(file=user.file("tokenFile")) if user.text("tokenFile") else Content(user.text("token").encode())
    plugin = _read_plugin(user.section("exec"), cluster) if "exec" in user else None
    return msgspec.structs.replace(access, token=token, certificate=certificate, key=key, plugin=plugin)


def _read_plugin(section: _Section, cluster: _Section) -> ExecPlugin:
    version, command = section.text("apiVersion"), section.text("command")
    if version not in EXEC_VERSIONS:
        raise section.error(f"expected one of {', '.join(EXEC_VERSIONS)}, got {quote(version)}", "apiVersion")
    if not command:
        raise section.error("is missing", "command")
    if section.text("interactiveMode") == "Always":
        raise section.error("a plugin that needs a terminal cannot be used by a server", "interactiveMode")
    if "/" in command:
        command = str(section.file("command"))
    arguments = section.items("args")
    for position, argument in enumerate(arguments):
        if not isinstance(argument, str):
            raise section.error(f"expected text, got {describe(argument)}", "args", position)
    told = None
    if section.switch("provideClusterInfo"):
        told = {
            key: value for key, value in cluster.plain().items() if key not in ("extensions", "certificate-authority")
        }
        for extension in cluster.sections("extensions"):
            if extension.text("name") == "client.authentication.k8s.io/exec":
                told["config"] = extension.plain().get("extension")
    return ExecPlugin(
        version=version,
        command=command,
        arguments=tuple(arguments),
        environment={entry.text("name"): entry.text("value") for entry in section.sections("env")},
        hint=section.text("installHint").strip(),
        cluster=told,
    )

"""Tokens and certificates: given, in files that are replaced from time to time, or printed by a plugin.

Files are read again for every request, of which there are few: a list, and a watch every few minutes. So a pod's
token, which the kubelet renews before it expires, is never stale. A plugin's answer is kept until it says that it
expires, or until the server refuses it.
"""

from __future__ import annotations

import os
import ssl
import subprocess
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import trio

from meshlocal.discovery.kubernetes.kubeconfig import Access, Content, ExecPlugin
from meshlocal.discovery.kubernetes.objects import encode
from meshlocal.net.blocking import Blocking

PLUGIN_TIMEOUT = 60.0
"""Seconds for a plugin to answer."""
_LEEWAY = timedelta(seconds=10)

UtcNow = Callable[[], datetime]
"""The time of day, with its zone."""


class CredentialsError(Exception):
    """Credentials that cannot be had. The text says which and why."""


class Secrets(msgspec.Struct, frozen=True):
    """What one request is made with. Never log it.

    Attributes:
        authority: PEM certificates that the server's must come from; empty: the system's.
        token: empty: none.
        certificate: PEM, the client's and those between it and its authority; empty: none.
        key: PEM.
    """

    authority: bytes = b""
    token: str = ""
    certificate: bytes = b""
    key: bytes = b""


class _ExecStatus(msgspec.Struct, frozen=True, rename="camel"):
    token: str = ""
    client_certificate_data: str = ""
    client_key_data: str = ""
    expiration_timestamp: datetime | None = None


class _ExecCredential(msgspec.Struct, frozen=True, rename="camel"):
    api_version: str
    status: _ExecStatus


class Credentials:
    """The credentials of one `Access`.

    Args:
        access: the API server, and who asks it.
        utc_now: for a plugin's expiry.
    """

    def __init__(self, access: Access, utc_now: UtcNow) -> None:
        self._access = access
        self._utc_now = utc_now
        self._files = Blocking()
        self._lock = trio.Lock()
        self._status: _ExecStatus | None = None

    async def get(self) -> Secrets:
        """What the next request is to be made with.

        Raises:
            CredentialsError: a file cannot be read, or the plugin failed.
        """
        access = self._access
        authority, token, certificate, key = await self._files.run(
            lambda: [_load(each) for each in (access.authority, access.token, access.certificate, access.key)]
        )
        secrets = Secrets(authority, _token(token, access.token), certificate, key)
        if access.plugin is not None and not secrets.token and not secrets.certificate:
            status = await self._plugin_status(access.plugin, authority)
            return Secrets(
                authority, status.token, status.client_certificate_data.encode(), status.client_key_data.encode()
            )
        return secrets

    async def _plugin_status(self, plugin: ExecPlugin, authority: bytes) -> _ExecStatus:
        async with self._lock:
            status = self._status
            if status is not None:
                expires = status.expiration_timestamp
                if expires is None or self._utc_now() < expires - _LEEWAY:
                    return status
            self._status = await _run_plugin(plugin, authority)
            return self._status


def _load(content: Content) -> bytes:
    if content.file is None:
        return content.data
    try:
        data = content.file.read_bytes()
    except OSError as error:
        raise CredentialsError(f"{content.file}: cannot be read: {error.strerror or error}") from None
    if not data.strip():
        raise CredentialsError(f"{content.file}: is empty")
    return data


def _token(token: bytes, content: Content) -> str:
    try:
        text = token.decode("ascii").strip()
    except UnicodeDecodeError:
        text = "\n"
    if not text.isprintable() or " " in text:
        raise CredentialsError(f"{content.file or 'token'}: is no bearer token")
    return text


async def _run_plugin(plugin: ExecPlugin, authority: bytes) -> _ExecStatus:
    spec: dict[str, Any] = {"interactive": False}
    if plugin.cluster is not None:
        cluster = dict(plugin.cluster)
        if authority:
            cluster["certificate-authority-data"] = authority
        spec["cluster"] = cluster
    info = encode({"apiVersion": plugin.version, "kind": "ExecCredential", "spec": spec}).decode()
    environment: Mapping[str, str] = {**os.environ, **plugin.environment, "KUBERNETES_EXEC_INFO": info}
    name = Path(plugin.command).name
    try:
        with trio.fail_after(PLUGIN_TIMEOUT):
            done = await trio.run_process(
                [plugin.command, *plugin.arguments],
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env=environment,
            )
    except OSError as error:
        hint = f": {plugin.hint}" if plugin.hint else ""
        raise CredentialsError(f"plugin {name}: cannot be run: {error.strerror or error}{hint}") from None
    except trio.TooSlowError:
        raise CredentialsError(f"plugin {name}: gave no answer within {PLUGIN_TIMEOUT:g} s") from None
    return _read_answer(plugin, name, done)


def _read_answer(plugin: ExecPlugin, name: str, done: subprocess.CompletedProcess[bytes]) -> _ExecStatus:
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["and said nothing"]
        raise CredentialsError(f"plugin {name}: exited with status {done.returncode}: {said[0][:300]}")
    try:
        credential = msgspec.json.decode(done.stdout, type=_ExecCredential)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        # Without what it printed, which may be a secret.
        raise CredentialsError(f"plugin {name}: printed no ExecCredential: {error}") from None
    status = credential.status
    if credential.api_version != plugin.version:
        raise CredentialsError(f"plugin {name}: printed {credential.api_version[:100]!r}, not {plugin.version}")
    if not status.token and not (status.client_certificate_data and status.client_key_data):
        raise CredentialsError(f"plugin {name}: printed neither a token nor a client certificate with its key")
    if status.expiration_timestamp is not None and status.expiration_timestamp.tzinfo is None:
        raise CredentialsError(f"plugin {name}: expirationTimestamp: has no time zone")
    _token(status.token.encode(), Content(file=Path(f"plugin {name}")))
    return status


def make_tls(access: Access, secrets: Secrets) -> ssl.SSLContext:
    """A client's TLS context.

    Raises:
        CredentialsError: a certificate or key cannot be used.
    """
    # Not `ssl.create_default_context`: from Python 3.13 on it refuses certificates without an authority key
    # identifier (VERIFY_X509_STRICT), which many clusters' own authorities make.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["http/1.1"])
    if access.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif secrets.authority:
        try:
            context.load_verify_locations(cadata=secrets.authority.decode("ascii"))
        except (ssl.SSLError, UnicodeDecodeError, ValueError):
            where = access.authority.file or "certificate-authority-data"
            raise CredentialsError(f"{where}: holds no PEM certificates") from None
    else:
        context.load_default_certs()
    if secrets.certificate:
        _load_client_certificate(context, access, secrets)
    return context


def _load_client_certificate(context: ssl.SSLContext, access: Access, secrets: Secrets) -> None:
    """OpenSSL takes files only: this one is in memory, so that no key is ever written to a disk."""
    number = os.memfd_create("meshlocal-client-certificate", os.MFD_CLOEXEC)
    try:
        with os.fdopen(number, "wb", closefd=False) as file:
            file.write(secrets.key + b"\n" + secrets.certificate)
        context.load_cert_chain(f"/proc/self/fd/{number}", password=_refuse_password)
    except (ssl.SSLError, ValueError) as error:
        where = access.certificate.file or "client-certificate-data"
        why = getattr(error, "reason", None) or "the key wants a password"
        raise CredentialsError(f"{where}: cannot be used with its key: {why}") from None
    finally:
        os.close(number)


def _refuse_password() -> str:
    # Without this OpenSSL would ask on the terminal.
    raise ValueError

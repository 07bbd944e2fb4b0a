"""Who may talk to a discovery server: certificates and tokens from files, read again without a restart (S2)."""

from __future__ import annotations

import ssl
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme

from meshlocal.app.discovery_access import DiscoveryAccess
from meshlocal.policy.config import DiscoveryServerConfig
from meshlocal.policy.config_build import ConfigError
from meshlocal.wire.discovery_methods import LIST_SERVICES
from meshlocal.wire.grpc.status import GrpcError, StatusCode


class Files:
    """A certificate, its key and tokens in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.certify()
        self.tokens("old\n")

    def certify(self, name: str = "first.test") -> None:
        made = self.authority.issue_cert(name)
        made.cert_chain_pems[0].write_to_path(self.folder / "cert.pem")
        made.private_key_pem.write_to_path(self.folder / "key.pem")

    def tokens(self, text: str) -> None:
        (self.folder / "tokens").write_text(text)

    def access(self, *, tls: bool = True, tokens: bool = True) -> DiscoveryAccess:
        return DiscoveryAccess(
            DiscoveryServerConfig(
                tls_certificate_file=str(self.folder / "cert.pem") if tls else None,
                tls_key_file=str(self.folder / "key.pem") if tls else None,
                tokens_file=str(self.folder / "tokens") if tokens else None,
            )
        )

    def served_to(self, context: ssl.SSLContext, name: str) -> bool:
        """Whether a client that trusts the authority gets the certificate of this name: a handshake in memory."""
        trusting = ssl.create_default_context()
        self.authority.configure_trust(trusting)
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = trusting.wrap_bio(to_client, to_server, server_hostname=name)
        server = context.wrap_bio(to_server, to_client, server_side=True)
        for side in (client, server, client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError:
                return False
        return True


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


async def ask(access: DiscoveryAccess, authorization: str | bytes | None) -> str:
    """`served`, or why not."""
    served: list[object] = []

    async def handler(call: object) -> None:
        served.append(call)

    guarded = access.guard({LIST_SERVICES: handler})[LIST_SERVICES]
    metadata = () if authorization is None else (("authorization", authorization),)
    call: Any = SimpleNamespace(metadata=metadata, certificate={}, peer="127.0.0.1:1", caller=None)
    try:
        await guarded(call)
    except GrpcError as error:
        refused = error
    else:
        assert served == [call]
        return "served"
    assert (refused.code, served) == (StatusCode.UNAUTHENTICATED, [])
    return refused.message


@pytest.mark.parametrize(
    ("authorization", "answer"),
    [
        ("Bearer one", "served"),
        ("bearer two", "served"),
        ("Bearer  one ", "served"),
        (None, "a bearer token is needed"),
        ("", "a bearer token is needed"),
        ("one", "a bearer token is needed"),
        ("Basic one", "a bearer token is needed"),
        (b"Bearer one", "a bearer token is needed"),
        ("Bearer ", "the token is not known"),
        ("Bearer on", "the token is not known"),
        ("Bearer one two", "the token is not known"),
        ("Bearer # comment", "the token is not known"),
        ("Bearer \udcff", "the token is not known"),
    ],
)
async def test_tokens(files: Files, authorization: str | bytes | None, answer: str) -> None:
    """One of the file's lines, whole; comments and blank lines are no tokens."""
    files.tokens("# comment\none\n\n  two  \n")
    assert await ask(files.access(), authorization) == answer


async def test_without_a_tokens_file_everybody_may(files: Files) -> None:
    access = files.access(tls=False, tokens=False)
    assert await ask(access, None) == "served"
    assert not access.tls


async def test_tokens_are_read_again(files: Files) -> None:
    """A token is added, then the old one removed: nobody is shut out meanwhile."""
    access = files.access()
    for text, old, new in (("old\nnew\n", "served", "served"), ("new\n", "the token is not known", "served")):
        files.tokens(text)
        access.reload()
        assert (await ask(access, "Bearer old"), await ask(access, "Bearer new")) == (old, new)


def test_a_certificate_is_read_again(files: Files) -> None:
    """Listeners that are open serve the new one from the next handshake on."""
    access = files.access()
    contexts = [access.grpc_context, access.websocket_context]
    for context in contexts:
        assert files.served_to(context(), "first.test")
    files.certify("second.test")
    access.reload()
    for context in contexts:
        assert files.served_to(context(), "second.test")
        assert not files.served_to(context(), "first.test")


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("tokens", "", "discovery.tokens_file: .*tokens: holds no token"),
        ("tokens", "# none\n", "discovery.tokens_file: .*tokens: holds no token"),
        ("tokens", None, "discovery.tokens_file: .*tokens: No such file"),
        ("cert.pem", "no certificate", "discovery.tls_certificate_file: .*cert.pem: "),
        ("cert.pem", None, "discovery.tls_certificate_file: .*cert.pem: No such file"),
        ("key.pem", None, "discovery.tls_key_file: .*key.pem: No such file"),
        ("key.pem", "another", "discovery.tls_certificate_file: .*: "),
    ],
)
async def test_files_that_cannot_be_used(files: Files, file: str, content: str | None, problem: str) -> None:
    """At the start they are an error that names the key and the file; on a reload nothing changes."""
    access = files.access()
    path = files.folder / file
    if content is None:
        path.unlink()
    elif content == "another":
        trustme.CA().issue_cert("other.test").private_key_pem.write_to_path(path)
    else:
        path.write_text(content)
    with pytest.raises(ConfigError, match=problem):
        files.access()
    with pytest.raises(ConfigError, match=problem):
        access.reload()
    assert await ask(access, "Bearer old") == "served"
    assert files.served_to(access.grpc_context(), "first.test")

"""Contexts that follow their files (T3)."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import pytest
import trustme

from meshlocal.net.tls import ClientContext, FileProblemError, ServerContexts


def write(folder: Path, authority: trustme.CA, name: str = "127.0.0.1") -> tuple[str, str]:
    """A certificate and its key."""
    made = authority.issue_cert(name)
    made.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    made.private_key_pem.write_to_path(folder / "key.pem")
    return str(folder / "cert.pem"), str(folder / "key.pem")


def served(server: ssl.SSLContext, client: ssl.SSLContext) -> bytes | None:
    """The certificate that a handshake in memory shows."""
    ends = []
    buffers = ssl.MemoryBIO(), ssl.MemoryBIO()
    for context, server_side in ((server, True), (client, False)):
        incoming, outgoing = buffers if server_side else buffers[::-1]
        name = None if server_side else "127.0.0.1"
        ends.append(context.wrap_bio(incoming, outgoing, server_side=server_side, server_hostname=name))
    done = [False, False]
    for _ in range(10):
        for number, end in enumerate(ends):
            if not done[number]:
                try:
                    end.do_handshake()
                    done[number] = True
                except ssl.SSLWantReadError:
                    pass
    assert done == [True, True]
    return ends[1].getpeercert(binary_form=True)


def test_a_reload_is_for_new_connections_of_every_context(tmp_path: Path) -> None:
    authority = trustme.CA()
    files = write(tmp_path, authority)
    contexts = ServerContexts(*files)
    made = [contexts.context(), contexts.context()]
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    client = ClientContext(str(tmp_path / "ca.pem")).get()
    before = [served(each, client) for each in made]
    assert before[0] == before[1]
    write(tmp_path, authority)
    contexts.reload()
    after = [served(each, client) for each in made]
    assert after[0] == after[1] != before[0]


@pytest.mark.parametrize("spoil", ["key", "no key", "no certificate"])
def test_files_that_do_not_fit_change_nothing_and_are_named(tmp_path: Path, spoil: str) -> None:
    authority = trustme.CA()
    certificate, key = write(tmp_path, authority)
    contexts = ServerContexts(certificate, key)
    made = contexts.context()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    client = ClientContext(str(tmp_path / "ca.pem")).get()
    before = served(made, client)
    if spoil == "key":
        authority.issue_cert("other").private_key_pem.write_to_path(key)
    else:
        os.unlink(key if spoil == "no key" else certificate)
    with pytest.raises(FileProblemError) as caught:
        contexts.reload()
    assert caught.value.file == (key if spoil == "no key" else certificate)
    assert served(made, client) == before
    with pytest.raises(FileProblemError):
        ServerContexts(certificate, key)


def test_a_clients_context_is_made_anew_once_its_file_changed(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(file)
    context = ClientContext(str(file))
    first = context.get()
    assert context.get() is first
    trustme.CA().cert_pem.write_to_path(tmp_path / "new.pem")
    os.replace(tmp_path / "new.pem", file)
    assert context.get() is not first
    file.write_text("nonsense")
    with pytest.raises((OSError, ValueError)):
        context.get()
    file.unlink()
    with pytest.raises(FileNotFoundError):
        context.get()
    assert ClientContext(None).get().verify_mode is ssl.CERT_REQUIRED

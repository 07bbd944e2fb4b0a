"""Contexts that follow their files (T3)."""

from __future__ import annotations

import datetime
import os
import ssl
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.net.following import FileProblemError, Followed, Looks
from meshlocal.net.tls import TlsContext, certificates, client_context, expiring, has_expired, server_context
from meshlocal.wire.certificate import first_of_pem, validity
from nursery_tests.certificates import Authority, served


def write(folder: Path, authority: trustme.CA, name: str = "127.0.0.1") -> tuple[str, str]:
    """A certificate and its key."""
    made = authority.issue_cert(name)
    made.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    made.private_key_pem.write_to_path(folder / "key.pem")
    return str(folder / "cert.pem"), str(folder / "key.pem")


def server(certificate: str, key: str | None) -> Followed[TlsContext]:
    make = partial(server_context, certificate, key, client_ca_file=None, required=False, minimum="1.2", protocols=())
    return Followed([certificate, key], make)


def client(ca_file: str | None) -> Followed[TlsContext]:
    make = partial(client_context, ca_file, None, None, check_name=True, minimum="1.2", protocols=())
    return Followed([ca_file], make)


def test_files_that_changed_are_for_new_connections(tmp_path: Path) -> None:
    authority = trustme.CA()
    followed = server(*write(tmp_path, authority))
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    trusting = client(str(tmp_path / "ca.pem")).current[0]
    before = served(followed.current[0], trusting)
    assert not followed.look()
    write(tmp_path, authority)
    assert followed.look()
    assert not followed.look()
    assert followed.current[1] == 1
    assert served(followed.current[0], trusting) != before


def test_a_directorys_link_that_is_swapped_is_a_change(tmp_path: Path) -> None:
    """As Kubernetes does with a volume: the files' own names and times may stay."""
    authority = trustme.CA()
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, authority)
    (tmp_path / "data").symlink_to("one")
    followed = server(str(tmp_path / "data" / "cert.pem"), str(tmp_path / "data" / "key.pem"))
    (tmp_path / "next").symlink_to("two")
    os.replace(tmp_path / "next", tmp_path / "data")
    assert followed.look()


@pytest.mark.parametrize("first", ["key", "certificate"])
def test_a_bundle_holds_the_key_too(tmp_path: Path, first: str) -> None:
    """As a Kubernetes Pod Certificate's credential bundle does: the key, and behind it the chain."""
    authority = trustme.CA()
    certificate, key = map(Path, write(tmp_path, authority))
    bundle = tmp_path / "bundle.pem"
    parts = [key.read_text(), certificate.read_text()]
    bundle.write_text("".join(parts if first == "key" else parts[::-1]))
    followed = server(str(bundle), None)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    assert served(followed.current[0], client(str(tmp_path / "ca.pem")).current[0]) is not None
    assert list(certificates([followed])) == [str(bundle)]


def spoil_key(folder: Path) -> str:
    trustme.CA().issue_cert("other").private_key_pem.write_to_path(folder / "key.pem")
    return "cert.pem"


def remove(name: str) -> Callable[[Path], str]:
    def act(folder: Path) -> str:
        (folder / name).unlink()
        return name

    return act


def issue(begin: float, end: float) -> Callable[[Path], str]:
    """A certificate that is valid from `begin` to `end` days from now."""

    def act(folder: Path) -> str:
        pair = Authority(folder).issue("cert", ["example"], begin=begin + 1, end=end)
        os.replace(pair.key, folder / "key.pem")
        return "cert.pem"

    return act


HOUR = 1 / 24


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_key, "key"),
        (remove("key.pem"), "No such file"),
        (remove("cert.pem"), "No such file"),
        (issue(-2 * HOUR, -HOUR), "the certificate has expired, at 20"),
        (issue(HOUR, 2 * HOUR), "the certificate is not valid before 20"),
    ],
    ids=["key", "no key", "no certificate", "expired", "not yet valid"],
)
def test_what_cannot_be_used_changes_nothing_and_is_named(
    tmp_path: Path, spoil: Callable[[Path], str], told: str
) -> None:
    followed = server(*write(tmp_path, trustme.CA()))
    before = followed.current
    named = str(tmp_path / spoil(tmp_path))
    looks = Looks(lambda: [followed])
    made, problems = looks.look()
    assert made == 0
    assert len(problems) == 1
    assert problems[0].startswith(named)
    assert told.lower() in problems[0].lower()
    assert looks.look() == (0, []), "said once"
    assert followed.current == before
    with pytest.raises(FileProblemError):
        server(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
    write(tmp_path, trustme.CA())
    assert looks.look() == (1, [])


def test_a_clients_authorities_are_followed_too(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(file)
    followed = client(str(file))
    trustme.CA().cert_pem.write_to_path(tmp_path / "new.pem")
    os.replace(tmp_path / "new.pem", file)
    assert followed.look()
    file.write_text("nonsense")
    with pytest.raises(FileProblemError, match=r"ca\.pem"):
        followed.look()
    file.unlink()
    with pytest.raises(FileProblemError, match="No such file"):
        followed.look()
    assert client(None).current[0].verify_mode is ssl.CERT_REQUIRED
    assert certificates([followed]) == {}


@pytest.mark.parametrize(
    ("life", "left", "warned"),
    [
        (90 * 24 * HOUR, 25 * HOUR, ""),
        (90 * 24 * HOUR, 23 * HOUR, "expires at"),
        (3 * HOUR, 1.1 * HOUR, ""),
        (3 * HOUR, 0.9 * HOUR, "expires at"),
        (3 * HOUR, -HOUR, "has expired, at"),
    ],
)
def test_a_certificate_that_ends_soon(tmp_path: Path, life: float, left: float, warned: str) -> None:
    """A day before, or a third of a short life before: one that is renewed every hour is no news."""
    issue(-HOUR / 2, life - HOUR / 2)(tmp_path)
    followed = server(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
    (period,) = certificates([followed]).values()
    told = list(expiring([followed], period.not_after - left * 86_400))
    assert len(told) == (1 if warned else 0)
    assert all(line.startswith(str(tmp_path / "cert.pem")) and warned in line for line in told)


def test_a_resumed_session_does_not_outlive_the_others_certificate() -> None:
    certificate = {"notAfter": "Jan  1 00:00:00 2020 GMT"}
    end = 1577836800.0
    assert has_expired(certificate, resumed=True, now=end + 1)
    assert not has_expired(certificate, resumed=True, now=end - 1)
    assert not has_expired(certificate, resumed=False, now=end + 1)
    assert not has_expired({}, resumed=True, now=end + 1)


EARLIEST, LATEST = (datetime.datetime(year, 1, 1, tzinfo=datetime.UTC) for year in (1950, 2200))


@given(
    begin=st.integers(int(EARLIEST.timestamp()), int(LATEST.timestamp())),
    days=st.integers(0, 40000),
    serial=st.integers(1, 2**150),
)
def test_validity_is_what_a_library_wrote(begin: int, days: int, serial: int) -> None:
    end = begin + days * 86_400
    der = certificate_of(begin, end, serial)
    assert validity(der) == (begin, end)
    pem = x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)
    assert first_of_pem(b"leading text\n" + pem + pem) == der
    assert first_of_pem(pem.replace(b" CERT", b" X509 CERT")) == der


KEY = ec.generate_private_key(ec.SECP256R1())


def certificate_of(begin: int, end: int, serial: int) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x" * (serial % 60 + 1))])
    builder = x509.CertificateBuilder(name, name, KEY.public_key(), serial, utc(begin), utc(end))
    return builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def utc(seconds: int) -> datetime.datetime:
    return datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(seconds=seconds)


SOUND = certificate_of(1_577_836_800, 2_840_140_800, 1)


@given(st.integers(0, len(SOUND)), st.binary(max_size=8))
def test_what_is_no_certificate_is_refused_or_read_but_nothing_else(at: int, put: bytes) -> None:
    spoilt = SOUND[:at] + put + SOUND[at + len(put) :]
    for data in (spoilt, SOUND[:at], put):
        try:
            found = validity(data)
        except ValueError:
            continue
        assert len(found) == 2


def test_nothing_is_renegotiated(tmp_path: Path) -> None:
    """Neither as a server (RFC 8446, 4.1.2) nor as a client, whose writes would wait for what a server sends."""
    certificate, key = write(tmp_path, trustme.CA())
    contexts = server(certificate, key).current[0], client(None).current[0]
    assert all(context.options & ssl.OP_NO_RENEGOTIATION for context in contexts)

"""Certificates as a test wants them, with URIs for names and at any time, which trustme does not give."""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtensionOID, NameOID

NO_TEXT = b"\x30\x0f\x86\x0dspiffe://m/\xff\xfe"
"""Names of a certificate (RFC 5280, 4.2.1.6): a URI that is no text."""


class Pair(NamedTuple):
    """Files of a certificate and of its key, in PEM."""

    certificate: str
    key: str


class Authority:
    """An authority, whose certificate stands in `file`.

    Args:
        folder: where it keeps its files.
        name: of the authority, and of its files.
    """

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            self._builder(self._name, self._key, 0, 365)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        path = folder / f"{name}.pem"
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        self.file = str(path)

    def issue_raw(self, file: str, names: bytes) -> Pair:
        """A certificate whose names are what these bytes say (RFC 5280, 4.2.1.6), in files named so."""
        pair = self.issue(file, ["example"])
        key = serialization.load_pem_private_key(Path(pair.key).read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        extension = x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, names)
        certificate = (
            self._builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, file)]), key, 0, 30)
            .add_extension(extension, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        Path(pair.certificate).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return pair

    def key_file(self) -> str:
        """A file of its own key."""
        path = Path(self.file).with_suffix(".key")
        path.write_bytes(
            self._key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return str(path)

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, begin: float, end: float
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=begin - 1))
            .not_valid_after(now + datetime.timedelta(days=end))
        )

    def issue(
        self, file: str, names: Sequence[str] = (), uris: Sequence[str] = (), *, begin: float = 0, end: float = 30
    ) -> Pair:
        """A certificate in files named so.

        Args:
            file: their name without a suffix.
            names: DNS names that it proves.
            uris: URIs likewise.
            begin: days from now, less one, from which on it is valid.
            end: days from now until which it is.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        proved = [*map(x509.DNSName, names), *map(x509.UniformResourceIdentifier, uris)]
        certificate = (
            self._builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, file)]), key, begin, end)
            .add_extension(x509.SubjectAlternativeName(proved), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pair = Pair(str(self._folder / f"{file}.pem"), str(self._folder / f"{file}.key"))
        Path(pair.certificate).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        Path(pair.key).write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return pair


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

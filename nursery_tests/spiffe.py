"""A SPIFFE agent as tests want it: grpcio's server on a unix socket, which serves what is published of the API."""

from __future__ import annotations

import queue
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from cryptography.hazmat.primitives import serialization

from meshlocal.wire.pb import workload_pb2 as pb
from nursery_tests.certificates import Authority


def answer(authority: Authority, spiffe_id: str, *, proved: str = "", end: float = 1) -> pb.X509SVIDResponse:
    """What an agent says of a workload.

    Args:
        authority: of its trust domain.
        spiffe_id: of the workload.
        proved: the URI that its certificate has, if not the same.
        end: days from now until which it is valid.
    """
    pair = authority.issue("svid", uris=[proved or spiffe_id], end=end)
    key = serialization.load_pem_private_key(Path(pair.key).read_bytes(), None)
    encoded = key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    # What the agent has of it is not for the workload to find.
    leaf = ssl.PEM_cert_to_DER_cert(Path(pair.certificate).read_text())
    Path(pair.certificate).unlink()
    Path(pair.key).unlink()
    bundle = ssl.PEM_cert_to_DER_cert(Path(authority.file).read_text())
    svid = pb.X509SVID(spiffe_id=spiffe_id, x509_svid=leaf, x509_svid_key=encoded, bundle=bundle)
    return pb.X509SVIDResponse(svids=[svid])


class Agent:
    """An agent that listens.

    Args:
        socket: the path of its socket.
        first: what it says to who asks; None: it denies that it knows anybody.

    Attributes:
        asked: how often it was.
    """

    def __init__(self, socket: Path, first: pb.X509SVIDResponse | None) -> None:
        self.socket = socket
        self.asked = 0
        self._latest = first
        self._watching: list[queue.Queue[pb.X509SVIDResponse | None]] = []
        self._lock = threading.Lock()
        handler = grpc.unary_stream_rpc_method_handler(
            self._fetch,
            request_deserializer=pb.X509SVIDRequest.FromString,
            response_serializer=pb.X509SVIDResponse.SerializeToString,
        )
        self._server = grpc.server(
            ThreadPoolExecutor(8),
            handlers=[grpc.method_handlers_generic_handler("SpiffeWorkloadAPI", {"FetchX509SVID": handler})],
        )
        assert self._server.add_insecure_port(f"unix:{socket}")
        self._server.start()

    @property
    def address(self) -> str:
        """As a configuration has it."""
        return f"unix://{self.socket}"

    def say(self, response: pb.X509SVIDResponse) -> None:
        """Say something else, to all who listen and to who asks from now on."""
        with self._lock:
            self._latest = response
            for each in self._watching:
                each.put(response)

    def end_streams(self) -> None:
        """End the streams of all who listen."""
        with self._lock:
            for each in self._watching:
                each.put(None)

    def stop(self) -> None:
        self.end_streams()
        self._server.stop(0).wait()

    def _fetch(self, _: pb.X509SVIDRequest, context: grpc.ServicerContext) -> Iterator[pb.X509SVIDResponse]:
        # SPIFFE Workload Endpoint, 5 and 6.
        if dict(context.invocation_metadata()).get("workload.spiffe.io") != "true":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "security header missing")
        mine: queue.Queue[pb.X509SVIDResponse | None] = queue.Queue()
        with self._lock:
            self.asked += 1
            latest = self._latest
            self._watching.append(mine)
        if latest is None:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "no identity issued")
            raise AssertionError
        yield latest
        while (response := mine.get()) is not None:
            yield response

"""The steady load that goes on during faults, and what came of it."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Set
from contextlib import asynccontextmanager
from itertools import count
from typing import Final, NamedTuple

import trio

from nursery_tests.campaign.grpc import CallError, GrpcClient

LIMIT = 20.0
"""Seconds within which what must happen has to; reached only by a failure."""

PATIENCE = 10.0
"""Seconds after which a client gives its request up."""

PAUSE = 0.01
"""Seconds between a worker's requests."""

WORKERS: Final = {"tcp": 2, "replay": 2, "get": 2, "post": 1, "held": 2, "call": 2, "stream": 2}
"""How many clients there are of each kind.

tcp, replay: each request is a connection of its own, to a service with the defaults and to one with `replay`.
get, post: HTTP/1.1 on connections that are kept alive; every tenth is left for a fresh one.
held: a tcp connection that stays; each exchange on it is a request.
call: unary gRPC calls on a connection that is kept; every tenth is left for a fresh one.
stream: a gRPC call that stays; each message and its answer are a request.
"""

LASTING = ("held", "stream")
"""What stays where it is (A5), for as long as it can."""

ONCE = ("post", "call")
"""What may come to an instance once only (A3)."""

GATHER = 10
"""Requests of a kind in a row that show where it goes."""


class Target(NamedTuple):
    """Where the proxy listens."""

    host: str
    ports: dict[str, int]


class Failure(NamedTuple):
    at: float
    kind: str
    how: str
    began: float


class ClientError(Exception):
    """A request failed; the text says how, in a word."""


class Tally:
    """What came of one kind of request since the start of a fault."""

    def __init__(self) -> None:
        self.sent = 0
        self.worst = 0.0
        self.resent = 0
        self.failed: Counter[str] = Counter()


class Load:
    """Clients of all kinds.

    Attributes:
        target: where they connect.
        tallies: by kind, since `restart`.
        failures: each one, since `restart`.
        done: IDs of POSTs and unary calls that were answered, since `restart`.
    """

    def __init__(self, target: Target, connect: Callable[[str, int], Awaitable[trio.SocketStream]]) -> None:
        self.target = target
        self._connect = connect
        self._ids = count(1)
        self._busy = 0
        self._open = 0
        self._resume: trio.Event | None = None
        self._news = trio.Event()
        self._last: dict[str, list[str]] = {}
        self.restart()

    def restart(self) -> None:
        self.tallies = {kind: Tally() for kind in WORKERS}
        self.failures: list[Failure] = []
        self.done: list[str] = []
        self._last = {kind: [] for kind in WORKERS}

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for kind in WORKERS:
                for _ in range(WORKERS[kind]):
                    nursery.start_soon(self._work, kind)

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """No request is under way, and no connection open."""
        self._resume = trio.Event()
        await self._until(lambda: not self._open and not self._busy, "the load cannot be paused")
        try:
            yield
        finally:
            self._resume.set()
            self._resume = None

    async def home(self, names: Set[str]) -> None:
        """Wait until requests of every kind go to these, to each of them and to no other."""
        self._last = {kind: [] for kind in WORKERS}
        await self._until(
            lambda: all(
                kind in LASTING or (len(last) >= GATHER and set(last[-GATHER:]) == names)
                for kind, last in self._last.items()
            ),
            f"not all go to {sorted(names)} again",
        )

    async def more(self, requests: int) -> None:
        """Wait for so many requests more of each kind."""
        goal = {kind: tally.sent + requests for kind, tally in self.tallies.items()}
        await self._until(lambda: all(self.tallies[kind].sent >= goal[kind] for kind in goal), "the load stands still")

    async def _until(self, holds: Callable[[], bool], problem: str) -> None:
        with trio.move_on_after(LIMIT):
            while not holds():
                await self._news.wait()
        assert holds(), (problem, {kind: last[-GATHER:] for kind, last in self._last.items()}, self.failures[-20:])

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def _work(self, kind: str) -> None:
        connection: Client | None = None
        number = 0
        while True:
            while (resume := self._resume) is not None:
                if connection is not None:
                    await self._leave(connection)
                    connection = None
                await resume.wait()
            number += 1
            keep = kind in LASTING or (kind in ("get", "post", "call") and number % 10 != 0)
            tally, began = self.tallies[kind], trio.current_time()
            tally.sent += 1
            self._busy += 1
            try:
                connection = await self._request(kind, connection, tally, keep=keep)
            except ClientError as error:
                connection = None
                tally.failed[str(error)] += 1
                self.failures.append(Failure(trio.current_time(), kind, str(error), began))
            self._busy -= 1
            tally.worst = max(tally.worst, trio.current_time() - began)
            self._tell()
            await trio.sleep(PAUSE)

    async def _leave(self, connection: Client) -> None:
        await connection.stream.aclose()
        self._open -= 1
        self._tell()

    async def _request(self, kind: str, connection: Client | None, tally: Tally, *, keep: bool) -> Client | None:
        """One request; returns its connection, if it stays open."""
        id = f"{kind}{next(self._ids)}"
        reused = connection is not None
        try:
            with trio.fail_after(PATIENCE):
                if connection is None:
                    connection = await self._dial(kind)
                try:
                    answer = await connection.ask(id)
                except ClientError as error:
                    if not (reused and connection.may_resend(str(error))):
                        raise
                    tally.resent += 1
                    await self._leave(connection)
                    connection = None
                    connection = await self._dial(kind)
                    answer = await connection.ask(id)
                name, _, said = answer.partition(" ")
                if said != id:
                    raise ClientError("wrong")
        except BaseException as error:
            if connection is not None:
                await trio.aclose_forcefully(connection.stream)
                self._open -= 1
            if isinstance(error, trio.TooSlowError):
                raise ClientError("timeout") from None
            raise
        if kind in ONCE:
            self.done.append(id)
        self._last[kind] = [*self._last[kind][1 - GATHER :], name]
        if keep and not connection.closing:
            return connection
        await self._leave(connection)
        return None

    async def _dial(self, kind: str) -> Client:
        try:
            stream = await self._connect(self.target.host, self.target.ports[kind])
        except ConnectionRefusedError:
            raise ClientError("refused") from None
        except OSError as error:
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            if cause.errno == errno.ECONNRESET:
                # Accepted and reset before this side had looked.
                raise ClientError("reset") from None
            raise ClientError(f"connect: {os.strerror(cause.errno or 0)}") from None
        self._open += 1
        return Client(kind, stream)


class Client:
    """One connection."""

    def __init__(self, kind: str, stream: trio.SocketStream) -> None:
        self.kind = kind
        self.stream = stream
        self.closing = False
        self._grpc = GrpcClient(stream, "call", keep=kind in LASTING) if kind in ("call", "stream") else None

    def may_resend(self, how: str) -> bool:
        """Whether a request that failed on a connection that is not fresh may be sent again on one that is.

        As RFC 9110, 9.2.2, and RFC 9113, 6.8, allow: the connection was closed, not this request refused.
        """
        if self._grpc is not None:
            return self._grpc.unprocessed
        return self.kind == "get" and how in ("reset", "ended")

    async def ask(self, id: str) -> str:
        """What answers `id`: a name and the ID.

        Raises:
            ClientError: there was no answer, not all of it, or it tells of an error.
        """
        if self._grpc is not None:
            return await self._ask_grpc(self._grpc, id)
        if self.kind in ("get", "post"):
            return await self._ask_http(id)
        data = await self._exchange(f"{id}\n".encode(), lambda data: data.endswith(b"\n"))
        return data.decode().strip()

    async def _ask_grpc(self, client: GrpcClient, id: str) -> str:
        try:
            return await client.ask(id)
        except CallError as error:
            raise ClientError(str(error)) from None
        finally:
            self.closing = client.closing

    async def _ask_http(self, id: str) -> str:
        length = 0

        def complete(data: bytes) -> bool:
            nonlocal length
            head, end, _ = data.partition(b"\r\n\r\n")
            if not end:
                return False
            for line in head.split(b"\r\n")[1:]:
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = len(head) + 4 + int(value)
                elif name.lower() == b"connection" and value.strip().lower() == b"close":
                    self.closing = True
            return len(data) >= length > 0

        body = b"" if self.kind == "get" else b"x" * 100
        head = f"{self.kind.upper()} /{id} HTTP/1.1\r\nHost: {self.kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        data = await self._exchange(head.encode() + body, complete)
        head_part, _, body_part = data.partition(b"\r\n\r\n")
        status = head_part.split()[1].decode()
        if status != "200":
            raise ClientError(status)
        if len(data) != length:
            raise ClientError("wrong")
        return body_part.decode().partition("\n")[0]

    async def _exchange(self, data: bytes, complete: Callable[[bytes], bool]) -> bytes:
        received = b""
        try:
            await self.stream.send_all(data)
            while not complete(received):
                part = await self.stream.receive_some(65536)
                if not part:
                    raise ClientError("cut" if received else "ended")
                received += part
        except trio.BrokenResourceError:
            raise ClientError("cut" if received else "reset") from None
        return received

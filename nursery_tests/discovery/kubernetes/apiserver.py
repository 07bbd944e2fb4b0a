"""An API server of the tests' own: HTTPS, the recorded bytes, and the protocol's rules enforced.

Whatever the client does that the API does not allow (a watch without a version, a limit on a watch, a continue token
with other parameters than its list's) is answered as the API answers it, and noted in `ApiServer.offences`, which
`serving` asserts to be empty.
"""

from __future__ import annotations

import base64
import json
import ssl
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import trio

DATA = Path(__file__).parent / "data"
SLICES = "/apis/discovery.k8s.io/v1/endpointslices"
ENDPOINTS = "/api/v1/endpoints"
NODES = "/api/v1/nodes"
_KINDS = {
    SLICES: ("EndpointSliceList", "discovery.k8s.io/v1"),
    ENDPOINTS: ("EndpointsList", "v1"),
    NODES: ("NodeList", "v1"),
}


_SELECTS = ("kind", "collection", "namespace")


class Request(SimpleNamespace):
    """One request: collection, namespace, query, headers, kind (`list` or `watch`)."""


class Collection:
    """The objects of one resource, and the events since its oldest version that can be watched from."""

    def __init__(self, version: Any = 1) -> None:
        self.version = version
        self.oldest = version
        self.items: dict[tuple[str, str], Any] = {}
        self.events: list[tuple[int, Any, bytes]] = []  # (version, item, line)
        self.bookmarks: list[bytes] = []
        self.snapshots: dict[Any, Any] = {}
        self.issued = {str(version)}

    def put(self, change: Any, item: Any, line: Any = None) -> None:
        """Apply an event, with the server's own bytes if there are any."""
        meta = item["metadata"]
        if line is None:
            self.version += 1
            meta["resourceVersion"] = str(self.version)
            line = json.dumps({"type": change, "object": item}).encode() + b"\n"
        else:
            self.version = int(meta["resourceVersion"])
        key = (meta.get("namespace", ""), meta["name"])
        if change == "DELETED":
            self.items.pop(key, None)
        else:
            self.items[key] = item
        self.issued.add(meta["resourceVersion"])
        self.events.append((self.version, item, line))

    def mark(self, line: Any) -> None:
        """Take a bookmark."""
        self.issued.add(json.loads(line)["object"]["metadata"]["resourceVersion"])
        self.bookmarks.append(line)

    def compact(self) -> None:
        """Forget every event so far."""
        self.events = []
        self.version += 1
        self.oldest = self.version


def _status(code: Any, message: Any, reason: Any = "", **more: Any) -> Any:
    status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message}
    return json.dumps({**status, "reason": reason, "code": code, **more}).encode()


class ApiServer:
    """The server. Everything about it may be changed while it runs; call `wake` afterwards.

    Attributes:
        tokens: bearer tokens that it takes; None: any request.
        absent: collections that it does not know.
        forbidden: collections that may not be read.
        split: bytes in a chunk of a watch; None: an event in each; "whole": all there is in one.
        faults: what happens to the next requests instead of an answer (`status`, `drop`, `cut`, `error`), first come
            first; those with `kind`, `collection` or `namespace` wait for a request of these.
        expired: continue tokens are all too old.
    """

    def __init__(self, tls: Any) -> None:
        self._tls = tls
        self.collections = {SLICES: Collection(), ENDPOINTS: Collection(), NODES: Collection()}
        self.tokens = None
        self.absent: set[str] = set()
        self.forbidden: set[str] = set()
        self.split = None
        self.faults: deque[Any] = deque()
        self.expired = 0
        self.requests: list[Request] = []
        self.offences: list[str] = []
        self.watching = 0
        self.accepted = 0
        self.refuse = False
        self._ended = 0
        self._changed = trio.Event()
        self._connections: set[Any] = set()
        self.port = 0

    def need_certificate(self) -> None:
        """Take clients with a certificate only."""
        self._tls.verify_mode = ssl.CERT_REQUIRED

    def wake(self) -> None:
        """Let everything look again."""
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, predicate: Any) -> None:
        """Wait for something about this server."""
        with trio.fail_after(20):
            while not predicate():
                await self._changed.wait()

    def load(self, collection: Any, name: Any, change: Any = bytes) -> None:
        """Take a recorded list, its bytes changed by this first."""
        found = json.loads(change((DATA / name).read_bytes()))
        target = self.collections[collection]
        target.version = target.oldest = int(found["metadata"]["resourceVersion"])
        target.issued = {found["metadata"]["resourceVersion"]}
        target.items = {(i["metadata"]["namespace"], i["metadata"]["name"]): i for i in found["items"]}

    def play(self, collection: Any, lines: Any) -> None:
        """Take recorded watch events."""
        target = self.collections[collection]
        for line in lines:
            event = json.loads(line)
            if event["type"] == "BOOKMARK":
                target.mark(line)
            else:
                target.put(event["type"], event["object"], line)
        self.wake()

    def put(self, collection: Any, change: Any, item: Any) -> None:
        """Take an event of a test's own making."""
        self.collections[collection].put(change, item)
        self.wake()

    async def cut(self) -> None:
        """Break every connection."""
        cut = set(self._connections)
        for scope in cut:
            scope.cancel()
        await self.until(lambda: not cut & self._connections)

    @property
    def open(self) -> Any:
        """Connections that are open."""
        return len(self._connections)

    def end_watches(self) -> None:
        """End every watch as a server does when its time is over."""
        self._ended += 1
        self.wake()

    def asked(self, kind: Any, collection: Any = SLICES) -> Any:
        """The queries of the requests so far."""
        return [each.query for each in self.requests if (each.kind, each.collection) == (kind, collection)]

    async def serve(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        listeners = await trio.open_tcp_listeners(self.port, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        await trio.serve_listeners(self._handle, listeners, task_status=task_status)

    async def _handle(self, plain: Any) -> None:
        self.accepted += 1
        if self.refuse:
            self.wake()
            await trio.aclose_forcefully(plain)
            return
        stream = trio.SSLStream(plain, self._tls, server_side=True, https_compatible=True)
        with trio.CancelScope() as scope:
            self._connections.add(scope)
            try:
                await stream.do_handshake()
                head = bytearray()
                while b"\r\n\r\n" not in head:
                    data = await stream.receive_some(4096)
                    if not data:
                        raise trio.BrokenResourceError
                    head += data
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._wait_for_leaver, stream, scope)
                    await self._answer(stream, bytes(head))
                    nursery.cancel_scope.cancel()
                await stream.aclose()
            except* (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            finally:
                self._connections.discard(scope)
                await trio.aclose_forcefully(stream)
                self.wake()

    async def _wait_for_leaver(self, stream: Any, scope: Any) -> None:
        with suppress(trio.BrokenResourceError):
            assert not await stream.receive_some(1)
        scope.cancel()

    def _parse(self, head: Any) -> Any:
        lines = head.decode("latin-1").split("\r\n\r\n")[0].split("\r\n")
        method, target, version = lines[0].split(" ")
        assert (method, version) == ("GET", "HTTP/1.1")
        headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines[1:])}
        url = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(url.query, strict_parsing=bool(url.query)).items()}
        path, namespace = url.path, ""
        if "/namespaces/" in path:
            before, _, rest = path.partition("/namespaces/")
            namespace, _, resource = rest.partition("/")
            path = f"{before}/{resource}"
        kind = "watch" if query.get("watch") == "true" else "list"
        return Request(collection=path, namespace=namespace, query=query, headers=headers, kind=kind)

    async def _answer(self, stream: Any, head: Any) -> None:
        request = self._parse(head)
        self.requests.append(request)
        self.wake()
        if fault := self._take_fault(request):
            if "drop" in fault:
                return
            if "status" in fault:
                await self._send(stream, fault["status"], fault.get("body", b""), fault.get("headers", {}))
                return
            request.cut = fault.get("cut")
            request.error = fault.get("error")
        if self.tokens is not None:
            given = request.headers.get("authorization", "")
            if given.removeprefix("Bearer ") not in self.tokens:
                await self._send(stream, 401, _status(401, "Unauthorized", "Unauthorized"))
                return
        if request.collection not in self.collections or request.collection in self.absent:
            await self._send(stream, 404, b"404 page not found\n", {"Content-Type": "text/plain"})
            return
        if request.collection in self.forbidden:
            what = request.collection.rsplit("/", 1)[1]
            message = f'{what} is forbidden: User "u" cannot list resource "{what}"'
            await self._send(stream, 403, _status(403, message, "Forbidden"))
            return
        if request.kind == "watch":
            await self._watch(stream, request)
        else:
            await self._list(stream, request)

    def _take_fault(self, request: Any) -> Any:
        for fault in self.faults:
            if fault.get("page", "any") != "any" and bool(request.query.get("continue")) != (fault["page"] == "later"):
                continue
            if all(fault.get(name, mine) == mine for name, mine in vars(request).items() if name in _SELECTS):
                self.faults.remove(fault)
                return fault
        return None

    async def _send(self, stream: Any, status: Any, body: Any, headers: Any = ()) -> None:
        lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}", "Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in dict(headers).items()]
        await stream.send_all("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    def _selected(self, request: Any, items: Any) -> Any:
        name, _, value = request.query.get("labelSelector", "").partition("=")
        return {
            key: item
            for key, item in items.items()
            if (not request.namespace or key[0] == request.namespace)
            and (not name or item["metadata"].get("labels", {}).get(name) == value)
        }

    def _lines(self, request: Any, version: Any) -> Any:
        return [
            line
            for at, item, line in self.collections[request.collection].events
            if at > version and self._selected(request, {(item["metadata"].get("namespace", ""), ""): item})
        ]

    async def _list(self, stream: Any, request: Any) -> None:
        collection = self.collections[request.collection]
        limit = int(request.query.get("limit", "0"))
        version, start = str(collection.version), 0
        if token := request.query.get("continue"):
            version, start, selector = json.loads(base64.b64decode(token))
            if selector != request.query.get("labelSelector") or not limit:
                self.offences.append("a continue token with other parameters than its list's")
            if self.expired:
                self.expired -= 1
                message = "The provided continue parameter is too old to display a consistent list result."
                await self._send(stream, 410, _status(410, message, "Expired", metadata={"continue": "later"}))
                return
        else:
            collection.snapshots[version] = dict(collection.items)
            collection.issued.add(version)
        items = sorted(self._selected(request, collection.snapshots[version]).items())
        page = items[start : start + limit] if limit else items
        meta = {"resourceVersion": version}
        if start + len(page) < len(items):
            place = [version, start + len(page), request.query.get("labelSelector")]
            meta["continue"] = base64.b64encode(json.dumps(place).encode()).decode()
        kind, api_version = _KINDS[request.collection]
        if "as=PartialObjectMetadataList" in request.headers["accept"]:
            kind, api_version = "PartialObjectMetadataList", "meta.k8s.io/v1"
            page = [(key, {"metadata": item["metadata"]}) for key, item in page]
        body = {"kind": kind, "apiVersion": api_version, "metadata": meta, "items": [item for _, item in page] or None}
        await self._send(stream, 200, json.dumps(body).encode())

    async def _watch(self, stream: Any, request: Any) -> None:
        collection = self.collections[request.collection]
        query = request.query
        if query.get("resourceVersion") not in collection.issued:
            self.offences.append("a watch from a version that was never given")
        if "limit" in query or "continue" in query:
            self.offences.append("a watch with limit or continue")
        if not 1 <= int(query.get("timeoutSeconds", "0")) <= 3600:
            self.offences.append("a watch without an end")
        await stream.send_all(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        version = int(query["resourceVersion"])
        if getattr(request, "error", None) is not None:
            await self._chunk(stream, request.error, None)
            await stream.send_all(b"0\r\n\r\n")
            return
        if version < collection.oldest:
            await self._chunk(stream, (DATA / "gone.watch.jsonl").read_bytes(), None)
            await stream.send_all(b"0\r\n\r\n")
            return
        marks, ended = len(collection.bookmarks), self._ended
        self.watching += 1
        self.wake()
        try:
            while True:
                lines = self._lines(request, version)
                if query.get("allowWatchBookmarks") == "true":
                    lines += collection.bookmarks[marks:]
                version, marks = collection.version, len(collection.bookmarks)
                changed = self._changed
                if self.split == "whole" and lines:
                    lines = [b"".join(lines)]
                for line in lines:
                    if getattr(request, "cut", None) is not None:
                        # Half a line, and then the end of the connection in the middle of a chunk or after one.
                        await self._chunk(stream, line[: request.cut], None)
                        return
                    await self._chunk(stream, line, None if self.split == "whole" else self.split)
                if ended != self._ended:
                    await stream.send_all(b"0\r\n\r\n")
                    return
                await changed.wait()
        finally:
            self.watching -= 1
            self.wake()

    async def _chunk(self, stream: Any, data: Any, size: Any) -> None:
        for start in range(0, len(data), size or len(data)):
            piece = data[start : start + (size or len(data))]
            await stream.send_all(b"%x\r\n" % len(piece) + piece + b"\r\n")


@asynccontextmanager
async def serving(authority: Any, setup: Any = None) -> AsyncIterator[Any]:
    """An API server that runs, with a certificate of this authority's."""
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1", "kubernetes.default.svc").configure_cert(tls)
    authority.configure_trust(tls)
    tls.verify_mode = ssl.CERT_OPTIONAL
    server = ApiServer(tls)
    if setup is not None:
        setup(server)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        yield server
        nursery.cancel_scope.cancel()
    assert server.offences == []


def lines(name: Any) -> Any:
    """The lines of a recorded file."""
    return (DATA / name).read_bytes().splitlines(keepends=True)

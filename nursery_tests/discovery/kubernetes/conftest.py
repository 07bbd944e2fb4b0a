"""An API server of the tests' own: HTTPS, the recorded bytes, and the protocol's rules enforced.

Whatever the client does that the API does not allow (a watch without a version, a limit on a watch, a continue token
with other parameters than its list's) is answered as the API answers it, and noted in `ApiServer.offences`, which the
fixture asserts to be empty.
"""

import base64
import json
import ssl
from collections import deque
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest
import trio
import trustme

DATA = Path(__file__).parent / "data"
SLICES = "/apis/discovery.k8s.io/v1/endpointslices"
ENDPOINTS = "/api/v1/endpoints"
NODES = "/api/v1/nodes"
_KINDS = {
    SLICES: ("EndpointSliceList", "discovery.k8s.io/v1"),
    ENDPOINTS: ("EndpointsList", "v1"),
    NODES: ("NodeList", "v1"),
}


class Request(SimpleNamespace):
    """One request: collection, namespace, query, headers, kind (`list` or `watch`)."""


class Collection:
    """The objects of one resource, and the events since its oldest version that can be watched from."""

    def __init__(self, version=1):
        self.version = version
        self.oldest = version
        self.items = {}
        self.events = []  # (version, namespace, line)
        self.bookmarks = []  # (number, line)
        self.snapshots = {}

    def put(self, change, item, line=None):
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
        self.events.append((self.version, key[0], line))

    def compact(self):
        """Forget every event so far."""
        self.events = []
        self.oldest = self.version


def _status(code, message, reason="", **more):
    status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message}
    return json.dumps({**status, "reason": reason, "code": code, **more}).encode()


class ApiServer:
    """The server. Everything about it may be changed while it runs; call `wake` afterwards.

    Attributes:
        tokens: bearer tokens that it takes; None: any request.
        absent: collections that it does not know.
        forbidden: collections that may not be read.
        split: bytes in a chunk of a watch; None: an event in each.
        faults: what happens to the next requests instead of an answer (`status`, `drop`, `cut`), first come first.
        expired: continue tokens are all too old.
    """

    def __init__(self, tls):
        self._tls = tls
        self.collections = {SLICES: Collection(), ENDPOINTS: Collection(), NODES: Collection()}
        self.tokens = None
        self.absent = set()
        self.forbidden = set()
        self.split = None
        self.faults = deque()
        self.expired = 0
        self.requests = []
        self.offences = []
        self.watching = 0
        self.accepted = 0
        self.refuse = False
        self._changed = trio.Event()
        self._streams = set()
        self.port = 0

    def wake(self):
        """Let everything look again."""
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, predicate):
        """Wait for something about this server."""
        with trio.fail_after(20):
            while not predicate():
                await self._changed.wait()

    def load(self, collection, name):
        """Take a recorded list."""
        found = json.loads((DATA / name).read_bytes())
        target = self.collections[collection]
        target.version = target.oldest = int(found["metadata"]["resourceVersion"])
        target.items = {(i["metadata"]["namespace"], i["metadata"]["name"]): i for i in found["items"]}

    def play(self, collection, lines):
        """Take recorded watch events."""
        target = self.collections[collection]
        for line in lines:
            event = json.loads(line)
            if event["type"] == "BOOKMARK":
                target.bookmarks.append((len(target.bookmarks), line))
            else:
                target.put(event["type"], event["object"], line)
        self.wake()

    def put(self, collection, change, item):
        """Take an event of a test's own making."""
        self.collections[collection].put(change, item)
        self.wake()

    async def cut(self):
        """Break every connection."""
        for stream in list(self._streams):
            await trio.aclose_forcefully(stream)

    async def serve(self, *, task_status):
        listeners = await trio.open_tcp_listeners(self.port, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        await trio.serve_listeners(self._handle, listeners, task_status=task_status)

    async def _handle(self, plain):
        self.accepted += 1
        if self.refuse:
            await trio.aclose_forcefully(plain)
            return
        stream = trio.SSLStream(plain, self._tls, server_side=True, https_compatible=True)
        self._streams.add(stream)
        try:
            await stream.do_handshake()
            head = bytearray()
            while b"\r\n\r\n" not in head:
                data = await stream.receive_some(4096)
                if not data:
                    return
                head += data
            await self._answer(stream, bytes(head))
            await stream.aclose()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self._streams.discard(stream)
            await trio.aclose_forcefully(stream)
            self.wake()

    def _parse(self, head):
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

    async def _answer(self, stream, head):
        request = self._parse(head)
        self.requests.append(request)
        self.wake()
        if self.faults and self.faults[0].get("kind", request.kind) == request.kind:
            fault = self.faults.popleft()
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

    async def _send(self, stream, status, body, headers=()):
        lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}", "Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in dict(headers).items()]
        await stream.send_all("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    def _selected(self, request, items):
        name, _, value = request.query.get("labelSelector", "").partition("=")
        return {
            key: item
            for key, item in items.items()
            if (not request.namespace or key[0] == request.namespace)
            and (not name or item["metadata"].get("labels", {}).get(name) == value)
        }

    async def _list(self, stream, request):
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

    async def _watch(self, stream, request):
        collection = self.collections[request.collection]
        query = request.query
        if not query.get("resourceVersion", "").isdigit():
            self.offences.append("a watch without a version to start from")
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
        marks = len(collection.bookmarks)
        self.watching += 1
        self.wake()
        try:
            while True:
                lines = [
                    line
                    for at, namespace, line in collection.events
                    if at > version and (not request.namespace or namespace == request.namespace)
                ]
                if query.get("allowWatchBookmarks") == "true":
                    lines += [line for number, line in collection.bookmarks if number >= marks]
                version, marks = collection.version, len(collection.bookmarks)
                changed = self._changed
                for line in lines:
                    if getattr(request, "cut", None) is not None:
                        # Half a line, and then the end of the connection in the middle of a chunk or after one.
                        await self._chunk(stream, line[: request.cut], None)
                        return
                    await self._chunk(stream, line, self.split)
                await changed.wait()
        finally:
            self.watching -= 1
            self.wake()

    async def _chunk(self, stream, data, size):
        for start in range(0, len(data), size or len(data)):
            piece = data[start : start + (size or len(data))]
            await stream.send_all(b"%x\r\n" % len(piece) + piece + b"\r\n")


class Publications:
    """A `Publisher` that keeps what it is told."""

    def __init__(self):
        self.services = {}
        self.calls = []
        self.problem = None
        self.problems = []
        self._changed = trio.Event()

    def replace(self, services):
        self.services = dict(services)
        self.calls.append(("replace", sorted(services)))
        self._wake()

    def update(self, service, instances):
        if instances is None:
            del self.services[service]
        else:
            self.services[service] = instances
        self.calls.append(("update", service))
        self._wake()

    def report(self, problem):
        self.problem = problem
        self.problems.append(problem)
        self._wake()

    def _wake(self):
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, predicate):
        """Wait for something that was published or reported."""
        with trio.fail_after(20):
            while not predicate():
                await self._changed.wait()


def show(services):
    """What is published, in full, as text: service → instances."""
    return {service: {_show(instance) for instance in instances.values()} for service, instances in services.items()}


def _show(instance):
    conditions = instance.conditions
    letters = "".join(
        letter
        for letter, on in (("r", conditions.ready), ("s", conditions.serving), ("t", conditions.terminating))
        if on
    )
    labels = " ".join(f"{name}={value}" for name, value in sorted(instance.labels.items()))
    return f"{instance.key}/{instance.key.protocol} {instance.key.port_name} {letters or '-'} {labels}"


@pytest.fixture(scope="session")
def authority():
    """A certificate authority of this run."""
    return trustme.CA()


@pytest.fixture
def kube(authority, tmp_path):
    """What the tests share: constants, helpers, and the authority's certificate as a file."""
    ca = tmp_path / "ca.crt"
    authority.cert_pem.write_to_path(str(ca))

    @asynccontextmanager
    async def serving(setup=None):
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

    def lines(name):
        return (DATA / name).read_bytes().splitlines(keepends=True)

    return SimpleNamespace(
        data=DATA,
        slices=SLICES,
        endpoints=ENDPOINTS,
        nodes=NODES,
        serving=serving,
        publications=Publications,
        show=show,
        lines=lines,
        ca=ca,
        ca_pem=authority.cert_pem.bytes(),
        authority=authority,
    )

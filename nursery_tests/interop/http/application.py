"""The ASGI application of the tests: it tells what it got, and speaks WebSocket and server-sent events."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from typing import Any

import trio

_done: defaultdict[bytes, trio.Event] = defaultdict(trio.Event)
"""By a page's query: its script is done. What the page waits for with an image, so that its load takes as long."""

PAGE = """<!doctype html>
<title>waiting</title>
<link rel="icon" href="data:,">
<ul id="log"></ul>
<script src="/page.js"></script>
<img src="/until-done?QUERY">
"""

SCRIPT = """
const log = text => {
  const item = document.createElement("li");
  item.textContent = text;
  document.getElementById("log").append(item);
};
const spoken = new Promise(done => {
  const socket = new WebSocket(`ws://${location.host}/ws`);
  const big = "x".repeat(200000);
  socket.onopen = () => { socket.send("hello"); socket.send(big); };
  socket.onmessage = event => {
    log(`socket said ${event.data.length > 100 ? event.data.length + " letters" : event.data}`);
    if (event.data === big) socket.close(1000, "enough");
  };
  socket.onclose = event => { log(`socket closed ${event.code} ${event.wasClean}`); done(); };
});
const heard = new Promise(done => {
  const source = new EventSource("/events");
  source.onmessage = event => {
    log(`event ${event.lastEventId} ${event.data}`);
    if (event.lastEventId === "6") { source.close(); done(); }
  };
});
const posted = fetch("/tell", {method: "POST", body: "y".repeat(300000)}).then(answer => answer.json()).then(
  told => log(`posted ${told.size}`));
const fetched = Promise.all([...Array(20).keys()].map(number => fetch(`/tell?${number}`).then(answer => answer.json())))
  .then(all => log(`fetched ${all.map(told => told.query).join(" ")}`));
Promise.all([spoken, heard, posted, fetched]).then(() => {
  log("all done");
  fetch("/done" + location.search, {method: "POST"});
});
"""


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
    if scope["type"] == "websocket":
        await _websocket(receive, send)
        return
    await {
        "/": _page,
        "/page.js": _script,
        "/events": _events,
        "/until-done": _until_done,
        "/done": _done_now,
        "/large": _large,
        "/slow": _slow,
    }.get(scope["path"], _tell)(scope, receive, send)


async def _websocket(receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message.get("text"), "bytes": message.get("bytes")})


async def _answer(send: Any, body: Any, kind: Any = b"text/plain", **more: Any) -> None:
    headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers, **more})
    await send({"type": "http.response.body", "body": body})


async def _page(scope: Any, receive: Any, send: Any) -> None:
    page = PAGE.replace("QUERY", scope["query_string"].decode())
    await _answer(send, page.encode(), b"text/html")


async def _script(scope: Any, receive: Any, send: Any) -> None:
    await _answer(send, SCRIPT.encode(), b"text/javascript")


async def _events(scope: Any, receive: Any, send: Any) -> None:
    """Three events, then the end of the response: a browser comes again by itself, and says where it was."""
    after = int(dict(scope["headers"]).get(b"last-event-id", b"0"))
    headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for number in range(after + 1, after + 4):
        text = f"retry: 10\nid: {number}\ndata: number {number}\n\n"
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await trio.sleep(0.01)
    await send({"type": "http.response.body", "body": b""})


async def _until_done(scope: Any, receive: Any, send: Any) -> None:
    await _done[scope["query_string"]].wait()
    await _answer(send, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"image/svg+xml")


async def _done_now(scope: Any, receive: Any, send: Any) -> None:
    _done[scope["query_string"]].set()
    await _answer(send, b"")


async def _large(scope: Any, receive: Any, send: Any) -> None:
    """As many bytes as the query says, without saying so before."""
    left = int(scope["query_string"])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while left:
        part = min(left, 65536)
        left -= part
        await send({"type": "http.response.body", "body": bytes(part), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _slow(scope: Any, receive: Any, send: Any) -> None:
    await trio.sleep(float(scope["query_string"]))
    await _answer(send, b"at last")


async def _tell(scope: Any, receive: Any, send: Any) -> None:
    """What came: the request as JSON."""
    size, digest = 0, hashlib.sha256()
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        digest.update(message.get("body", b""))
        if not message.get("more_body"):
            break
    told = {
        "method": scope["method"],
        "path": scope["path"],
        "query": scope["query_string"].decode(),
        "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]],
        "size": size,
        "sha256": digest.hexdigest(),
    }
    await _answer(send, json.dumps(told).encode(), b"application/json")

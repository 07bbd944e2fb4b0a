"""The discovery server's page that watches a service live, in a browser, over WebSocket with JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable

from meshlocal.app import html
from meshlocal.wire.discovery_methods import WATCH_INSTANCES
from meshlocal.wire.discovery_websocket import BEARER, JSON

_SCRIPT = """
"use strict";
const settings = JSON.parse(document.getElementById("settings").textContent);
const element = (id) => document.getElementById(id);
const state = {
  service: "", version: "", heard: false, unknown: false, instances: new Map(), socket: null, timer: 0, wait: 500,
};
const CHANGES_SHOWN = 20;

function say(text, good) {
  const place = element("state");
  place.textContent = text;
  place.className = good ? "good" : "bad";
}

function keyOf(endpoint) {
  return [endpoint.address, endpoint.port, endpoint.portName || "", endpoint.protocol || "tcp"].join(" ");
}

function nameOf(key) {
  const [address, port] = key.split(" ");
  return (address.includes(":") ? "[" + address + "]" : address) + ":" + port;
}

function condition(conditions) {
  const of = conditions || {};
  if (of.terminating) return of.serving === false ? "terminating" : "terminating, serving";
  return of.ready === false ? "not ready" : "ready";
}

function show(changed) {
  const rows = [...state.instances.entries()].sort((a, b) => a[0] < b[0] ? -1 : 1).map(([key, instance]) => {
    const labels = (instance.labels || {}).labels || {};
    const rest = Object.keys(labels).filter((name) => name !== "node").sort();
    const row = document.createElement("tr");
    for (const text of [
      nameOf(key),
      instance.endpoint.portName || "\\u2013",
      labels.node || "\\u2013",
      condition(instance.conditions),
      rest.map((name) => name + "=" + labels[name]).join(", ") || "\\u2013",
    ]) row.appendChild(document.createElement("td")).textContent = text;
    row.className = (changed.has(key) ? "changed " : "") + (condition(instance.conditions) === "ready" ? "" : "unfit");
    return row;
  });
  element("instances").replaceChildren(...rows);
  const size = state.instances.size;
  const count = state.unknown ? "no registry knows it" : size === 1 ? "1 instance" : size + " instances";
  element("count").textContent = state.service + ": " + (state.heard ? count : "nothing heard yet");
  element("table").hidden = size === 0;
}

function tell(added, changed, removed) {
  const words = [["new", added], ["changed", changed], ["gone", removed]]
    .filter(([word, keys]) => keys.length).map(([word, keys]) => word + ": " + keys.map(nameOf).sort().join(", "));
  if (!words.length) return;
  const line = document.createElement("li");
  line.textContent = new Date().toLocaleTimeString() + "  " + words.join("; ");
  element("changes").prepend(line);
  while (element("changes").children.length > CHANGES_SHOWN) element("changes").lastChild.remove();
  element("history").hidden = false;
}

function take(event) {
  const before = state.instances, text = (instance) => JSON.stringify(instance), was = state.heard;
  if (event.snapshot) {
    state.instances = new Map((event.snapshot.instances || []).map((each) => [keyOf(each.endpoint), each]));
    state.version = event.snapshot.version || "";
    state.unknown = event.snapshot.unknown === true;
  } else if (event.change) {
    state.instances = new Map(before);
    for (const endpoint of event.change.removed || []) state.instances.delete(keyOf(endpoint));
    for (const each of event.change.upserted || []) state.instances.set(keyOf(each.endpoint), each);
    state.version = event.change.version || "";
  } else if (event.heartbeat) {
    const pending = (event.heartbeat.pending || []).length > 0;
    say(pending ? "the registries are not in sync yet" : "live", !pending);
    silence(event.heartbeat.intervalMs * 3);
    return;
  } else {
    return;
  }
  state.heard = true;
  say("live", true);
  const now = state.instances, keys = [...now.keys()];
  const added = was ? keys.filter((key) => !before.has(key)) : [];
  const changed = keys.filter((key) => before.has(key) && text(before.get(key)) !== text(now.get(key)));
  tell(added, changed, [...before.keys()].filter((key) => !now.has(key)));
  show(new Set([...added, ...changed]));
}

function silence(limit) {
  clearTimeout(state.timer);
  state.timer = setTimeout(() => state.socket && state.socket.close(), limit);
}

function connect() {
  const protocols = [settings.subprotocol];
  const token = element("token") ? element("token").value : "";
  if (token) {
    const bytes = String.fromCharCode(...new TextEncoder().encode(token));
    protocols.push(settings.bearer + btoa(bytes).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", ""));
  }
  const host = location.hostname + ":" + settings.port;
  const socket = new WebSocket((settings.tls ? "wss://" : "ws://") + host + settings.path, protocols);
  state.socket = socket;
  silence(20000);
  socket.onopen = () => {
    state.wait = 500;
    socket.send(JSON.stringify({subscriptions: [{service: state.service, version: state.version}]}));
  };
  socket.onmessage = (message) => { if (state.socket === socket) take(JSON.parse(message.data)); };
  socket.onclose = (closed) => {
    if (state.socket !== socket) return;
    clearTimeout(state.timer);
    say("not connected" + (closed.reason ? ": " + closed.reason : "") + "; what is shown may be old", false);
    setTimeout(() => { if (state.socket === socket) connect(); }, state.wait);
    state.wait = Math.min(state.wait * 2, 15000);
  };
}

function watch(service) {
  const old = state.socket;
  state.socket = null;
  if (old) old.close();
  Object.assign(state, {
    service: service, version: "", heard: false, unknown: false, instances: new Map(), wait: 500,
  });
  element("changes").replaceChildren();
  element("history").hidden = true;
  location.hash = encodeURIComponent(service);
  say("connecting", false);
  show(new Set());
  connect();
}

element("choose").onsubmit = (event) => { event.preventDefault(); watch(element("service").value.trim()); };
window.onhashchange = () => {
  const named = decodeURIComponent(location.hash.slice(1));
  if (named && named !== state.service) { element("service").value = named; watch(named); }
};
const first = decodeURIComponent(location.hash.slice(1)) || element("service").value;
if (first) { element("service").value = first; if (!element("token")) watch(first); }
"""

_STYLE = """
[hidden] { display: none; } tr.unfit td { opacity: .6; } #changes { list-style: none; padding: 0; margin: 0; }
#changes li { font-variant-numeric: tabular-nums; white-space: pre-wrap; }
tr.changed td { animation: changed 3s; } @keyframes changed { from { background: #facc1566; } }
input { font: inherit; padding: .2rem .4rem; } form { margin: 1rem 0; display: flex; gap: .6rem; flex-wrap: wrap; }
button { font: inherit; padding: .2rem .8rem; }
"""


def watch_page(title: str, port: int | None, services: Iterable[str], *, tls: bool, token: bool) -> bytes:
    """The page.

    Args:
        title: of the page.
        port: of the WebSocket server; None if there is none.
        services: to choose from.
        tls: whether that server is served over TLS.
        token: whether it wants a token.
    """
    if port is None:
        missing = "No WebSocket server is configured: set discovery.websocket_bind, or --websocket-bind."
        return html.page(title, ["/"], [html.paragraph(html.bad(missing))])
    names = list(services)
    settings = {"port": port, "tls": tls, "path": WATCH_INSTANCES.path, "subprotocol": JSON, "bearer": BEARER}
    options = "".join(f'<option value="{html.text(name)}">' for name in names)
    token_field = '<input id="token" type="password" placeholder="token" autocomplete="off">' if token else ""
    parts = [
        html.Html(
            f'<style>{_STYLE}</style><form id="choose"><input id="service" list="services" placeholder="service"'
            f' value="{html.text(names[0]) if names else ""}"><datalist id="services">{options}</datalist>'
            f'{token_field}<button>watch</button></form><p>State: <span id="state">not connected</span></p>'
            '<h2 id="count"></h2><table id="table" hidden><thead><tr><th>Instance</th><th>Port name</th><th>Node</th>'
            '<th>State</th><th>Labels</th></tr></thead><tbody id="instances"></tbody></table>'
            '<div id="history" hidden><h2>Changes</h2><ul id="changes"></ul></div>'
        ),
        # In a script element nothing but its end tag is markup.
        html.Html(
            f'<script id="settings" type="application/json">{json.dumps(settings).replace("<", chr(92) + "u003c")}'
            f"</script><script>{_SCRIPT}</script>"
        ),
    ]
    return html.page(title, ["/", "/services"], parts)

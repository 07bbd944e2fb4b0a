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
const state = {service: "", version: "", unknown: false, instances: new Map(), socket: null, timer: 0, wait: 500};

function say(text, good) {
  const place = element("state");
  place.textContent = text;
  place.className = good ? "good" : "bad";
}

function keyOf(endpoint) {
  return [endpoint.address, endpoint.port, endpoint.portName || "", endpoint.protocol || "tcp"].join(" ");
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
      instance.endpoint.address + " : " + instance.endpoint.port,
      instance.endpoint.portName || "\\u2013",
      labels.node || "\\u2013",
      condition(instance.conditions),
      rest.map((name) => name + "=" + labels[name]).join(", ") || "\\u2013",
    ]) row.appendChild(document.createElement("td")).textContent = text;
    if (changed.has(key)) row.className = "changed";
    return row;
  });
  element("instances").replaceChildren(...rows);
  const count = state.unknown ? "no registry knows it" : state.instances.size + " instances";
  element("count").textContent = state.service + ": " + count;
}

function take(event) {
  const changed = new Set();
  if (event.snapshot) {
    const before = state.instances;
    state.instances = new Map((event.snapshot.instances || []).map((each) => [keyOf(each.endpoint), each]));
    for (const key of state.instances.keys()) if (state.version && !before.has(key)) changed.add(key);
    state.version = event.snapshot.version || "";
    state.unknown = event.snapshot.unknown === true;
  } else if (event.change) {
    for (const endpoint of event.change.removed || []) state.instances.delete(keyOf(endpoint));
    for (const each of event.change.upserted || []) {
      state.instances.set(keyOf(each.endpoint), each);
      changed.add(keyOf(each.endpoint));
    }
    state.version = event.change.version || "";
  } else if (event.heartbeat) {
    const pending = (event.heartbeat.pending || []).length > 0;
    say(pending ? "the registries are not in sync yet" : "live", !pending);
    silence(event.heartbeat.intervalMs * 3);
    return;
  }
  say("live", true);
  show(changed);
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
  Object.assign(state, {service: service, version: "", unknown: false, instances: new Map(), wait: 500});
  location.hash = encodeURIComponent(service);
  say("connecting", false);
  show(new Set());
  connect();
}

element("choose").onsubmit = (event) => { event.preventDefault(); watch(element("service").value.trim()); };
const first = decodeURIComponent(location.hash.slice(1)) || element("service").value;
if (first) { element("service").value = first; if (!element("token")) watch(first); }
"""

_STYLE = """
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
            '<h2 id="count"></h2><table><thead><tr><th>Instance</th><th>Port name</th><th>Node</th><th>State</th>'
            '<th>Labels</th></tr></thead><tbody id="instances"></tbody></table>'
        ),
        # In a script element nothing but its end tag is markup.
        html.Html(
            f'<script id="settings" type="application/json">{json.dumps(settings).replace("<", chr(92) + "u003c")}'
            f"</script><script>{_SCRIPT}</script>"
        ),
    ]
    return html.page(title, ["/", "/services"], parts)

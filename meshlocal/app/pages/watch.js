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
      instance.endpoint.portName || "\u2013",
      labels.node || "\u2013",
      condition(instance.conditions),
      rest.map((name) => name + "=" + labels[name]).join(", ") || "\u2013",
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

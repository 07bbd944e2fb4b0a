"use strict";
const element = (id) => document.getElementById(id);
const DASH = "\u2013", SAMPLES = 60, RATE_SECONDS = 5;
const state = { services: [], history: {}, told: {}, detail: null, chosen: "", source: null, retry: 0 };

const time = (seconds) => seconds == null ? "" : seconds < 1 ? (seconds * 1000).toFixed(1) + " ms" : seconds.toFixed(1) + " s";
const perSecond = (rate) => rate == null ? "" : rate === 0 ? "0" : rate < 10 ? rate.toFixed(1) : Math.round(rate).toString();
const failures = (row) => Object.entries(row.failures || {}).sort().map(([word, count]) => word + " " + count).join(", ");
const sum = (numbers) => numbers.reduce((all, each) => all + each, 0);

// How fast counts grow: what each was in the last seconds, looked at once a second.
class Rates {
  constructor() { this.kept = []; }
  note(counts) { this.kept.push(counts); if (this.kept.length > RATE_SECONDS + 1) this.kept.shift(); }
  of(name) {
    const now = this.kept[this.kept.length - 1], then = this.kept.find((each) => each.has(name));
    if (!now || !now.has(name) || now === then) return null;
    return Math.max(0, (now.get(name) - then.get(name)) / (this.kept.length - 1 - this.kept.indexOf(then)));
  }
}
const rates = { total: new Rates(), failed: new Rates(), instances: new Rates() };

// A table whose rows stay where they are as long as they mean the same: for who reads, selects, or has them focused.
class Grid {
  constructor(id, columns, keyOf, sorted) {
    this.table = element(id);
    this.columns = columns;
    this.keyOf = keyOf;
    this.rows = new Map();
    this.data = [];
    this.column = sorted === undefined ? null : columns[sorted];
    this.ascending = true;
    this.filter = element(id + "-filter");
    this.count = element(id + "-count");
    const head = this.table.createTHead().insertRow();
    for (const column of columns) {
      const cell = document.createElement("th");
      cell.scope = "col";
      if (column.number) cell.className = "number";
      if (this.filter) {
        const button = cell.appendChild(document.createElement("button"));
        button.type = "button";
        button.textContent = column.title;
        button.onclick = () => this.sort(column);
      } else {
        cell.textContent = column.title;
      }
      column.head = cell;
      head.append(cell);
    }
    this.body = this.table.createTBody();
    if (this.filter) this.filter.oninput = () => this.draw();
    this.mark();
  }
  sort(column) {
    this.ascending = this.column === column ? !this.ascending : !column.number;
    this.column = column;
    this.mark();
    this.draw();
  }
  mark() {
    for (const column of this.columns) {
      if (column === this.column) column.head.setAttribute("aria-sort", this.ascending ? "ascending" : "descending");
      else column.head.removeAttribute("aria-sort");
    }
  }
  set(data) { this.data = data; this.draw(); }
  draw() {
    const wanted = this.filter ? this.filter.value.trim().toLowerCase() : "";
    const text = (row) => this.columns.map((column) => (column.said || column.text)(row)).join(" ").toLowerCase();
    let shown = wanted ? this.data.filter((row) => text(row).includes(wanted)) : this.data;
    if (this.column) {
      const value = this.column.value || this.column.text, sign = this.ascending ? 1 : -1;
      const order = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", {numeric: true});
      shown = shown.map((row) => [value(row), row]).sort((a, b) => sign * order(a[0], b[0])).map((pair) => pair[1]);
    }
    const kept = new Map();
    let place = this.body.firstElementChild;
    shown.forEach((row, position) => {
      const key = this.keyOf(row, position);
      const line = this.rows.get(key) || this.make();
      kept.set(key, line);
      this.columns.forEach((column, index) => this.fill(line.cells[index], column, row));
      if (isChosen(this, row)) line.setAttribute("aria-current", "true"); else line.removeAttribute("aria-current");
      if (line === place) place = place.nextElementSibling; else this.body.insertBefore(line, place);
    });
    for (const [key, line] of this.rows) if (!kept.has(key)) line.remove();
    this.rows = kept;
    if (this.count) this.count.textContent = shown.length === this.data.length ? String(shown.length) : shown.length + " of " + this.data.length;
  }
  make() {
    const line = document.createElement("tr");
    for (const column of this.columns) {
      const cell = line.insertCell();
      cell.className = column.number ? "number" : column.long ? "long" : "";
    }
    return line;
  }
  fill(cell, column, row) {
    const text = String(column.text(row) ?? "");
    const bad = column.bad ? column.bad(row) : false;
    if (cell.told !== text) {
      cell.told = text;
      if (column.draw) column.draw(cell, row); else cell.textContent = text || DASH;
    }
    cell.classList.toggle("bad", Boolean(bad));
  }
}
const isChosen = (grid, row) => grid === grids.services && row.name === state.chosen;

// Bars of one height: how what ended in each ten seconds is divided.
function bars(samples, width, height, kind) {
  const space = "http://www.w3.org/2000/svg", step = width / SAMPLES;
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 " + width + " " + height);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("class", kind);
  svg.setAttribute("role", "img");
  const paths = ["", "", ""];
  samples.forEach((sample, index) => {
    const all = sum(sample), x = width - (samples.length - index) * step;
    let y = height;
    sample.forEach((count, part) => {
      const high = all ? height * count / all : 0;
      if (high) paths[part] += "M" + x.toFixed(2) + " " + y.toFixed(2) + "h" + step.toFixed(2) + "v" + (-high).toFixed(2) + "h" + (-step).toFixed(2) + "z";
      y -= high;
    });
  });
  ["near", "away", "failed"].forEach((name, part) => {
    const path = svg.appendChild(document.createElementNS(space, "path"));
    path.setAttribute("d", paths[part]);
    path.setAttribute("class", name);
  });
  svg.setAttribute("aria-label", shareText(samples));
  return svg;
}

const samplesOf = (service) => [...(state.history[service.name] || []), service.since];
const share = (samples) => {
  const near = sum(samples.map((each) => each[0])), away = sum(samples.map((each) => each[1]));
  return near + away ? near / (near + away) : null;
};
// A share is whole only if nothing is missing.
const shareText = (samples) => { const part = share(samples); return part === null ? "no request" : Math.floor(part * 100) + " % local"; };

function drawShare(cell, service) {
  const samples = samplesOf(service), part = share(samples);
  cell.replaceChildren(bars(samples.slice(-SAMPLES), 90, 16, "spark"), " " + (part === null ? DASH : Math.floor(part * 100) + " %"));
}
function drawName(cell, service) {
  const link = document.createElement("a");
  link.href = "#" + encodeURIComponent(service.name);
  link.textContent = service.name;
  cell.replaceChildren(link);
}

const of = (service, kind, place) => ((service.latency[kind] || {})[service.first] || [])[place];
const quantile = (service, place) => of(service, "response", place) ?? of(service, "connect", place);
const tiers = (service) => Object.entries(service.tiers).map(([tier, size]) => size + " " + tier).join(", ");
function health(row) {
  if (row.left_out) return row.left_out;
  if (row.state === "admitted") return row.failures_in_a_row ? row.failures_in_a_row + " failed in a row" : "admitted";
  const left = row.next_trial_in;
  return row.state + ": " + row.cause + (left == null ? "" : left > 0 ? ", tried again in " + Math.ceil(left) + " s" : ", tried again now");
}

const grids = {};
grids.services = new Grid("services", [
  {title: "Service", text: (row) => row.name, draw: drawName},
  {title: "Local share, 10 min", text: (row) => (state.told[row.name] || "") + row.since, said: (row) => shareText(samplesOf(row)), value: (row) => share(samplesOf(row)) ?? -1, draw: drawShare},
  {title: "Requests/s", number: true, text: (row) => perSecond(rates.total.of(row.name)), value: (row) => rates.total.of(row.name) ?? -1},
  {title: "Failed/s", number: true, text: (row) => perSecond(rates.failed.of(row.name)), value: (row) => rates.failed.of(row.name) ?? -1, bad: (row) => rates.failed.of(row.name) > 0},
  {title: "p50", number: true, text: (row) => time(quantile(row, 0)), value: (row) => quantile(row, 0) ?? -1},
  {title: "p99", number: true, text: (row) => time(quantile(row, 1)), value: (row) => quantile(row, 1) ?? -1},
  {title: "Open", number: true, text: (row) => row.open, value: (row) => row.open},
  {title: "Usable", text: (row) => row.state || tiers(row), bad: (row) => row.state},
  {title: "Ejected", number: true, text: (row) => row.ejected || "", value: (row) => row.ejected, bad: (row) => row.ejected},
], (row) => row.name, 0);
grids.instances = new Grid("instances", [
  {title: "Instance", text: (row) => row.instance},
  {title: "Node", text: (row) => row.node},
  {title: "Tier", text: (row) => row.tier},
  {title: "State", text: health, bad: (row) => row.left_out || row.state !== "admitted"},
  {title: "Under way", number: true, text: (row) => row.under_way, value: (row) => row.under_way},
  {title: "Attempts/s", number: true, text: (row) => perSecond(rates.instances.of(row.instance)), value: (row) => rates.instances.of(row.instance) ?? -1},
  {title: "Attempts", number: true, text: (row) => row.attempts, value: (row) => row.attempts},
  {title: "Failed", text: failures, value: (row) => sum(Object.values(row.failures || {})), bad: failures},
  {title: "Connect p50", number: true, text: (row) => time(row.connect?.p50), value: (row) => row.connect?.p50 ?? -1},
  {title: "Response p50", number: true, text: (row) => time(row.response?.p50), value: (row) => row.response?.p50 ?? -1},
  {title: "p99", number: true, text: (row) => time(row.response?.p99), value: (row) => row.response?.p99 ?? -1},
], (row) => row.instance);
grids.latency = new Grid("latency", [
  {title: "Tier", text: (row) => row.tier || "no instance"},
  {title: "Response p50", number: true, text: (row) => time(row.response[0])},
  {title: "p99", number: true, text: (row) => time(row.response[1])},
  {title: "Connect p50", number: true, text: (row) => time(row.connect[0])},
  {title: "p99", number: true, text: (row) => time(row.connect[1])},
], (row) => row.tier);
grids.requests = new Grid("requests", [
  {title: "To tier", text: (row) => row.tier},
  {title: "Outcome", text: (row) => row.outcome, bad: (row) => row.outcome !== "served"},
  {title: "Count", number: true, text: (row) => row.count},
  {title: "Why not the first", long: true, text: (row) => row.reason},
], (row) => [row.tier, row.reason, row.outcome].join(" "));
grids.recent = new Grid("recent", [
  {title: "Ended, UTC", text: (row) => row.time.slice(11, 23)},
  {title: "Request", text: (row) => row.method ? row.method + " " + row.path : row.protocol},
  {title: "Outcome", text: (row) => (row.status ? row.status + " " : "") + row.outcome, bad: (row) => row.outcome !== "served" || row.status >= 500},
  {title: "Took", number: true, text: (row) => time(row.seconds)},
  {title: "Went to", text: (row) => row.instance ? row.instance + (row.node ? " on " + row.node : "") : ""},
  {title: "Why there", text: (row) => [row.reason, row.error].filter(Boolean).join(", ")},
  {title: "What failed before", long: true, text: (row) => (row.failed || []).map((each) => each.instance + " " + each.error + " after " + time(each.seconds)).join("; ")},
], (row, position) => String(position));
grids.plan = new Grid("plan", [
  {title: "Step", number: true, text: (row) => row.step},
  {title: "Instance", text: (row) => row.instance},
  {title: "Node", text: (row) => row.node},
  {title: "Tier", text: (row) => row.tier},
  {title: "Why so late", long: true, text: (row) => row.passed_over || (row.last_resort ? "terminating, and serves still" : row.reason)},
], (row) => String(row.step));

function fact(list, name, text, bad) {
  const title = list.appendChild(document.createElement("dt")), value = list.appendChild(document.createElement("dd"));
  title.textContent = name;
  value.textContent = text;
  if (bad) value.className = "bad";
}
function drawDetail() {
  const detail = state.detail, brief = state.services.find((each) => each.name === state.chosen);
  element("detail").hidden = !detail || !brief;
  if (!detail || !brief) return;
  element("detail-title").textContent = "Service " + detail.name;
  element("detail-state").textContent = detail.state;
  element("detail-state").hidden = !detail.state;
  element("plan-link").href = "/explain?service=" + encodeURIComponent(detail.name);
  const list = document.createElement("dl");
  fact(list, "now", brief.open + " connections open, " + brief.connecting + " clients waiting");
  fact(list, "usable", tiers(brief) || "none", !sum(Object.values(brief.tiers)));
  fact(list, "spoken to", detail.spoken, detail.doubtful);
  if (detail.version) fact(list, "version", detail.version);
  if (detail.known > detail.instances.length) fact(list, "shown", "the first " + detail.instances.length + " of " + detail.known + " instances; /services has all");
  element("detail-facts").replaceChildren(...list.children);
  const samples = samplesOf(brief).slice(-SAMPLES), told = JSON.stringify(samples);
  if (element("chart").told !== told) {
    element("chart").told = told;
    element("chart").replaceChildren(bars(samples, 600, 84, "chart"));
  }
  const kinds = brief.latency, seen = new Set([...Object.keys(kinds.response || {}), ...Object.keys(kinds.connect || {})]);
  grids.latency.set([...seen].sort().map((tier) => ({tier, response: (kinds.response || {})[tier] || [], connect: (kinds.connect || {})[tier] || []})));
  grids.instances.set(detail.instances);
  grids.requests.set(detail.requests);
  grids.recent.set(detail.recent);
  grids.plan.set(detail.plan);
}

let due = false;
function draw() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => { due = false; grids.services.set(state.services); drawDetail(); });
}
// Once a second, also while nothing is told: what stands still has a rate of nothing.
setInterval(() => {
  rates.total.note(new Map(state.services.map((each) => [each.name, each.near + each.away + each.failed])));
  rates.failed.note(new Map(state.services.map((each) => [each.name, each.failed])));
  rates.instances.note(new Map((state.detail ? state.detail.instances : []).map((each) => [each.instance, each.attempts])));
  draw();
}, 1000);

function say(text, good) {
  if (element("status").textContent !== text) element("status").textContent = text;
  element("status").className = good ? "good" : "bad";
}
function take(message) {
  const part = JSON.parse(message.data);
  say("live", true);
  if (part.part === "proxy") {
    element("facts").innerHTML = part.facts;
  } else if (part.part === "services") {
    state.services = part.services;
    if (!state.chosen && state.services.length) choose(state.services.map((each) => each.name).sort()[0]);
  } else if (part.part === "history") {
    state.history = part.services;
    // By this it is seen whether a bar is to be drawn anew; those of a service that nobody uses are all the same.
    state.told = {};
    for (const [name, samples] of Object.entries(part.services)) if (samples.some(sum)) state.told[name] = JSON.stringify(samples);
  } else if (part.part === "detail" && part.name === state.chosen) {
    state.detail = part;
  }
  draw();
}
function connect() {
  clearTimeout(state.retry);
  if (state.source) state.source.close();
  const asked = new URLSearchParams(location.search);
  if (state.chosen) asked.set("service", state.chosen);
  const source = state.source = new EventSource("/live/events?" + asked);
  source.onmessage = take;
  source.addEventListener("problem", (message) => say(message.data + "; what is shown may be old", false));
  source.onerror = () => {
    say("not connected; what is shown may be old", false);
    // A browser tries again by itself after a cut, and not after a refusal.
    if (source.readyState === EventSource.CLOSED) state.retry = setTimeout(connect, 2000);
  };
}
function choose(name) {
  state.chosen = name;
  state.detail = null;
  rates.instances = new Rates();
  connect();
  draw();
}
window.onhashchange = () => choose(decodeURIComponent(location.hash.slice(1)));
state.chosen = decodeURIComponent(location.hash.slice(1));
connect();

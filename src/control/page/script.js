"use strict";
// Everything shown comes as text (textContent, setAttribute), never as markup: paths and causes are others' words.
const SVG = "http://www.w3.org/2000/svg";
const ALWAYS = ["read", "write", "flush"];
const NOT_OPERATIONAL = ["poisoned", "primary-gone", "hung", "away"];
const EVENTS_SHOWN = 100, HISTORY = 60, TIMEOUT = 5000, SURFACE_PAUSE = 5000;
const $ = (id) => document.getElementById(id);
const wide = matchMedia("(min-width: 40rem)");

let volume = null, after = 0, run = "", before = null, isPaused = false, timer = 0, turn = 0, surfaceDue = 0;
let events = [], history = {}, shown = null, at = 0, goneSince = null;

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function drawn(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function others(text) {
  return element("bdi", String(text));
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) { count /= 1024; unit += 1; }
  return `${Math.floor(count * 10) / 10} ${units[unit]}`;
}

function time(ns) {
  if (ns === null || ns === undefined) return "–";
  if (ns < 1e3) return `${ns} ns`;
  if (ns < 1e6) return `${(ns / 1e3).toFixed(1)} µs`;
  if (ns < 1e9) return `${(ns / 1e6).toFixed(1)} ms`;
  return `${(ns / 1e9).toFixed(1)} s`;
}

function span(seconds) {
  const parts = [[Math.floor(seconds / 86400), "d"], [Math.floor(seconds / 3600) % 24, "h"],
    [Math.floor(seconds / 60) % 60, "m"], [Math.floor(seconds) % 60, "s"]];
  const first = parts.findIndex(([count]) => count > 0);
  return first < 0 ? "0s" : parts.slice(first, first + 2).map(([count, unit]) => count + unit).join(" ");
}

const number = (count) => Number(count).toLocaleString("en", { maximumFractionDigits: count < 100 ? 1 : 0 });

function healthClass(state) {
  return state === "OK" ? "ok" : state === "WATCH" ? "watch" : "bad";
}

async function ask(route, query) {
  const words = new URLSearchParams(query || {});
  if (volume !== null) words.set("volume", volume);
  const answer = await fetch(`${route}?${words}`, { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT) });
  const said = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
  if (answer.ok) return said;
  // What only an open volume says.
  if (answer.status === 409) return null;
  throw new Error(said.error);
}

async function poll() {
  clearTimeout(timer);
  turn += 1;
  const mine = turn;
  try {
    const ping = await ask("v1/ping");
    if (volume === null) volume = ping.volumes[0];
    const started = performance.now();
    const [status, stats, health, page] = await Promise.all([ask("v1/status"), ask("v1/stats"), ask("v1/health"),
      ask("v1/events", { after })]);
    const taken = performance.now();
    const surface = started >= surfaceDue ? await ask("v1/surface", { cells: 1024 }) : null;
    // Another volume was chosen meanwhile.
    if (mine !== turn) return;
    // It costs the server a walk over its map: a twentieth of the time at most.
    if (surface) surfaceDue = performance.now() + Math.max(SURFACE_PAUSE, 20 * (performance.now() - taken));
    show(ping, status, stats, health, surface, page, taken);
    goneSince = null;
    $("gone").textContent = "";
    document.documentElement.classList.remove("stale");
  } catch (error) {
    if (mine !== turn) return;
    goneSince = goneSince || new Date();
    const why = error instanceof TypeError || error.name === "TimeoutError" ? "it does not answer" : error.message;
    $("gone").textContent = `No news from the server since ${goneSince.toLocaleTimeString()}: ${why}. ` +
      "What is below is old; this page goes on asking.";
    document.documentElement.classList.add("stale");
    before = null;
  }
  if (!isPaused) timer = setTimeout(poll, Number($("interval").value));
}

function show(ping, status, stats, health, surface, page, taken) {
  showHead(ping, status);
  showHealth(status, health);
  const rates = before && before.stats.started === stats.started ? between(before, stats, taken) : null;
  before = { stats, taken };
  showLoad(stats, rates);
  showLatency(stats, rates);
  showDevices(status);
  showBlocks(status.blocks);
  if (surface) showSurface(surface);
  showScanner(status.scan);
  showEvents(page);
}

function showHead(ping, status) {
  $("name").textContent = volume;
  document.title = `${volume}: ${status.state.join(", ")} – vhost-remap`;
  const isOk = status.state.join() === "ok";
  $("state").textContent = status.state.join(", ");
  $("state").className = "badge " +
    (isOk ? "ok" : status.state.some((state) => NOT_OPERATIONAL.includes(state)) ? "bad" : "watch");
  $("health").textContent = status.health ? `${status.health} ${status.health_score}` : "unknown";
  $("health").className = "badge " + (status.health ? healthClass(status.health) : "");
  $("connected").textContent = status.connected ? "Front-end connected" : "No front-end connected";
  $("server").textContent = `vhost-remap ${status.version}, up ${span(status.uptime_seconds)}, ` +
    `${bytes(status.capacity_sectors * 512)}, ${status.io_engine}, cache ${status.cache}`;
  $("volumes").hidden = ping.volumes.length < 2;
  const options = [...$("volume").options].map((option) => option.value);
  if (options.join("\n") !== ping.volumes.join("\n")) {
    $("volume").replaceChildren(...ping.volumes.map((name) => new Option(name, name)));
    $("volume").value = volume;
  }
}

function showHealth(status, health) {
  $("messages").replaceChildren(...status.messages.map((message) => {
    const item = element("li", undefined, "bad");
    item.append(others(message));
    return item;
  }));
  const findings = health ? health.findings : [];
  $("findings").replaceChildren(...findings.map((found) => {
    const item = element("li");
    item.append(element("strong", `${found.state}, ${found.device}: ${found.rule}`, healthClass(found.state)),
      ` – ${number(found.value)} ${found.what} (from ${number(found.limit)} on); `,
      element("span", found.advice, "advice"));
    return item;
  }));
  if (!health) {
    $("score").textContent = "The volume is not open here.";
    $("trend").textContent = "";
    return;
  }
  const taken = health.score.deductions.map((part) => `${part.points} for ${part.input} (${number(part.value)})`);
  $("score").textContent = `Score ${health.score.value} of 100 (${health.score.word})` +
    (taken.length ? `: less ${taken.join(", ")}` : "") +
    (findings.length ? "." : ". No rule holds: nothing to do.");
  $("trend").textContent = `Spare: ${health.trend.summary}`;
}

function quantile(old, now, percent) {
  const counted = new Map(old.buckets.map((bucket) => [bucket.le_ns, bucket.count]));
  const counts = now.buckets.map((bucket) => [bucket.le_ns, bucket.count - (counted.get(bucket.le_ns) || 0)]);
  const rank = Math.max(1, Math.ceil(counts.reduce((sum, [, count]) => sum + count, 0) * percent / 100));
  let below = 0;
  const found = counts.find(([, count]) => (below += count) >= rank);
  return found ? Math.min(found[0] === null ? now.max_ns : found[0], now.max_ns) : null;
}

function between(old, stats, taken) {
  const seconds = (taken - old.taken) / 1000, rates = {};
  for (const now of stats.operations) {
    const then = old.stats.operations.find((operation) => operation.operation === now.operation);
    if (!then || seconds <= 0 || now.completed < then.completed) return null;
    rates[now.operation] = {
      requests: (now.completed - then.completed) / seconds, bytes: Math.max(0, now.bytes - then.bytes) / seconds,
      p50: quantile(then.latency, now.latency, 50), p99: quantile(then.latency, now.latency, 99),
    };
  }
  return rates;
}

function spark(values, label) {
  const most = Math.max(1e-9, ...values), step = 100 / (Math.max(values.length, 20) - 1);
  const start = 100 - (values.length - 1) * step;
  const points = values.map((value, i) => `${(start + i * step).toFixed(2)},${(38 - 36 * value / most).toFixed(2)}`);
  const svg = drawn("svg", { class: "spark", viewBox: "0 0 100 40", preserveAspectRatio: "none", role: "img",
    "aria-label": label });
  if (values.length > 1) {
    svg.append(drawn("polygon", { points: `${start.toFixed(2)},38 ${points.join(" ")} 100,38` }),
      drawn("polyline", { points: points.join(" ") }));
  }
  return svg;
}

function usedOnes(stats) {
  return stats.operations.filter((now) => ALWAYS.includes(now.operation) || now.completed > 0);
}

function showLoad(stats, rates) {
  $("load").replaceChildren(...usedOnes(stats).map(({ operation }) => {
    const card = element("div", undefined, "card"), rate = rates && rates[operation];
    const values = history[operation] || (history[operation] = []);
    if (rate) values.push(rate.requests);
    if (values.length > HISTORY) values.shift();
    const most = values.length ? number(Math.max(...values)) : "–";
    card.append(element("h3", operation),
      element("div", rate ? `${number(rate.requests)} IOPS` : "– IOPS", "now"),
      element("div", operation === "flush" ? "\u00a0" : rate ? `${bytes(rate.bytes)}/s` : "–", "quiet"),
      spark(values, `${operation}: requests a second over time, at most ${most}`),
      element("div", `lately at most ${most}`, "quiet"));
    return card;
  }));
}

// Narrow screens stack the cells: roles and labels stay what they are in a table.
function labelled(cell, role, table, place) {
  cell.setAttribute("role", role);
  cell.dataset.label = document.querySelector(`#${table}`).parentElement.tHead.rows[0].cells[place].textContent;
  return cell;
}

function row(table, head, cells) {
  const made = element("tr"), name = element("th");
  made.setAttribute("role", "row");
  name.scope = "row";
  name.append(others(head));
  made.append(labelled(name, "rowheader", table, 0));
  cells.forEach(([text, className], i) => {
    const cell = element("td", undefined, className);
    cell.append(others(text));
    made.append(labelled(cell, "cell", table, i + 1));
  });
  return made;
}

const trouble = (count) => [number(count), count > 0 ? "bad" : ""];

function showLatency(stats, rates) {
  $("latency").replaceChildren(...usedOnes(stats).map((now) => {
    const rate = (rates && rates[now.operation]) || {}, latency = now.latency;
    return row("latency", now.operation, [[time(rate.p50)], [time(rate.p99)], [time(latency.p50_ns)],
      [time(latency.p99_ns)], [time(latency.p999_ns)], [now.completed ? time(latency.max_ns) : "–"],
      [number(now.in_flight)], [number(now.completed)], trouble(now.failed)]);
  }));
}

function showDevices(status) {
  $("devices").replaceChildren(...status.devices.map((device) => row("devices", device.role, [
    [device.state, device.state === "up" ? "ok" : "bad"], [bytes(device.size)], trouble(device.read_errors),
    trouble(device.write_errors), trouble(device.flush_errors), [device.path, "left"]])));
}

function numbers(list) {
  return list.map(([name, count, className]) => {
    const made = element("div");
    made.append(element("dt", name), element("dd", number(count), count > 0 ? className : ""));
    return made;
  });
}

function showBlocks(blocks) {
  const share = blocks.remaps_max ? blocks.remapped / blocks.remaps_max : 0;
  $("used").value = share;
  const percent = share > 0 && share < 0.001 ? "< 0.1" : (100 * share).toFixed(1);
  $("used-text").textContent = `${number(blocks.remapped)} of ${number(blocks.remaps_max)} (${percent} %)`;
  $("blocks").replaceChildren(...numbers([["remapped", blocks.remapped, ""], ["pending", blocks.pending, "watch"],
    ["lost sectors", blocks.lost_sectors, "bad"], ["in doubt", blocks.in_doubt, "bad"],
    ["slots free", blocks.slots_free, ""], ["slots retired", blocks.slots_retired, "watch"]]));
}

// Of stretches of cells, which come in order.
function isUnscanned(index) {
  return shown.not_scanned.some(([first, count]) => first <= index && index < first + count);
}

// The worst of what is marked in a cell.
function worst(cell) {
  return ["lost", "pending", "remapped", "slow"].find((kind) => cell?.[kind]) ?? "";
}

function told(index) {
  const first = index * shown.sectors_per_cell, cell = shown.marks.get(index);
  const last = Math.min(first + shown.sectors_per_cell, shown.capacity_sectors) - 1;
  const unknown = isUnscanned(index) ? "not scanned yet" : "nothing known";
  const known = cell ? `${number(cell.lost)} lost sectors, ${number(cell.pending)} pending, ` +
    `${number(cell.remapped)} remapped and ${number(cell.slow)} slow blocks, from ${cell.first} to ` +
    `${cell.last}` : unknown;
  return `Sectors ${first} to ${last}: ${known}`;
}

function showSurface(surface) {
  const columns = wide.matches ? 64 : 32, svg = $("surface");
  const isSame = shown && shown.cells === surface.cells && shown.columns === columns;
  shown = { ...surface, columns, marks: new Map(surface.marked.map((cell) => [cell.cell, cell])) };
  $("scale").textContent = `${surface.capacity_sectors} sectors, ${surface.sectors_per_cell} ` +
    `(${bytes(surface.sectors_per_cell * 512)}) a cell; ${surface.marked.length} of ${surface.cells} cells have ` +
    "trouble. The worst of a cell is shown.";
  if (!isSame) {
    const rows = Math.ceil(surface.cells / columns);
    at = Math.min(at, Math.max(0, surface.cells - 1));
    svg.setAttribute("viewBox", `-2 -2 ${columns * 12 + 3} ${rows * 12 + 3}`);
    svg.setAttribute("aria-rowcount", rows);
    svg.setAttribute("aria-colcount", columns);
    svg.replaceChildren(...Array.from({ length: rows }, (_, y) => {
      const group = drawn("g", { role: "row" });
      const inRow = Math.min(columns, surface.cells - y * columns);
      group.append(...Array.from({ length: inRow }, (_, x) => drawn("rect", { x: x * 12, y: y * 12, width: 11,
        height: 11, role: "gridcell", tabindex: -1, "data-cell": y * columns + x })));
      return group;
    }));
  }
  for (const rect of svg.querySelectorAll("rect")) {
    const index = Number(rect.dataset.cell);
    rect.setAttribute("class", worst(shown.marks.get(index)) || (isUnscanned(index) ? "unscanned" : "fine"));
    rect.setAttribute("aria-label", told(index));
    rect.setAttribute("tabindex", index === at ? 0 : -1);
  }
}

function cellAt(index) {
  return $("surface").querySelector(`rect[data-cell="${index}"]`);
}

function go(to) {
  const next = Math.max(0, Math.min(to, shown.cells - 1));
  cellAt(at).setAttribute("tabindex", -1);
  at = next;
  cellAt(at).setAttribute("tabindex", 0);
  cellAt(at).focus();
}

function onSurfaceKey(event) {
  if (!shown || event.altKey || event.ctrlKey || event.metaKey) return;
  const { columns, marks } = shown, marked = [...marks.keys()].sort((a, b) => a - b);
  const steps = {
    ArrowLeft: () => at - 1, ArrowRight: () => at + 1,
    ArrowUp: () => (at >= columns ? at - columns : at),
    ArrowDown: () => (at + columns < shown.cells ? at + columns : at),
    Home: () => at - at % columns, End: () => at - at % columns + columns - 1,
    PageDown: () => marked.find((cell) => cell > at) ?? at, PageUp: () => marked.findLast((cell) => cell < at) ?? at,
  };
  if (!Object.hasOwn(steps, event.key)) return;
  event.preventDefault();
  go(steps[event.key]());
}

function showScanner(scan) {
  const bar = $("scan-progress");
  bar.hidden = true;
  $("found").replaceChildren();
  if (!scan || typeof scan !== "object") {
    $("scan-text").textContent = "This server says nothing of a scanner.";
    return;
  }
  const parts = [String(scan.state ?? "unknown")];
  if (scan.pass > 0) parts.push(`pass ${number(scan.pass)}`);
  if (scan.speed_now > 0 || scan.speed_average > 0) {
    parts.push(`${bytes(scan.speed_now || 0)}/s (average ${bytes(scan.speed_average || 0)}/s)`);
  }
  if (Number.isFinite(scan.eta_seconds)) parts.push(`${span(scan.eta_seconds)} to go`);
  if (scan.pass > 0 && Number.isFinite(scan.percent)) {
    parts.splice(2, 0, `${scan.percent.toFixed(1)} %`);
    bar.hidden = false;
    $("scan-bar").value = Math.max(0, Math.min(100, scan.percent));
  }
  $("scan-text").textContent = parts.join(", ");
  const found = Object.entries(scan.found || {}).filter(([, count]) => typeof count === "number");
  $("found").replaceChildren(...numbers(found.map(([name, count]) => [name, count, name === "lost" ? "bad" : ""])));
}

function showEvents(page) {
  if (run !== page.run) {
    const isAnew = after > 0;
    [run, after, events] = [page.run, 0, []];
    // The numbers began anew: what was asked for with the old ones is not all.
    if (isAnew) return;
  }
  after = Math.max(after, page.last_seq);
  events = [...page.events.reverse(), ...events].slice(0, EVENTS_SHOWN);
  const dropped = page.dropped ? `${number(page.dropped)} events were dropped because the log was full. ` : "";
  $("dropped").textContent = dropped + (events.length ? "Newest first." : "Nothing has happened.");
  if (!page.events.length && $("events").childElementCount === events.length) return;
  $("events").replaceChildren(...events.map((event) => {
    const item = element("li"), when = element("time"), date = new Date(event.time * 1000);
    const level = { error: "bad", warn: "watch" }[event.severity];
    when.dateTime = Number.isNaN(date.getTime()) ? "" : date.toISOString();
    when.textContent = when.dateTime ? `${when.dateTime.slice(0, 10)} ${when.dateTime.slice(11, 19)}Z` : "–";
    const place = [event.device, event.sector === null || event.sector === undefined ? "" :
      event.sectors > 1 ? `${event.sector}-${event.sector + event.sectors - 1}` : String(event.sector)];
    const text = [place.filter(Boolean).join(" "), event.cause, event.action].filter(Boolean).join(": ");
    item.append(when, element("span", `${event.severity} ${event.kind}`, `kind ${level || ""}`), others(text));
    return item;
  }));
}

function choose(name) {
  [volume, after, run, before, surfaceDue, events, history, shown] = [name, 0, "", null, 0, [], {}, null];
  $("events").replaceChildren();
  $("surface").replaceChildren();
  poll();
}

$("volume").addEventListener("change", () => choose($("volume").value));
$("interval").addEventListener("change", () => { if (!isPaused) poll(); });
$("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  $("pause").setAttribute("aria-pressed", isPaused);
  $("pause").textContent = isPaused ? "Paused: go on" : "Pause";
  before = null;
  if (isPaused) { turn += 1; clearTimeout(timer); } else poll();
});
$("surface").addEventListener("keydown", onSurfaceKey);
for (const kind of ["focusin", "pointerover"]) {
  $("surface").addEventListener(kind, ({ target }) => {
    if (target.dataset.cell !== undefined && shown) $("cell").textContent = told(Number(target.dataset.cell));
  });
}
$("surface").addEventListener("click", (event) => {
  if (event.target.dataset.cell !== undefined && shown) go(Number(event.target.dataset.cell));
});
wide.addEventListener("change", () => { surfaceDue = 0; });
$("door").textContent = document.documentElement.dataset.door === "http"
  ? `Read at ${location.host}, which serve --http-listen opened: whoever reaches it may read, and no orders are ` +
    "taken here."
  : "Read over the control socket.";
poll();

/* The page's life: takes the view from the event stream and puts it in place, as text only. */
"use strict";

const $ = (id) => document.getElementById(id);
const NONE = "–";

/* The same forms as coordinator/view.py, so that nothing jumps when the first frame arrives. */
const show = {
  text: (value) => value,
  length: (value) => String(value.length),
  whole: (value) => (value === null ? NONE : Math.round(value).toLocaleString("en")),
  decimal: (value) => (value === null ? NONE : value.toFixed(3)),
  pace: (value) => (value !== null && value < 10 ? value.toFixed(1) : show.whole(value)),
  percent: (value) => (value === null ? NONE : `${Math.round(100 * value)} %`),
  bytes: (value) => show.compact(value, "B"),
  compact(value, unit = "") {
    if (value === null) return NONE;
    const [scale, prefix] = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]
      .find(([size]) => Math.abs(value) >= size) ?? [1, ""];
    const scaled = value / scale;
    const digits = scale === 1 && Number.isInteger(value) ? 0
      : Math.max(0, 2 - Math.floor(Math.log10(Math.max(Math.abs(scaled), 1))));
    return `${scaled.toFixed(digits)} ${prefix}${unit}`.trimEnd();
  },
  ago(seconds) {
    if (seconds === null) return NONE;
    for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]])
      if (seconds >= 2 * size) return `${Math.round(seconds / size)} ${unit} ago`;
    return seconds < 2 ? "now" : `${Math.round(seconds)} s ago`;
  },
};

function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function make(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const bound = ["text", "length", "whole", "decimal", "bytes", "compact"].flatMap((form) =>
  [...document.querySelectorAll(`[data-${form}]`)].map((element) => ({
    element, form, path: element.dataset[form].split("."),
  })));

function moment(ms) {
  const time = ms === null ? new Date(NaN) : new Date(ms);
  return Number.isNaN(time.getTime()) ? null : time;
}

function nodeCells(node) {
  const cell = (label, text, numeric = true) =>
    make("td", { role: "cell", "data-label": label, ...(numeric && { class: "n" }) }, text);
  const state = cell("State", make("bdi", {}, node.activity), false);
  if (node.held) state.append(" ", make("small", { class: "held" }, make("bdi", {}, node.held)));
  return [
    make("th", { role: "rowheader", scope: "row" }, make("bdi", {}, node.name || "unnamed"), " ", make("code", {}, node.node)),
    state,
    cell("Round", show.whole(node.round)),
    cell("Tokens/s", show.whole(node.tokens_per_second)),
    cell("Busy", show.percent(node.busy_share)),
    cell("Credit", show.compact(node.credit_tokens)),
    cell("Seen", show.ago(node.last_seen_s)),
  ];
}

function eventItem(event) {
  const time = moment(event.ms);
  const stamp = make("time", time ? { datetime: time.toISOString(), title: time.toISOString() } : {},
    time ? time.toLocaleTimeString([], { hourCycle: "h23" }) : "");
  return make("li", {}, stamp, " ", make("bdi", {}, event.text));
}

/* The same words as coordinator/view.py. */
function turned({ from, to }) {
  return from === to ? `Round ${show.whole(to)}: a new roster, nothing undone.`
    : `Back from round ${show.whole(from)} to ${show.whole(to)}.`;
}

function rollbackItem(rollback) {
  const time = moment(rollback.ms);
  const stamp = make("time", time ? { datetime: time.toISOString(), title: time.toISOString() } : {},
    time ? time.toLocaleString([], { dateStyle: "medium", timeStyle: "short" }) : "");
  const words = make("span", {}, make("bdi", {}, turned(rollback)));
  if (rollback.reason) words.append(" ", make("q", {}, make("bdi", {}, rollback.reason)));
  return make("li", {}, stamp, " ", words);
}

let eventsShown = "";
let rollbacks = [];
let rollbacksShown = "";

function draw(view) {
  for (const { element, form, path } of bound)
    put(element, show[form](path.reduce((value, key) => value[key], view)));
  $("goal").hidden = !view.run.rounds_goal;
  $("more").hidden = view.nodes_total <= view.nodes.length;
  $("no-sample").hidden = view.sample !== "";
  if (view.nodes.length)
    $("nodes").replaceChildren(...view.nodes.map((node) =>
      make("tr", { role: "row", ...(!node.rostered && { class: "off" }) }, ...nodeCells(node))));
  const events = JSON.stringify(view.events);
  if (view.events.length && events !== eventsShown) {
    $("events").replaceChildren(...view.events.map(eventItem));
    eventsShown = events;
  }
  const turns = JSON.stringify(view.rollbacks);
  if (turns !== rollbacksShown) {
    rollbacks = view.rollbacks;
    rollbacksShown = turns;
    $("rollbacks").replaceChildren(...rollbacks.map(rollbackItem));
    $("rollbacks").hidden = !rollbacks.length;
    plot?.redraw();
  }
  $("chart").setAttribute("aria-label", `Held-out loss ${show.decimal(view.loss.heldout)}, from ` +
    `${show.decimal(view.loss.heldout_first)}, after ${show.compact(view.run.tokens)} tokens`);
}

/* ---- the curve ---- */

let plot = null;
let points = [[], [], []];
let rounds = []; // of each point

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/* A dashed line where each rollback left the curve: what came after it then is undone. */
function drawTurns({ ctx, bbox, valToPos }) {
  ctx.save();
  ctx.strokeStyle = colour("--warn");
  ctx.lineWidth = 1.5 * devicePixelRatio;
  ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
  for (const { to } of rollbacks) {
    const last = rounds.findLastIndex((round) => round !== null && to !== null && round <= to);
    if (last < 0) continue;
    const x = Math.round(valToPos(points[0][last], "x", true));
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
  }
  ctx.restore();
}

function drawChart() {
  const box = $("chart");
  if (points[0].length < 2) return;
  const wide = Math.max(200, box.clientWidth);
  if (plot) {
    plot.setSize({ width: wide, height: 260 });
    plot.setData(points);
    return;
  }
  const axis = { stroke: colour("--soft"), font: "12px system-ui", grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
  const series = (label, name, width) => ({
    label, stroke: colour(name), width, spanGaps: true, points: { show: false },
    value: (_, value) => show.decimal(value ?? null),
  });
  const options = {
    width: wide, height: 260, padding: [8, 8, 0, 0],
    scales: { x: { time: false } },
    cursor: { y: false, drag: { x: false, y: false } },
    legend: { live: true },
    hooks: { drawClear: [drawTurns] },
    axes: [
      { ...axis, space: 70, values: (_, ticks) => ticks.map((tick) => show.compact(tick).replace(/\.0+(?= |$)/, "")) },
      { ...axis, size: 44, values: (_, ticks) => ticks.map((tick) => String(Number(tick.toFixed(4)))) },
    ],
    series: [
      { label: "Tokens", value: (_, value) => show.compact(value ?? null) },
      series("Held-out", "--heldout", 2.5),
      series("Train", "--train", 1.5),
    ],
  };
  box.replaceChildren();
  plot = new uPlot(options, points, box);
}

function redrawChart() {
  plot?.destroy();
  plot = null;
  drawChart();
}

async function loadHistory() {
  const answer = await fetch("/api/v1/history");
  if (!answer.ok) return;
  const { rows, rounds_per_hour: pace } = await answer.json();
  put($("pace"), show.pace(pace));
  const drawn = rows.filter((row) => row.tokens !== null && (row.heldout !== null || row.train !== null));
  drawn.sort((left, right) => left.tokens - right.tokens);
  rounds = drawn.map((row) => row.round);
  points = [drawn.map((row) => row.tokens), drawn.map((row) => row.heldout), drawn.map((row) => row.train)];
  drawChart();
}

/* A new round brings a new row; asking at most every 3 s keeps a fast demo from asking for ever. */
let roundLoaded = null;
let loading = false;

async function followHistory(round) {
  if (loading || round === roundLoaded) return;
  loading = true;
  roundLoaded = round;
  try {
    await loadHistory();
  } catch {
    roundLoaded = null;
  }
  setTimeout(() => { loading = false; }, 3000);
}

/* ---- the stream ---- */

function link(state, text) {
  $("live").dataset.link = state;
  put($("live-text"), text);
}

const stream = new EventSource("/api/v1/events");
stream.addEventListener("view", (event) => {
  const view = JSON.parse(event.data);
  link("live", "live");
  draw(view);
  followHistory(view.run.round);
});
stream.addEventListener("error", () => link("lost", "reconnecting; the coordinator does not answer"));

const started = moment(Date.parse($("started").dateTime) || null);
if (started) put($("started"), started.toLocaleString([], { dateStyle: "medium", timeStyle: "short" }));
for (const time of document.querySelectorAll("#events time")) {
  const at = moment(Date.parse(time.dateTime) || null);
  if (at) put(time, at.toLocaleTimeString([], { hourCycle: "h23" }));
}

let resizing = 0;
new ResizeObserver(() => {
  cancelAnimationFrame(resizing);
  resizing = requestAnimationFrame(() => plot && plot.width !== Math.max(200, $("chart").clientWidth) && drawChart());
}).observe($("chart"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawChart);

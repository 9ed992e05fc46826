// The operations view, from GET /v1/stats: replicas, nodes, what runs and waits, and the device time of the last minute.

import { lines, stacked } from "./charts.js";
import { $, duration, el, plural } from "./dom.js";

const MINUTE = 60_000;

let samples = []; // of the last minute, the oldest first

/** Keeps the numbers of an answer, also while the view is hidden, so that it opens with a past. */
export function sample(stats, now = performance.now()) {
  samples.push({ now, stats });
  samples = samples.filter((entry) => now - entry.now <= MINUTE + 5000);
}

export function show() {
  const latest = samples.at(-1);
  if (!latest) return;
  const { stats } = latest;
  const all = Object.entries(stats.replicas);
  const answering = all.filter(([, replica]) => !replica.error);
  const { total, nodes = [] } = stats;
  const backlog = total.backlog_s + (stats.queue?.waiting_s ?? 0);
  $("operations-note").textContent = `${stats.model}, as of ${new Date().toLocaleTimeString()}`;
  const silent = all.length - answering.length;
  $("tiles").replaceChildren(
    tile("Replicas", answering.length, silent ? `${plural(silent, "other")} starting or lost` : "all answer"),
    tile("Running", total.active_slots, `of ${plural(total.num_slots, "slot")}`),
    tile("Waiting", waitingIn(stats), `${plural(total.unfinished, "request")} in replicas`),
    tile("Backlog", backlog ? duration(backlog) : "0 s", "of device time"),
    tile("Answered", completedInMinute(), "in the last minute"),
    ...jobsTile(stats.jobs),
    tile("Nodes", nodes.length || "–", nodes.length ? resources(nodes) : "unknown"),
  );
  showBudget();
  showQueue();
  showReplicas(all, nodes);
  showNodes(nodes, answering);
}

function tile(label, value, note) {
  return el(
    "div",
    { class: "stat" },
    el("p", { class: "stat-label" }, label),
    el("p", { class: "stat-value" }, String(value)),
    el("p", { class: "stat-note" }, note),
  );
}

/** Nothing where the server keeps no jobs. */
function jobsTile(jobs) {
  if (!jobs || jobs.error) return jobs ? [tile("Jobs", "–", jobs.error)] : [];
  return [tile("Jobs", jobs.queued + jobs.in_progress, `${jobs.in_progress} being drawn`)];
}

/** Requests without a slot: in the ingress, and in the replicas. */
const waitingIn = ({ total, queue }) => total.waiting + (queue?.waiting ?? 0);

function completedInMinute() {
  const [first, last] = [samples[0], samples.at(-1)];
  return Math.max(0, (last.stats.total.requests.completed ?? 0) - (first.stats.total.requests.completed ?? 0));
}

/** The share of the device time between two samples: on rows that images needed, on padding, and idle. */
function shares(before, after) {
  let [busy, useful, replicas] = [0, 0, 0];
  for (const [id, replica] of Object.entries(after.stats.replicas)) {
    const earlier = before.stats.replicas[id];
    if (replica.error || !earlier || earlier.error) continue;
    const seconds = Math.max(0, replica.device_busy_s - earlier.device_busy_s);
    replicas += 1;
    busy += seconds;
    useful += seconds * (replica.bucket_fill ?? 1);
  }
  const whole = (replicas * (after.now - before.now)) / 1000;
  if (!whole) return null;
  const share = Math.min(1, busy / whole);
  const needed = busy ? (share * useful) / busy : 0;
  return { useful: needed, padding: share - needed, idle: 1 - share };
}

function showBudget() {
  const end = samples.at(-1).now;
  const at = (now) => Math.max(0, 1 - (end - now) / MINUTE);
  const bars = [];
  for (let i = 1; i < samples.length; i += 1) {
    const bar = shares(samples[i - 1], samples[i]);
    if (bar) bars.push({ from: at(samples[i - 1].now), to: at(samples[i].now), ...bar });
  }
  const whole = samples.length > 1 ? shares(samples[0], samples.at(-1)) : null;
  const percent = (name) => (whole ? `${Math.round(100 * whole[name])} %` : "–");
  const parts = [
    { name: "useful", label: `Drawing ${percent("useful")}` },
    { name: "padding", label: `Padding ${percent("padding")}` },
    { name: "idle", label: `Idle ${percent("idle")}` },
  ];
  stacked($("budget"), parts, bars, parts.map((part) => part.label).join(", "));
}

function showQueue() {
  const end = samples.at(-1).now;
  const points = samples.map(({ now, stats }) => ({
    at: Math.max(0, 1 - (end - now) / MINUTE),
    running: stats.total.active_slots,
    waiting: waitingIn(stats),
  }));
  const { running, waiting } = points.at(-1);
  const parts = [
    { name: "running", label: `Pictures in slots ${running}` },
    { name: "waiting", label: `Requests waiting ${waiting}` },
  ];
  lines($("queue"), parts, points, parts.map((part) => part.label).join(", "));
}

function showReplicas(all, nodes) {
  const head = ["Replica", "Node", "Device", "Slots", "Waiting", "Backlog", "At once", "Guided step", "Up"];
  const rows = all.map(([id, replica]) => {
    const name = el("th", { scope: "row" }, short(id));
    if (replica.error) return el("tr", {}, name, el("td", { colspan: head.length - 1, class: "muted" }, replica.error));
    const node = nodes.find((other) => other.id === replica.node);
    const sizes = Object.entries(replica.sizes ?? {});
    const warning = replica.compiles_after_ready
      ? el("span", { class: "warning" }, `${plural(replica.compiles_after_ready, "compile")} while serving`)
      : null;
    return el(
      "tr",
      {},
      name,
      el("td", {}, node ? node.type || short(node.id) : "–"),
      el("td", {}, replica.device ?? "–", warning),
      el(
        "td",
        {},
        el("meter", {
          min: 0,
          max: replica.num_slots,
          value: replica.active_slots,
          "aria-label": "slots in use",
        }),
        ` ${replica.active_slots} of ${replica.num_slots}`,
      ),
      el("td", {}, String(replica.waiting)),
      el("td", {}, replica.backlog_s ? duration(replica.backlog_s) : "–"),
      el(
        "td",
        {},
        perSize(sizes, (size) => String(size.images_at_once || "–")),
      ),
      el(
        "td",
        {},
        perSize(sizes, (size) => milliseconds(size.step_s)),
      ),
      el("td", {}, duration(replica.uptime_s ?? 0)),
    );
  });
  $("replicas").replaceChildren(
    el("thead", {}, el("tr", {}, ...head.map((title) => el("th", { scope: "col" }, title)))),
    el(
      "tbody",
      {},
      ...(rows.length ? rows : [el("tr", {}, el("td", { colspan: head.length, class: "muted" }, "No replica runs."))]),
    ),
  );
}

function perSize(sizes, text) {
  return el(
    "ul",
    { class: "per-size" },
    ...sizes.map(([size, facts]) => el("li", {}, el("span", { class: "muted" }, size), ` ${text(facts)}`)),
  );
}

function milliseconds(steps = {}) {
  const bucket = Object.keys(steps)
    .map(Number)
    .sort((a, b) => a - b)
    .find((rows) => rows >= 2);
  return bucket ? `${(1000 * steps[bucket]).toPrecision(3)} ms` : "–";
}

function showNodes(nodes, answering) {
  $("nodes").replaceChildren(
    ...nodes.map((node) => {
      const count = answering.filter(([, replica]) => replica.node === node.id).length;
      return el(
        "li",
        { class: "node" },
        el(
          "p",
          { class: "node-name" },
          node.type || "node",
          node.head ? el("span", { class: "badge-text" }, "head") : null,
        ),
        el("p", { class: "muted" }, resources([node]) || "no resources"),
        el("p", { class: "muted" }, count ? plural(count, "replica") : "no replica"),
      );
    }),
  );
}

function resources(nodes) {
  const sums = {};
  for (const node of nodes)
    for (const [name, count] of Object.entries(node.resources)) sums[name] = (sums[name] ?? 0) + count;
  return Object.entries(sums)
    .filter(([, count]) => count)
    .map(([name, count]) => `${count} ${name}`)
    .join(", ");
}

const short = (id) => (id.length > 10 ? id.slice(0, 8) : id);

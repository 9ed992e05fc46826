// What is being drawn: a run for each request, with a tile for each picture. Every picture is a stream of its own, so
// that each has previews and can be cancelled.

import { $, announce, el, icon, plural } from "./dom.js";
import { Tile } from "./tile.js";

const STREAMS = 4; // at once: browsers open six connections to a host
const MOST_RUNS = 2; // shown; what they drew stays in the gallery
const SEEDS = 2 ** 32;

let streams = 0;
const queued = [];

/** Draws `fields.n` pictures. `handlers`: finished(picture), refused(error), and the actions of a finished tile. */
export function draw(fields, edit, previews, handlers) {
  const seed = fields.seed ?? crypto.getRandomValues(new Uint32Array(1))[0];
  const tiles = [];
  const list = el("div", { class: "tiles-of-run", "data-count": fields.n });
  const dismiss = el(
    "button",
    { type: "button", class: "icon-button", "aria-label": "Put away", click: () => putAway(section) },
    icon("close"),
  );
  const cancelAll = el(
    "button",
    { type: "button", class: "small", click: () => tiles.forEach((tile) => tile.cancel()) },
    fields.n > 1 ? "Cancel all" : "Cancel",
  );
  const section = el(
    "article",
    { class: "run", "aria-label": `Drawing: ${fields.prompt.slice(0, 80)}` },
    el("header", {}, el("p", { class: "run-prompt" }, fields.prompt), cancelAll, dismiss),
    list,
  );
  dismiss.hidden = true;
  const ended = () => {
    if (tiles.some((tile) => tile.busy)) return;
    cancelAll.hidden = true;
    dismiss.hidden = false;
    section.classList.add("ended");
  };
  let refused = false;
  const refuse = (error) => {
    tiles.forEach((tile) => tile.cancel());
    putAway(section);
    if (!refused) handlers.refused(error); // once, though every picture of the run is refused
    refused = true;
  };
  for (let i = 0; i < fields.n; i += 1) {
    const own = { ...fields, n: 1, seed: Number.isInteger(seed) ? (seed + i) % SEEDS : seed };
    const tile = new Tile(own, edit, previews, { ...handlers, ended, refuse, send });
    tiles.push(tile);
    list.append(tile.element);
  }
  $("runs").prepend(section);
  [...$("runs").querySelectorAll(".ended")].slice(MOST_RUNS - 1).forEach(putAway);
  tiles.forEach(send);
  announce(`Drawing ${plural(fields.n, "picture")}`);
}

/** What it drew stays in the gallery. */
function putAway(section) {
  for (const image of section.querySelectorAll("img")) URL.revokeObjectURL(image.src);
  section.remove();
}

/** Cancels what was sent last. Returns whether there was anything. */
export function cancelLatest() {
  const button = document.querySelector(".run:not(.ended) header .small");
  button?.click();
  return Boolean(button);
}

function send(tile) {
  queued.push(tile);
  next();
}

function next() {
  while (streams < STREAMS && queued.length) {
    const tile = queued.shift();
    if (!tile.busy) continue;
    streams += 1;
    tile.draw().finally(() => {
      streams -= 1;
      next();
    });
  }
}

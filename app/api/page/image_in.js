// The images that a request begins from or looks at, and the mask that is painted on the first of them.

import { $, announce, el, icon, plural } from "./dom.js";
import * as painting from "./mask.js";

const LARGEST = 1536; // pixels along a side: larger images are made smaller before they are sent

let sent = []; // {name, blob, url} of the images as they are sent; the first stands on the easel
let offered = {}; // the model's capabilities
let most = 1; // images that the model takes
let changed = () => {};

/** Calls `whenChanged` after a change; with a width and a height where another image is the first. */
export function start(whenChanged) {
  changed = whenChanged;
  painting.start((before, now) => {
    if (before !== now) setStrength(now ? offered.mask_strength : ownStrength());
    changed();
  });
  $("image").addEventListener("change", async () => {
    const files = [...$("image").files];
    $("image").value = ""; // the same file may be chosen again
    await add(files);
  });
  $("image-remove").addEventListener("click", () => remove(0));
  const drop = $("drop");
  for (const name of ["dragenter", "dragover"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.add("dragging");
    });
  }
  for (const name of ["dragleave", "drop"]) drop.addEventListener(name, () => drop.classList.remove("dragging"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    add([...event.dataTransfer.files]);
  });
}

/** Shows the controls where the model takes images, and the mask and the strength where it can begin from one. */
export function offer(capabilities, limit) {
  offered = capabilities;
  const references = offered.references ?? 0;
  most = Math.min(limit, Math.max(references, offered.edits ? 1 : 0));
  $("image-in").hidden = !most;
  for (const image of sent.splice(most)) URL.revokeObjectURL(image.url);
  $("image").multiple = most > 1;
  for (const id of ["mask-tools", "mask-hint", "mask-canvas"]) $(id).hidden = !offered.masks;
  $("strength-field").hidden = !offered.edits;
  $("image-legend").textContent = !references
    ? "Begin from an image"
    : `Images to ${offered.edits ? "begin from or " : ""}look at`;
  $("strength-hint").textContent = references
    ? "Left empty, the model looks at the images and begins from none of them."
    : "Little keeps the image, 1 keeps only what is not painted.";
  show();
}

export const images = () => sent;
export const hasMask = () => Boolean(sent.length) && painting.hasPaint();
export const mask = async () => (hasMask() ? painting.blob() : null);

/** Takes image files or blobs, as many as the model does. Of a model that takes one, it replaces the one before. */
export async function add(files) {
  $("image-error").hidden = true;
  for (const file of files) {
    if (most === 1 && sent.length) forget(0);
    if (sent.length === most) {
      showProblem(`This model takes at most ${plural(most, "image")}.`);
      break;
    }
    const image = await read(file);
    if (!image) break;
    sent.push(image);
    if (sent.length === 1) await showFirst();
    else announce(`${plural(sent.length, "image")} for the model to look at`);
  }
  show();
  changed();
}

/** The image as it is sent: as PNG, with its orientation applied. Null, and a sentence, where it cannot be read. */
async function read(file) {
  const name = file.name ?? "image.png";
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    showProblem(`${name} is not an image that this browser can read.`);
    return null;
  }
  const scale = Math.min(1, LARGEST / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, width, height);
  const blob = await canvas.convertToBlob({ type: "image/png" });
  return { name: unused(name.replace(/\.[^.]*$/, "")), blob, url: URL.createObjectURL(blob) };
}

/** A file name of its own for each image: the code that is shown opens them by name. */
function unused(stem) {
  const names = sent.map((image) => image.name);
  let name = `${stem}.png`;
  for (let number = 2; names.includes(name); number += 1) name = `${stem}-${number}.png`;
  return name;
}

async function showFirst() {
  const bitmap = await createImageBitmap(sent[0].blob);
  const { width, height } = bitmap;
  Object.assign($("image-canvas"), { width, height });
  $("image-canvas").getContext("2d").drawImage(bitmap, 0, 0);
  painting.reset(width, height);
  setStrength(ownStrength());
  changed(width, height);
}

function forget(index) {
  for (const image of sent.splice(index, 1)) URL.revokeObjectURL(image.url);
}

async function remove(index) {
  forget(index);
  if (!index && sent.length) await showFirst();
  show();
  changed();
}

function show() {
  $("drop").hidden = sent.length >= most;
  $("drop-text").textContent = sent.length ? "Add an image" : "Choose an image";
  $("image-set").hidden = !sent.length;
  $("image-others").replaceChildren(...sent.slice(1).map(other));
  $("image-others").hidden = sent.length < 2;
}

function other({ name, url }, index) {
  const label = `Remove ${name}`;
  const click = () => remove(index + 1);
  return el(
    "li",
    {},
    el("img", { src: url, alt: name }),
    el("button", { type: "button", class: "icon-button", "aria-label": label, title: label, click }, icon("close")),
  );
}

function showProblem(text) {
  $("image-error").textContent = text;
  $("image-error").hidden = false;
}

/** Of a request without a mask. A model that looks at images begins from one only where a strength is entered. */
const ownStrength = () => (offered.references ? "" : offered.strength);

function setStrength(value) {
  for (const id of ["strength", "strength-range"]) $(id).value = value ?? 0.8;
}

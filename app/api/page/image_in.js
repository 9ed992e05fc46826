// The image that a request begins from, and the mask that is painted on it, by pointer or by keyboard.

import { $, announce, save } from "./dom.js";

const LARGEST = 1536; // pixels along a side: larger images are made smaller before they are sent
const MOST_UNDO = 20;
const PAINT = "#7c6cf0";
const READ = { willReadFrequently: true }; // whether there is paint, and what an undo brings back

let picture = null; // {name, blob} of the image as it is sent
let offered = {}; // the model's capabilities
let painted = false;
let erasing = false;
let undo = [];
let cursor = null; // of the keyboard, in the mask's pixels
let changed = () => {};

export function start(whenChanged) {
  changed = whenChanged;
  $("image").addEventListener("change", () => take($("image").files[0]));
  $("image-remove").addEventListener("click", remove);
  $("mask-clear").addEventListener("click", () => paintOver(() => clearMask()));
  $("mask-save").addEventListener("click", async () => save(await mask(), "mask.png"));
  $("mask-undo").addEventListener("click", undoLast);
  $("mask-erase").addEventListener("click", () => {
    erasing = !erasing;
    $("mask-erase").setAttribute("aria-pressed", String(erasing));
  });
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
    take(event.dataTransfer.files[0]);
  });
  paintByPointer($("mask-canvas"));
  paintByKeys($("mask-canvas"));
}

/** Shows the controls where the model can begin from an image, and the mask where it takes one. */
export function offer(capabilities) {
  offered = capabilities;
  const takesImages = Boolean(offered.edits || offered.references);
  $("image-in").hidden = !takesImages;
  if (!takesImages && picture) remove();
  for (const id of ["mask-tools", "mask-hint", "mask-canvas"]) $(id).hidden = !offered.masks;
  $("strength-field").hidden = !offered.edits;
}

export const image = () => picture;
export const hasMask = () => painted;

/** The mask as the API takes it: transparent where the image is redrawn. Null without paint. */
export async function mask() {
  if (!picture || !painted) return null;
  const source = $("mask-canvas");
  const canvas = new OffscreenCanvas(source.width, source.height);
  const context = canvas.getContext("2d");
  context.fillStyle = "#000";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.globalCompositeOperation = "destination-out";
  context.drawImage(source, 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}

/** Takes an image file or blob. Its orientation is applied, and it is sent as PNG. */
export async function take(file, name = file?.name ?? "image.png") {
  if (!file) return;
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    showProblem(`${name} is not an image that this browser can read.`);
    return;
  }
  const scale = Math.min(1, LARGEST / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  for (const id of ["image-canvas", "mask-canvas"]) Object.assign($(id), { width, height });
  $("image-canvas").getContext("2d").drawImage(bitmap, 0, 0, width, height);
  const blob = await new Promise((resolve) => $("image-canvas").toBlob(resolve, "image/png"));
  picture = { name: `${name.replace(/\.[^.]*$/, "")}.png`, blob };
  [undo, cursor, painted] = [[], null, false];
  $("mask-save").hidden = true;
  $("image-error").hidden = true;
  setStrength(offered.strength);
  show();
  changed(width, height);
}

function remove() {
  [picture, undo, painted] = [null, [], false];
  $("image").value = "";
  show();
  changed();
}

function show() {
  $("drop").hidden = Boolean(picture);
  $("image-set").hidden = !picture;
}

function showProblem(text) {
  $("image-error").textContent = text;
  $("image-error").hidden = false;
}

// Painting

function brushSize() {
  const canvas = $("mask-canvas");
  return ($("brush").valueAsNumber / 200) * Math.max(canvas.width, canvas.height);
}

function stroke(from, to) {
  const context = $("mask-canvas").getContext("2d", READ);
  context.globalCompositeOperation = erasing ? "destination-out" : "source-over";
  Object.assign(context, { strokeStyle: PAINT, fillStyle: PAINT, lineWidth: brushSize(), lineCap: "round" });
  context.beginPath();
  context.moveTo(...from);
  context.lineTo(...to);
  context.stroke();
  context.beginPath(); // a line without a length draws nothing
  context.arc(...to, brushSize() / 2, 0, 2 * Math.PI);
  context.fill();
}

function clearMask() {
  const canvas = $("mask-canvas");
  canvas.getContext("2d", READ).clearRect(0, 0, canvas.width, canvas.height);
}

/** Changes the mask so that it can be undone. */
function paintOver(change) {
  remember();
  change();
  paintChanged();
}

/** With a mask the model's own strength is another than without. */
function paintChanged() {
  const [before, now] = [painted, hasPaint()];
  painted = now;
  $("mask-save").hidden = !now;
  if (before !== now) setStrength(now ? offered.mask_strength : offered.strength);
  changed();
}

function setStrength(value) {
  for (const id of ["strength", "strength-range"]) $(id).value = value ?? 0.8;
}

function remember() {
  const canvas = $("mask-canvas");
  undo.push(canvas.getContext("2d", READ).getImageData(0, 0, canvas.width, canvas.height));
  if (undo.length > MOST_UNDO) undo.shift();
}

function undoLast() {
  const before = undo.pop();
  if (!before) return;
  $("mask-canvas").getContext("2d", READ).putImageData(before, 0, 0);
  paintChanged();
}

function hasPaint() {
  const canvas = $("mask-canvas");
  const { data } = canvas.getContext("2d", READ).getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 3; i < data.length; i += 4) if (data[i]) return true;
  return false;
}

function paintByPointer(canvas) {
  let last = null;
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) * canvas.width) / box.width,
      ((event.clientY - box.top) * canvas.height) / box.height,
    ];
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    remember();
    last = place(event);
    stroke(last, last);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!last) return;
    const next = place(event);
    stroke(last, next);
    last = next;
  });
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, () => {
      if (!last) return;
      last = null;
      paintChanged();
    });
  }
}

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function paintByKeys(canvas) {
  canvas.addEventListener("keydown", (event) => {
    cursor ??= [canvas.width / 2, canvas.height / 2];
    if (event.key in MOVES) {
      const step = brushSize() / 2;
      const before = cursor;
      const limits = [canvas.width, canvas.height];
      cursor = cursor.map((at, axis) => Math.min(limits[axis], Math.max(0, at + MOVES[event.key][axis] * step)));
      if (event.shiftKey) paintOver(() => stroke(before, cursor));
      const [x, y] = cursor.map((at, axis) => Math.round((100 * at) / limits[axis]));
      announce(`${x} % from the left, ${y} % from the top`);
    } else if (event.key === " ") {
      paintOver(() => stroke(cursor, cursor));
      announce(erasing ? "erased" : "painted");
    } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) {
      undoLast();
    } else {
      return;
    }
    event.preventDefault();
    showCursor(canvas);
  });
  canvas.addEventListener("blur", () => $("easel").classList.remove("with-cursor"));
}

function showCursor(canvas) {
  const easel = $("easel");
  easel.classList.add("with-cursor");
  easel.style.setProperty("--x", `${(100 * cursor[0]) / canvas.width}%`);
  easel.style.setProperty("--y", `${(100 * cursor[1]) / canvas.height}%`);
  easel.style.setProperty("--brush", `${(100 * brushSize()) / canvas.width}%`);
}

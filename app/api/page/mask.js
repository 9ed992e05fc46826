// The mask that is painted over an image, by pointer or by keyboard. Knows nothing of what it is painted over.

import { $, announce, save } from "./dom.js";

const MOST_UNDO = 20;
const PAINT = "#7c6cf0";
const READ = { willReadFrequently: true }; // whether there is paint, and what an undo brings back

let painted = false;
let erasing = false;
let undo = [];
let cursor = null; // of the keyboard, in the mask's pixels
let changed = () => {};

/** Calls `whenChanged(before, now)` after each stroke, with whether there was and is paint. */
export function start(whenChanged) {
  changed = whenChanged;
  $("mask-clear").addEventListener("click", () => paintOver(clear));
  $("mask-save").addEventListener("click", async () => save(await blob(), "mask.png"));
  $("mask-undo").addEventListener("click", undoLast);
  $("mask-erase").addEventListener("click", () => {
    erasing = !erasing;
    $("mask-erase").setAttribute("aria-pressed", String(erasing));
  });
  paintByPointer($("mask-canvas"));
  paintByKeys($("mask-canvas"));
}

/** A mask of this size without paint. */
export function reset(width, height) {
  Object.assign($("mask-canvas"), { width, height });
  [undo, cursor, painted] = [[], null, false];
  $("mask-save").hidden = true;
}

export const hasPaint = () => painted;

/** The mask as the API takes it: transparent where the image is redrawn. Null without paint. */
export async function blob() {
  if (!painted) return null;
  const source = $("mask-canvas");
  const canvas = new OffscreenCanvas(source.width, source.height);
  const context = canvas.getContext("2d");
  context.fillStyle = "#000";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.globalCompositeOperation = "destination-out";
  context.drawImage(source, 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}

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

function clear() {
  const canvas = $("mask-canvas");
  canvas.getContext("2d", READ).clearRect(0, 0, canvas.width, canvas.height);
}

/** Changes the mask so that it can be undone. */
function paintOver(change) {
  remember();
  change();
  paintChanged();
}

function paintChanged() {
  const before = painted;
  painted = anyPaint();
  $("mask-save").hidden = !painted;
  changed(before, painted);
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

function anyPaint() {
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

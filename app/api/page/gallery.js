// This browser's pictures with their settings, in IndexedDB, up to a number and a size. Without it they last as long as
// the page.

import { $, el, icon } from "./dom.js";

const MOST = 200;
const MOST_BYTES = 256 * 2 ** 20;
const STORE = "pictures";

let database = null;
let pictures = []; // the newest first
let look = () => {};

/** Shows what is kept. `open` is called with a picture that was clicked. */
export async function start(open) {
  look = open;
  $("gallery-clear").addEventListener("click", clearAll);
  try {
    database = await opened();
    pictures = (await done(store("readonly").getAll())).reverse();
  } catch {
    $("gallery-note").textContent = "This browser keeps nothing: they go with this tab.";
  }
  show();
}

export async function add(picture) {
  if (database) {
    try {
      picture.id = await done(store("readwrite").add(picture));
    } catch {
      // no room: it is shown all the same
    }
  }
  pictures.unshift(picture);
  let bytes = 0;
  const beyond = pictures.filter((other, index) => index >= MOST || (bytes += other.blob.size) > MOST_BYTES);
  for (const old of beyond) await remove(old);
  show();
}

export async function remove(picture) {
  pictures = pictures.filter((other) => other !== picture);
  if (database && picture.id !== undefined) await done(store("readwrite").delete(picture.id));
  show();
}

export const file = ({ blob, fields }) => `${slug(fields.prompt)}-${fields.seed}.${blob.type.split("/")[1]}`;

async function clearAll() {
  const button = $("gallery-clear");
  if (button.dataset.sure !== "yes") {
    button.dataset.sure = "yes";
    button.textContent = `Remove ${pictures.length} for good?`;
    const calm = () => {
      delete button.dataset.sure;
      button.textContent = "Remove all";
    };
    button.addEventListener("blur", calm, { once: true });
    return;
  }
  pictures = [];
  if (database) await done(store("readwrite").clear());
  button.blur();
  show();
}

function show() {
  const list = $("gallery");
  const items = new Map([...list.children].map((item) => [item.picture, item]));
  for (const [picture, item] of items) {
    if (pictures.includes(picture)) continue;
    URL.revokeObjectURL(item.querySelector("img").src);
    item.remove();
  }
  pictures.forEach((picture, index) => {
    const item = items.get(picture) ?? itemOf(picture);
    if (list.children[index] !== item) list.insertBefore(item, list.children[index] ?? null);
  });
  $("gallery-section").hidden = !pictures.length;
  $("empty").hidden = pictures.length > 0 || $("runs").childElementCount > 0;
}

function itemOf(picture) {
  const image = el("img", { src: URL.createObjectURL(picture.blob), alt: picture.fields.prompt, loading: "lazy" });
  const button = el("button", { type: "button", title: picture.fields.prompt, click: () => look(picture) }, image);
  const item = el(
    "li",
    {},
    button,
    picture.edited ? el("span", { class: "badge", title: "An edit" }, icon("image")) : null,
  );
  item.picture = picture;
  return item;
}

const slug = (text) =>
  text
    .toLowerCase()
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-|-$/g, "")
    .slice(0, 48) || "picture";

function opened() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("imagine", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

const store = (mode) => database.transaction(STORE, mode).objectStore(STORE);

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

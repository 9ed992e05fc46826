// Starts the page: the model and its form, what is sent, both views, the key's dialog, and the colours.

import * as api from "./api.js";
import * as code from "./code.js";
import { $, el, icon, save } from "./dom.js";
import { estimate } from "./estimate.js";
import * as form from "./form.js";
import * as gallery from "./gallery.js";
import * as imageIn from "./image_in.js";
import * as operations from "./operations.js";
import * as runs from "./runs.js";
import * as viewer from "./viewer.js";

const IDEAS = [
  "a red boat under a yellow sun at dusk",
  "a big green tree in the snow",
  "a yellow moon above a purple house at night",
  "a pink flower next to a red mushroom",
];
const THEME = "imagine-theme"; // in localStorage
// Between two questions for GET /v1/stats. With keys each counts as a request, so there are fewer.
const POLL_MS = { draw: 5000, operations: 2000 };
const POLL_KEYED_MS = { draw: 20_000, operations: 5000 };

let models = [];
let stats = null;

const view = () => (location.hash === "#operations" ? "operations" : "draw");
const model = () => models.find((candidate) => candidate.id === $("model").value) ?? models[0];

// The model and its form

async function loadModels() {
  for (;;) {
    try {
      models = (await api.getJson("v1/models")).data;
      break;
    } catch (error) {
      if (error instanceof api.Away) await api.serverBack();
      else {
        $("connection").textContent = error.message;
        if (error.status === 401 || error.status === 403) return; // after "Not now"; the form asks again
        await new Promise((resolve) => setTimeout(resolve, 1000 * (error.retryAfter ?? 3)));
      }
    }
  }
  $("model-name").textContent = models.map((offered) => offered.id).join(", ");
  $("model-name").title = models.flatMap((offered) => offered.notes).join(" ");
  form.offer(model(), models);
}

function formChanged() {
  const fields = form.read();
  $("estimate").textContent = models.length ? estimate(stats, fields) : "";
  code.show();
}

async function send(event) {
  event.preventDefault();
  form.clearErrors();
  if (!models.length) await loadModels();
  if (!models.length) return;
  const fields = form.read();
  const images = [...imageIn.images()];
  const edit = images.length ? { images, mask: await imageIn.mask() } : null;
  const previews = Math.min(3, model().limits.partial_images);
  runs.draw(fields, edit, previews, { finished: gallery.add, refused: form.showError, look, actions: tileActions() });
  $("empty").hidden = true;
  if (matchMedia("(max-width: 960px)").matches) $("runs").scrollIntoView({ behavior: "smooth" });
}

// What can be done with a picture

function reuse({ fields }) {
  form.write({ negative_prompt: "", ...fields, n: 1 });
  location.hash = "#draw";
  $("prompt").focus();
  $("prompt").scrollIntoView({ block: "center" });
}

const download = (picture) => save(picture.blob, gallery.file(picture));

async function beginFrom(picture) {
  await imageIn.add([new File([picture.blob], gallery.file(picture))]);
  $("image-in").scrollIntoView({ block: "center" });
}

function tileActions() {
  const { edits, references } = model()?.capabilities ?? {};
  const image = edits ? "Begin from this" : references ? "Look at this" : null;
  return [
    ["again", "Again with this seed", reuse],
    ["download", "Download", download],
    ...(image ? [["image", image, beginFrom]] : []),
  ];
}

function look(picture) {
  viewer.look(picture, [
    ["reuse", "Reuse its settings", reuse],
    ...tileActions().slice(1),
    ["remove", "Remove", gallery.remove],
  ]);
}

// Statistics, for the estimate and the operations view

async function poll() {
  for (;;) {
    if (!document.hidden && api.connection.state !== "away" && (!api.connection.keyed || api.key())) {
      try {
        stats = await api.getJson("v1/stats");
        operations.sample(stats);
        if (view() === "operations") operations.show();
        else formChanged();
      } catch {
        // the connection's state says it
      }
    }
    const every = (api.connection.keyed ? POLL_KEYED_MS : POLL_MS)[view()];
    await new Promise((resolve) => {
      const wake = () => {
        clearTimeout(timer);
        removeEventListener("hashchange", wake);
        document.removeEventListener("visibilitychange", wake);
        resolve();
      };
      const timer = setTimeout(wake, every);
      addEventListener("hashchange", wake);
      document.addEventListener("visibilitychange", wake);
    });
  }
}

// Views, colours, key

function showView() {
  for (const name of ["draw", "operations"]) {
    $(`view-${name}`).hidden = name !== view();
    if (name === view()) $(`tab-${name}`).setAttribute("aria-current", "page");
    else $(`tab-${name}`).removeAttribute("aria-current");
  }
  if (view() === "operations") operations.show();
}

function startTheme() {
  const order = ["system", "light", "dark"];
  const show = (theme) => {
    document.documentElement.dataset.theme = theme;
    $("theme").replaceChildren(icon(theme));
    $("theme").setAttribute("aria-label", `Colours: ${theme === "system" ? "as the system" : theme}`);
    $("theme").title = $("theme").getAttribute("aria-label");
  };
  show(order.includes(localStorage.getItem(THEME)) ? localStorage.getItem(THEME) : "system");
  $("theme").addEventListener("click", () => {
    const theme = order[(order.indexOf(document.documentElement.dataset.theme) + 1) % order.length];
    localStorage.setItem(THEME, theme);
    show(theme);
  });
}

function startConnection() {
  const words = { starting: "Connecting", ready: "Ready", away: "The server is away" };
  const show = () => {
    $("connection").dataset.state = api.connection.state;
    $("connection").textContent = words[api.connection.state];
  };
  let wasAway = false;
  api.connection.addEventListener("change", () => {
    show();
    if (api.connection.state === "ready" && wasAway) loadModels(); // it may serve another model now
    wasAway = api.connection.state === "away";
  });
}

/** Shows the dialog. Returns the key, or null for "Not now". */
function askForKey(problem) {
  $("key").value = "";
  $("key-error").textContent = problem;
  $("key-error").hidden = !problem;
  $("key-dialog").returnValue = "";
  $("key-dialog").showModal();
  return new Promise((resolve) => {
    $("key-dialog").addEventListener(
      "close",
      () => resolve($("key-dialog").returnValue === "entered" ? $("key").value.trim() || null : null),
      { once: true },
    );
  });
}

function startKey() {
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    $("key-dialog").close("entered");
  });
  $("key-cancel").addEventListener("click", () => $("key-dialog").close());
  api.onKeyNeeded(askForKey);
}

function startKeyboard() {
  const mac = /Mac|iPhone|iPad/.test(navigator.userAgent);
  $("send-keys").textContent = mac ? "⌘ ↵" : "Ctrl ↵";
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && view() === "draw") $("form").requestSubmit();
    else if (event.key === "Escape" && runs.cancelLatest()) event.preventDefault();
  });
}

function startIdeas() {
  const take = (idea) => {
    form.write({ prompt: idea });
    $("form").requestSubmit();
  };
  $("ideas").append(
    ...IDEAS.map((idea) => el("button", { type: "button", class: "idea", click: () => take(idea) }, idea)),
  );
}

startTheme();
startKey();
startConnection();
code.start();
startIdeas();
startKeyboard();
viewer.start();
form.start(formChanged);
$("form").addEventListener("submit", send);
addEventListener("hashchange", () => {
  showView();
  scrollTo(0, 0);
});
showView();
gallery.start(look);
await loadModels();
poll();

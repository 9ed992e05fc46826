// The form of a request: offers what the model offers, reads the fields, and shows the API's errors beside them.

import { $, el, icon, svg } from "./dom.js";
import * as imageIn from "./image_in.js";

const DRAFT = "imagine-draft"; // the form survives a reload of the tab
const COUNTS = [1, 2, 3, 4, 6, 8, 12, 16];
const SLIDERS = ["num_inference_steps", "guidance_scale", "strength"];
const TEXTS = ["prompt", "negative_prompt"];
const GUIDED = ["guidance_scale", "negative_prompt"]; // fields that need guidance

let model = null;

/** Calls `changed` whenever a field changes. */
export function start(changed) {
  $("seed-clear").append(icon("dice"));
  $("seed-clear").addEventListener("click", () => {
    $("seed").value = "";
    $("seed").focus();
    edited();
  });
  for (const name of SLIDERS) {
    $(`${name}-range`).addEventListener("input", () => ($(name).value = $(`${name}-range`).value));
    $(name).addEventListener("input", () => ($(`${name}-range`).value = $(name).value));
  }
  const edited = () => {
    $("seed-clear").hidden = !$("seed").value;
    $("negative_prompt-hint").hidden = !($("negative_prompt").value && $("guidance_scale").valueAsNumber <= 1);
    sessionStorage.setItem(DRAFT, JSON.stringify(read()));
    changed();
  };
  $("form").addEventListener("input", (event) => {
    clearError(event.target.closest("[data-param]"));
    edited();
  });
  imageIn.start((width, height) => {
    if (width) choose("size", nearestSize(width, height));
    edited();
  });
}

/** Fills the form for a model of GET /v1/models, and keeps what was entered where the model allows it. */
export function offer(offered, models) {
  const before = model ? read() : JSON.parse(sessionStorage.getItem(DRAFT) ?? "{}");
  model = offered;
  chips($("sizes"), "size", model.sizes, sizeChip);
  chips(
    $("numbers"),
    "n",
    COUNTS.filter((count) => count <= model.limits.images),
  );
  bounds("num_inference_steps", model.limits.num_inference_steps);
  bounds("guidance_scale", model.limits.guidance_scale);
  for (const name of GUIDED) document.querySelector(`#form [data-param=${name}]`).hidden = !guided();
  $("sampler").replaceChildren(...model.samplers.map((name) => el("option", {}, name)));
  $("model").replaceChildren(...models.map((other) => el("option", {}, other.id)));
  $("model-field").hidden = models.length < 2;
  imageIn.offer(model.capabilities ?? {}, model.limits.input_images ?? 1);
  write({
    num_inference_steps: model.defaults.num_inference_steps,
    guidance_scale: model.defaults.guidance_scale,
    sampler: model.defaults.sampler,
    size: model.defaults.size,
    n: 1,
    ...known(before),
    model: model.id,
  });
}

/** Whether the model may be guided: one that is distilled has limits without guidance. */
const guided = () => !model || model.limits.guidance_scale[1] > 1;

function known(fields) {
  const kept = { ...fields };
  if (!model.sizes.includes(kept.size)) delete kept.size;
  if (!model.samplers.includes(kept.sampler)) delete kept.sampler;
  return kept;
}

/** The fields as the API takes them; what is left empty is left out. */
export function read() {
  const number = (id) => (Number.isNaN($(id).valueAsNumber) ? undefined : $(id).valueAsNumber);
  const fields = {
    prompt: $("prompt").value,
    negative_prompt: (guided() && $("negative_prompt").value) || undefined,
    size: chosen("size"),
    n: Number(chosen("n") ?? 1),
    num_inference_steps: number("num_inference_steps"),
    guidance_scale: guided() ? number("guidance_scale") : undefined,
    sampler: $("sampler").value || undefined,
    seed: number("seed"),
    model: $("model-field").hidden ? undefined : $("model").value,
    strength: imageIn.images().length && !$("strength-field").hidden ? number("strength") : undefined,
  };
  return JSON.parse(JSON.stringify(fields)); // without the undefined ones
}

/** Sets the fields that are named. */
export function write(fields) {
  for (const name of [...TEXTS, ...SLIDERS, "sampler", "model", "seed"]) {
    if (name in fields) $(name).value = fields[name] ?? "";
  }
  for (const name of SLIDERS) $(`${name}-range`).value = $(name).value;
  for (const name of ["size", "n"]) if (name in fields) choose(name, String(fields[name]));
  $("form").dispatchEvent(new Event("input", { bubbles: true }));
}

/** Shows the API's sentence beside the field that it names, and goes there. */
export function showError(error) {
  const field = document.querySelector(`#form [data-param="${CSS.escape(error.param ?? "")}"]`);
  const hidden = !field || field.closest("[hidden]");
  const place = hidden ? $("form-error") : field.matches(".error") ? field : field.querySelector(":scope > .error");
  place.textContent = error.message;
  place.hidden = false;
  const control = hidden ? null : field.querySelector("input:checked, textarea, select, input:not([type=range])");
  control?.setAttribute("aria-invalid", "true");
  (control ?? $("form-error")).scrollIntoView({ block: "center" });
  control?.focus();
}

export function clearErrors() {
  for (const field of $("form").querySelectorAll("[data-param]")) clearError(field);
  clearError(null);
}

function clearError(field) {
  const places = field ? [field.matches(".error") ? field : field.querySelector(":scope > .error")] : [];
  for (const place of [...places, $("form-error")]) if (place) place.hidden = true;
  field?.querySelector("[aria-invalid]")?.removeAttribute("aria-invalid");
}

function chips(place, name, values, label = (value) => [String(value)]) {
  place.replaceChildren(
    ...values.map((value) =>
      el(
        "label",
        { class: "chip" },
        el("input", { type: "radio", name, value, "aria-describedby": `${name}-error` }),
        el("span", {}, ...label(value)),
      ),
    ),
  );
}

/** The size with a small drawing of its shape. */
function sizeChip(size) {
  const [width, height] = size.split("x").map(Number);
  const scale = 13 / Math.max(width, height);
  const [w, h] = [width * scale, height * scale];
  const shape = svg("rect", { x: (16 - w) / 2, y: (16 - h) / 2, width: w, height: h, rx: 2 });
  return [svg("svg", { viewBox: "0 0 16 16", class: "shape", "aria-hidden": "true" }, shape), size.replace("x", " × ")];
}

function nearestSize(width, height) {
  const distance = (size) => {
    const [w, h] = size.split("x").map(Number);
    return Math.abs(Math.log((w / h) * (height / width)));
  };
  return model.sizes.toSorted((a, b) => distance(a) - distance(b))[0];
}

function chosen(name) {
  return document.querySelector(`#form input[name="${name}"]:checked`)?.value;
}

function choose(name, value) {
  const inputs = [...document.querySelectorAll(`#form input[name="${name}"]`)];
  const input = inputs.find((candidate) => candidate.value === value) ?? inputs[0];
  if (input) input.checked = true;
}

function bounds(name, [low, high]) {
  for (const input of [$(name), $(`${name}-range`)]) Object.assign(input, { min: low, max: high });
}

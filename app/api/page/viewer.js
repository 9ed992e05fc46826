// One picture, large, with what made it and what can be done with it.

import { $, el, icon } from "./dom.js";

const FACTS = [
  ["seed", "Seed"],
  ["size", "Size"],
  ["num_inference_steps", "Steps"],
  ["guidance_scale", "Guidance"],
  ["sampler", "Sampler"],
  ["strength", "Strength"],
  ["negative_prompt", "Negative"],
  ["model", "Model"],
];

export function start() {
  $("viewer").addEventListener("click", (event) => event.target === $("viewer") && close()); // beside it
  $("viewer").addEventListener("close", () => URL.revokeObjectURL($("viewer-image").src));
}

export const close = () => $("viewer").close();

/** `actions` are [icon, label, call] of the buttons; the first is the main one. */
export function look(picture, actions) {
  const { fields, facts, blob, created } = picture;
  $("viewer-image").src = URL.createObjectURL(blob);
  $("viewer-image").alt = fields.prompt;
  $("viewer-prompt").textContent = fields.prompt;
  const values = {
    ...fields,
    ...facts,
    ...(fields.negative_prompt ? { negative_prompt: fields.negative_prompt } : {}),
  };
  const rows = FACTS.filter(([name]) => values[name] !== undefined && values[name] !== "");
  $("viewer-facts").replaceChildren(
    ...rows.flatMap(([name, label]) => [el("dt", {}, label), el("dd", {}, String(values[name]))]),
    el("dt", {}, "Drawn"),
    el("dd", {}, new Date(created).toLocaleString()),
  );
  $("viewer-actions").replaceChildren(
    ...actions.map(([name, label, call], index) =>
      el(
        "button",
        {
          type: "button",
          class: index ? "" : "primary",
          click: () => {
            close();
            call(picture);
          },
        },
        icon(name),
        label,
      ),
    ),
    el("button", { type: "button", click: close }, icon("close"), "Close"),
  );
  $("viewer").showModal();
}

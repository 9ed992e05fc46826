// The panel "As code": the request in the form as a program would send it.

import { $ } from "./dom.js";
import * as form from "./form.js";
import * as imageIn from "./image_in.js";
import { snippet } from "./snippets.js";

let kind = "curl";

/** Shows the request that the form would send, where the panel is open. */
export function show() {
  if (!$("code").open) return;
  const fields = form.read();
  if (fields.n === 1) delete fields.n;
  const images = imageIn.images().map((image) => image.name);
  const edit = { images, mask: imageIn.hasMask() ? "mask.png" : null };
  $("code-panel").textContent = snippet(kind, fields, images.length ? edit : null);
}

export function start() {
  const tabs = [...document.querySelectorAll(".code-tabs [role=tab]")];
  const select = (tab) => {
    kind = tab.id.replace("code-", "");
    for (const other of tabs) {
      other.setAttribute("aria-selected", String(other === tab));
      other.tabIndex = other === tab ? 0 : -1;
    }
    $("code-panel").setAttribute("aria-labelledby", tab.id);
    show();
  };
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const other = tabs[(index + step + tabs.length) % tabs.length];
      other.focus();
      select(other);
    });
  });
  $("code").addEventListener("toggle", show);
  $("code-copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText($("code-panel").textContent);
      $("code-copy").textContent = "Copied";
    } catch {
      getSelection().selectAllChildren($("code-panel")); // without permission: ready for Ctrl-C
      $("code-copy").textContent = "Selected";
    }
    setTimeout(() => ($("code-copy").textContent = "Copy"), 1500);
  });
}

// One picture, from its place in the queue to its file: its stream, what it shows meanwhile, what can be done with it.

import { ApiError, Away, events, serverBack } from "./api.js";
import { announce, duration, el, icon } from "./dom.js";

const MOST_RETRIES = 5; // of what the server asks to try again later
const LATER = ["queue_full", "deadline_unmeetable", "replica_lost", "model_not_ready", "rate_limit_exceeded"];

export class Tile {
  constructor(fields, edit, previews, handlers) {
    Object.assign(this, { fields, edit, previews, handlers, busy: true, stop: new AbortController() });
    this.image = el("img", { alt: "", hidden: true });
    this.status = el("p", { class: "tile-status" }, "Waiting to be sent");
    this.bar = el("progress", { max: 1, value: 0, "aria-label": "Steps taken" });
    this.cancelButton = el("button", { type: "button", class: "small", click: () => this.cancel() }, "Cancel");
    this.overlay = el("div", { class: "overlay" }, this.status, this.bar, this.cancelButton);
    this.frame = el("div", { class: "frame" }, this.image, this.overlay);
    this.caption = el("div", { class: "tile-caption" });
    this.element = el("figure", { class: "tile", "data-state": "waiting" }, this.frame, this.caption);
    const [width, height] = (fields.size ?? "1x1").split("x").map(Number);
    if (width && height) {
      this.frame.style.aspectRatio = `${width} / ${height}`;
      this.element.style.maxWidth = `${Math.max(280, 3 * width)}px`; // a small picture is not blown up
    }
  }

  set(state, text, progress = null) {
    this.element.dataset.state = state;
    if (this.status.textContent !== text) this.status.textContent = text;
    if (progress === null) this.bar.removeAttribute("value");
    else this.bar.value = progress;
  }

  async draw() {
    const signal = this.stop.signal;
    for (let tries = 0; ; tries += 1) {
      try {
        this.set("waiting", "Sending");
        for await (const event of events(...(await this.request()), signal)) this.on(event);
        return;
      } catch (error) {
        if (signal.aborted) return;
        try {
          if (error instanceof Away) {
            this.set("away", "The server is away. This goes on when it is back.");
            await serverBack(signal);
            tries = -1;
          } else if (LATER.includes(error.code) && tries < MOST_RETRIES) {
            await this.wait(error);
          } else {
            this.fail(error);
            return;
          }
        } catch {
          return; // cancelled meanwhile
        }
      }
    }
  }

  async request() {
    const body = { ...this.fields, stream: true, progress: true, partial_images: this.previews };
    delete body.n;
    if (!this.edit) return ["v1/images/generations", body];
    const form = new FormData();
    for (const { blob, name } of this.edit.images) form.append("image", blob, name);
    if (this.edit.mask) form.append("mask", this.edit.mask, "mask.png");
    for (const [name, value] of Object.entries(body)) form.append(name, value);
    return ["v1/images/edits", form];
  }

  /** Until the server wants to be asked again; says so. */
  async wait(error) {
    for (let left = Math.ceil(error.retryAfter ?? 2); left > 0; left -= 1) {
      this.set("away", `${error.message} Trying again in ${left} s.`);
      await new Promise((resolve, reject) => {
        const timer = setTimeout(resolve, 1000);
        this.stop.signal.addEventListener("abort", () => (clearTimeout(timer), reject(this.stop.signal.reason)));
      });
    }
  }

  on(event) {
    const kind = event.type.split(".").pop();
    if (kind === "progress") this.progress(event);
    else if (kind === "partial_image") this.show(blobOf(event));
    else if (kind === "completed") this.finish(event);
  }

  progress({ status, ahead, steps, total_steps: total, left_s: left }) {
    if (status === "waiting") {
      const place = ahead ? `${ahead} ahead in line` : "Next in line";
      this.set("waiting", `${place} · ${duration(left)}`);
    } else if (status === "running") {
      this.set("drawing", `Step ${steps} of ${total} · ${duration(left)} left`, steps / total);
    } else {
      this.set("drawing", "Finishing", 1);
    }
  }

  show(blob) {
    const before = this.image.src;
    this.image.src = URL.createObjectURL(blob);
    this.image.hidden = false;
    if (before) URL.revokeObjectURL(before);
  }

  finish(event) {
    const blob = blobOf(event);
    this.show(blob);
    this.busy = false;
    const { type, b64_json: _, usage: __, ...facts } = event;
    const fields = { ...this.fields, seed: facts.seed ?? this.fields.seed };
    const picture = { blob, fields, facts, created: Date.now(), edited: Boolean(this.edit) };
    this.image.alt = this.fields.prompt;
    this.element.dataset.state = "done";
    this.overlay.hidden = true;
    const action = ([name, label, call], index) =>
      index
        ? el(
            "button",
            {
              type: "button",
              class: "icon-button",
              "aria-label": label,
              title: label,
              click: () => call(picture),
            },
            icon(name),
          )
        : el("button", { type: "button", class: "small", click: () => call(picture) }, icon(name), label);
    this.caption.append(
      el("p", { class: "tile-facts" }, `Seed ${fields.seed}${spent(facts.timings)}`),
      el("div", { class: "actions" }, ...this.handlers.actions.map(action)),
    );
    this.frame.append(
      el("button", {
        type: "button",
        class: "open",
        "aria-label": `Look at the picture with seed ${fields.seed}`,
        click: () => this.handlers.look(picture),
      }),
    );
    if (facts.prompt_truncated) this.caption.append(el("p", { class: "hint" }, "The end of the prompt was not read."));
    announce(`Picture with seed ${fields.seed} is done`);
    this.handlers.finished(picture);
    this.handlers.ended();
  }

  fail(error) {
    if (error instanceof ApiError && error.status < 500 && error.status !== 429) {
      this.busy = false;
      this.handlers.refuse(error);
      return;
    }
    this.end("failed", error.message);
    this.cancelButton.replaceWith(
      (this.cancelButton = el("button", { type: "button", class: "small", click: () => this.again() }, "Try again")),
    );
    announce(error.message);
  }

  again() {
    this.busy = true;
    this.cancelButton.replaceWith(
      (this.cancelButton = el("button", { type: "button", class: "small", click: () => this.cancel() }, "Cancel")),
    );
    this.handlers.send(this);
  }

  cancel() {
    if (!this.busy) return;
    this.end("cancelled", "Cancelled");
    this.cancelButton.hidden = true;
    this.stop.abort();
    announce("Cancelled");
  }

  end(state, text) {
    this.busy = false;
    this.set(state, text, 0);
    this.handlers.ended();
  }
}

/** How long the picture took, from its timings. */
function spent(timings = {}) {
  const seconds = ["queue_s", "denoise_s", "decode_s", "encode_s"].reduce((sum, name) => sum + (timings[name] ?? 0), 0);
  return seconds ? ` · ${duration(seconds)}` : "";
}

function blobOf(event) {
  const bytes = Uint8Array.from(atob(event.b64_json), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: `image/${event.output_format ?? "png"}` });
}

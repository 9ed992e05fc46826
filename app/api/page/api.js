// The API's client: JSON and streams, errors in its own sentences, the key, and whether the server is there.

const KEY = "imagine-api-key"; // in sessionStorage: of this tab, until it is closed
const AWAY_POLL_MS = 1500;

/** A refusal or failure, in the API's sentence. `param` names the field. */
export class ApiError extends Error {
  constructor(status, { message, param = null, code = "" }, retryAfter = null) {
    super(message);
    this.status = status;
    this.param = param;
    this.code = code;
    this.retryAfter = retryAfter; // seconds
  }
}

/** The server could not be reached, or the connection broke. */
export class Away extends Error {}

export const connection = new EventTarget(); // "change" when `state` does: starting, ready, away
connection.state = "starting";
connection.keyed = false; // whether the server has asked for a key

let askForKey = async () => null; // set by main.js: shows the dialog and returns the key
let asking = null;

export function onKeyNeeded(ask) {
  askForKey = ask;
}

export function key() {
  return sessionStorage.getItem(KEY);
}

function setState(state) {
  if (connection.state === state) return;
  connection.state = state;
  connection.dispatchEvent(new Event("change"));
  if (state === "away") waitForServer();
}

async function waitForServer() {
  while (connection.state === "away") {
    await new Promise((resolve) => setTimeout(resolve, AWAY_POLL_MS));
    try {
      const answer = await fetch("healthz", { cache: "no-store" });
      if (answer.ok) setState("ready");
    } catch {
      // still away
    }
  }
}

/** Resolves once the server is there; rejects with the signal's reason. */
export function serverBack(signal) {
  if (connection.state !== "away") return Promise.resolve();
  return new Promise((resolve, reject) => {
    const changed = () => connection.state === "ready" && finish(resolve);
    const aborted = () => finish(() => reject(signal.reason));
    const finish = (settle) => {
      connection.removeEventListener("change", changed);
      signal?.removeEventListener("abort", aborted);
      settle();
    };
    connection.addEventListener("change", changed);
    signal?.addEventListener("abort", aborted);
  });
}

export async function getJson(path) {
  const response = await request(path, {});
  try {
    return await response.json();
  } catch (error) {
    throw lost(error);
  }
}

/** Asks once more where the server wants a key. Throws ApiError, Away, or the signal's reason. */
async function request(path, options, wrongKey = false) {
  const headers = { ...options.headers };
  const sent = key();
  if (sent) headers.Authorization = `Bearer ${sent}`;
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options, headers });
  } catch (error) {
    throw lost(error, options.signal);
  }
  if (response.ok) {
    setState("ready");
    return response;
  }
  const error = await errorOf(response);
  // A proxy in front of a server that is down, or Serve's own before the application is deployed.
  if (error.status === 502 || error.code === "not_found") throw lost(error);
  if (error.status !== 401) throw error;
  connection.keyed = true;
  if (key() === sent) {
    sessionStorage.removeItem(KEY);
    const problem = sent || wrongKey ? error.message : "";
    asking ??= askForKey(problem).finally(() => (asking = null)); // all requests wait for one dialog
    const entered = await asking;
    if (!entered) throw error;
    sessionStorage.setItem(KEY, entered);
  }
  return request(path, options, true);
}

async function errorOf(response) {
  const after = Number(response.headers.get("Retry-After"));
  const retryAfter = Number.isFinite(after) && after > 0 ? after : null;
  let body = {};
  try {
    body = await response.json();
  } catch {
    // not the API: a proxy
  }
  return new ApiError(response.status, body.error ?? { message: `The server answers ${response.status}.` }, retryAfter);
}

function lost(error, signal) {
  if (signal?.aborted) return signal.reason;
  setState("away");
  return new Away(error.message);
}

/** The events of a streamed request. Leaving the loop, or the signal, closes the connection and so frees the slot. */
export async function* events(path, body, signal) {
  const form = body instanceof FormData;
  const response = await request(path, {
    method: "POST",
    body: form ? body : JSON.stringify(body),
    headers: form ? {} : { "Content-Type": "application/json" },
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      let chunk;
      try {
        chunk = await reader.read();
      } catch (error) {
        throw lost(error, signal);
      }
      if (chunk.done) throw lost(new Error("the answer ended early"));
      text += chunk.value;
      const parts = text.split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        const event = parsed(part);
        if (!event) continue; // a comment, which keeps the connection open
        if (event.type === "error") throw new ApiError(503, event.error);
        yield event;
        if (event.type.endsWith(".completed")) return;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(part) {
  const data = part
    .split("\n")
    .filter((line) => line.startsWith("data:"))
    .map((line) => line.slice(5).trim())
    .join("\n");
  return data ? JSON.parse(data) : null;
}

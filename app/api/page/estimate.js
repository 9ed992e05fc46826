// Predicts from GET /v1/stats how long a request would wait and take, before it is sent.

import { duration, plural } from "./dom.js";

/** The sentence below the button; empty where the statistics do not allow a prediction. */
export function estimate(stats, fields) {
  const replicas = Object.values(stats?.replicas ?? {}).filter((replica) => !replica.error);
  if (!replicas.length) return stats ? "No replica answers yet. A request may wait until one has started." : "";
  const waits = replicas.map((replica) => replica.backlog_s ?? 0);
  const images = replicas.map((replica) => imageSeconds(replica, fields));
  if (images.some((seconds) => !(seconds > 0))) return "";
  const drawing = Math.max(...images) * Math.ceil(fields.n / replicas.length);
  const wait = Math.min(...waits) + (stats.queue?.waiting_s ?? 0) / replicas.length;
  const waiting = (stats.total?.waiting ?? 0) + (stats.queue?.waiting ?? 0);
  const total = `About ${duration(wait + drawing)}`;
  if (wait < 0.2) return `${total}. Nothing else waits.`;
  return `${total}: ${duration(wait)} for what is under way${waiting ? `, ${plural(waiting, "request")} waiting` : ""}.`;
}

/** Device-seconds of the steps of one image. */
function imageSeconds(replica, fields) {
  const steps = replica.sizes?.[fields.size]?.step_s ?? {};
  const rows = fields.guidance_scale > 1 ? 2 : 1;
  const buckets = Object.keys(steps)
    .map(Number)
    .sort((a, b) => a - b);
  const bucket = buckets.find((candidate) => candidate >= rows);
  const share = fields.strength ?? 1; // an edit takes this share of the steps
  return bucket ? steps[bucket] * fields.num_inference_steps * share : NaN;
}

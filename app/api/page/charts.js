// Two small charts over the last minute, as SVG whose words are HTML.

import { el, svg } from "./dom.js";

const [WIDTH, HEIGHT] = [600, 120];

/** Bars of stacked shares. `parts` are {name, label}; a bar is {from, to, ...share by name}, with times from 0 to 1. */
export function stacked(place, parts, bars, label) {
  const drawn = bars.flatMap((bar) => {
    let top = HEIGHT;
    return parts.map(({ name }) => {
      const height = HEIGHT * Math.min(1, bar[name]);
      top -= height;
      const width = Math.max(1, (bar.to - bar.from) * WIDTH - 1);
      return svg("rect", {
        x: bar.from * WIDTH,
        y: top,
        width,
        height: Math.max(0, height),
        class: `part-${name}`,
      });
    });
  });
  show(place, drawn, parts, label, ["100 %", "0"]);
}

/** Lines in steps. Each of `points` is {at, ...value by name}. */
export function lines(place, parts, points, label) {
  const most = Math.max(4, ...points.flatMap((point) => parts.map(({ name }) => point[name])));
  const drawn = parts.map(({ name }) => {
    const path = points.map((point, index) => {
      const [x, y] = [point.at * WIDTH, HEIGHT - 2 - (point[name] / most) * (HEIGHT - 8)];
      return index ? `H${x.toFixed(1)}V${y.toFixed(1)}` : `M${x.toFixed(1)} ${y.toFixed(1)}`;
    });
    return svg("path", {
      d: path.join("") || "M0 0",
      class: `line-${name}`,
      "vector-effect": "non-scaling-stroke",
    });
  });
  show(place, drawn, parts, label, [String(most), "0"]);
}

function show(place, drawn, parts, label, [top, bottom]) {
  const chart = svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": label },
    ...[0.25, 0.5, 0.75].map((y) => svg("path", { d: `M0 ${HEIGHT * y}H${WIDTH}`, class: "grid" })),
    ...drawn,
  );
  place.replaceChildren(
    el(
      "div",
      { class: "chart" },
      el("span", { class: "axis axis-top" }, top),
      chart,
      el("span", { class: "axis axis-bottom" }, bottom),
    ),
    el("div", { class: "time-axis" }, el("span", {}, "1 min ago"), el("span", {}, "now")),
    el("ul", { class: "legend" }, ...parts.map((part) => el("li", { class: `key-${part.name}` }, part.label))),
  );
}

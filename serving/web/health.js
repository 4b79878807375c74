"use strict";

// How well the collection is searched: its size and model, and the measured curve of recall.

const PLOT = { width: 640, height: 300, left: 62, right: 104, top: 14, bottom: 44 };

async function showHealth() {
  const found = await readCollection();
  if (!found) return;
  byId("health-facts").replaceChildren(
    ...Object.entries({
      items: found.items.toLocaleString("en"),
      pictures: found.images.toLocaleString("en"),
      texts: found.texts.toLocaleString("en"),
      model: `${found.model}, fingerprint ${found.fingerprint.slice(0, 12)}`,
    }).flatMap(factElements),
  );
  const measured = found.measurement;
  const note = measured
    ? `Share of the 10 nearest found, of ${measured.items.toLocaleString("en")} items; the target is ` +
      `${measured.target}${measured.meets_target ? "" : ", which is not reached"}. In bold: what is used.`
    : "Every search compares all items, so nothing is missed.";
  say(byId("health-note"), note);
  byId("health-curve").hidden = !measured;
  byId("health-plot").toggleAttribute("hidden", !measured);
  if (measured) {
    showCurve(measured);
    plotCurve(measured);
  }
}

function isUsed(point, measured) {
  return JSON.stringify(point) === JSON.stringify(measured.chosen);
}

function showCurve(measured) {
  const kinds = Object.keys(measured.queries);
  const row = (cells, tag, className = "") => {
    const made = element("tr", className);
    made.append(...cells.map((text) => element(tag, "", text)));
    return made;
  };
  const body = measured.curve.map((point) => {
    const name = point.probes === null ? "exact" : `${point.probes} probes × ${point.refine}`;
    const shares = kinds.map((kind) => point.recall[kind].toFixed(3));
    const className = isUsed(point, measured) ? "used" : "";
    return row([name, ...shares, point.milliseconds.toFixed(1)], "td", className);
  });
  byId("health-head").replaceChildren(row(["search", ...kinds, "ms"], "th"));
  byId("health-body").replaceChildren(...body);
}

/** Recall against time, a line for each kind of query; the table has the same numbers. */
function plotCurve(measured) {
  const { width, height, left, right, top, bottom } = PLOT;
  const kinds = Object.keys(measured.queries);
  const points = [...measured.curve].sort((a, b) => a.milliseconds - b.milliseconds);
  const times = points.map((point) => Math.log(Math.max(point.milliseconds, 0.01)));
  const shares = points.flatMap((point) => kinds.map((kind) => point.recall[kind]));
  const lowest = Math.max(0, Math.min(0.9, ...shares) - 0.02);
  const x = scaled(times, left, width - right);
  const y = scaled([lowest, 1], height - bottom, top);
  const drawn = [...axes(points, times, x, y, lowest)];
  drawn.push(shape("path", { class: "target", d: `M${left},${y(measured.target)}H${width - right}` }));
  drawn.push(shape("text", { x: width - right + 8, y: y(measured.target) + 16 }, "target"));
  for (const kind of kinds) {
    const places = points.map((point, n) => `${x(times[n])},${y(point.recall[kind])}`);
    drawn.push(shape("polyline", { class: `line ${kind}`, points: places.join(" ") }));
    points.forEach((point, n) => {
      const used = isUsed(point, measured);
      const at = { cx: x(times[n]), cy: y(point.recall[kind]), r: used ? 6 : 3 };
      drawn.push(shape("circle", { class: `dot ${kind}${used ? " used" : ""}`, ...at }));
    });
  }
  kinds.forEach((kind, n) => {
    const down = height - bottom - 26 * (kinds.length - n) + 8;
    drawn.push(shape("circle", { class: `dot ${kind}`, cx: width - right + 14, cy: down - 5, r: 4 }));
    drawn.push(shape("text", { x: width - right + 24, y: down }, kind));
  });
  const plot = byId("health-plot");
  plot.replaceChildren(...drawn);
  plot.setAttribute(
    "aria-label",
    `Recall against milliseconds for ${kinds.join(", ")} queries; large dots are what is used. ` +
      "The table below has the numbers.",
  );
}

function axes(points, times, x, y, lowest) {
  const { width, height, left, right, bottom } = PLOT;
  const marks = [lowest, (1 + lowest) / 2, 1].flatMap((share) => [
    shape("path", { class: "grid", d: `M${left},${y(share)}H${width - right}` }),
    shape("text", { x: left - 8, y: y(share) + 5, "text-anchor": "end" }, share.toFixed(2)),
  ]);
  const ends = [...new Set([0, points.length - 1])].map((n) =>
    shape(
      "text",
      { x: x(times[n]), y: height - bottom + 20, "text-anchor": "middle" },
      `${points[n].milliseconds.toFixed(1)} ms`,
    ),
  );
  const middle = { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" };
  return [...marks, ...ends, shape("text", middle, "time of a search")];
}

showHealth().catch(() => {}); // a search tells what is wrong

"use strict";

// The map: pictures and captions of a sample, as stored or centred. What it shows to the eye is in
// the table below it too.

const MAP = { width: 640, height: 480, margin: 14 };
let map = null;
let marks = []; // one a point of the map

async function drawMap(event) {
  event.preventDefault();
  const status = byId("map-status");
  say(status, "Looking…");
  try {
    const found = await readCollection("/map");
    if (!found) return;
    map = found;
  } catch (error) {
    return say(status, error.message, true);
  }
  for (const id of ["map-drawn", "map-details"]) byId(id).hidden = !map.points.length;
  byId("map-views").disabled = !map.centred;
  if (!map.centred) document.querySelector("[name=view][value=raw]").checked = true;
  if (!map.points.length) return say(status, "Nothing is stored yet.");
  makeMarks();
  showView();
}

/** It showed another collection. */
function forgetMap() {
  map = null;
  for (const id of ["map-drawn", "map-details"]) byId(id).hidden = true;
  byId("map-views").disabled = true;
  say(byId("map-status"), "");
}

function makeMarks() {
  marks = map.points.map((point) => {
    const isImage = point.modality === "image";
    const mark = isImage
      ? shape("circle", { r: 5, class: "mark image" })
      : shape("rect", { x: -4, y: -4, width: 8, height: 8, class: "mark text" });
    mark.addEventListener("pointerenter", () => showPoint(point));
    mark.addEventListener("click", () => showPoint(point));
    return mark;
  });
  byId("map-plot").replaceChildren(shape("path", { id: "map-pair", class: "pair" }), ...marks);
}

function chosenView() {
  return document.querySelector("[name=view]:checked").value;
}

function placeIn(view) {
  const { width, height, margin } = MAP;
  const places = map.points.map((point) => point[view]);
  const [xs, ys] = [0, 1].map((axis) => places.map((place) => place[axis]));
  // One unit is as long in both directions, or distances would lie.
  const [spanX, spanY] = [xs, ys].map((all) => Math.max(...all) - Math.min(...all));
  const unit = Math.min((width - 2 * margin) / (spanX || 1), (height - 2 * margin) / (spanY || 1));
  const middle = (all) => (Math.max(...all) + Math.min(...all)) / 2;
  const [middleX, middleY] = [middle(xs), middle(ys)];
  return ([x, y]) => [width / 2 + unit * (x - middleX), height / 2 - unit * (y - middleY)];
}

function showView() {
  const view = chosenView();
  const place = placeIn(view);
  map.points.forEach((point, number) => {
    const [x, y] = place(point[view]);
    marks[number].style.transform = `translate(${x.toFixed(1)}px, ${y.toFixed(1)}px)`;
  });
  byId("map-pair").removeAttribute("d");
  const { gap, explained_fraction: share } = map[view];
  const pictures = map.points.filter((point) => point.modality === "image").length;
  const counts = `${pictures} pictures and ${map.points.length - pictures} texts`;
  const apart = gap === null ? "" : ` The two kinds lie ${gap.toFixed(2)} apart.`;
  const missing = map.centred ? "" : " This model has no means to centre by.";
  const told =
    `${counts} of ${map.items.toLocaleString("en")} items.${apart} These two directions hold ` +
    `${Math.round(100 * share)}% of the variance.${missing}`;
  say(byId("map-status"), told);
  byId("map-plot").setAttribute("aria-label", `Map, ${view === "raw" ? "as stored" : "centred"}: ${told}`);
  showTable(view);
}

function showPoint(point) {
  const view = chosenView();
  const place = placeIn(view);
  const name = point.text || point.id;
  const other = map.points.find((each) => each.id === point.id && each !== point);
  marks.forEach((mark, number) => {
    mark.classList.toggle("chosen", map.points[number].id === point.id);
  });
  const path = other ? `M${place(point[view])}L${place(other[view])}` : "";
  byId("map-pair").setAttribute("d", path);
  const box = byId("map-point");
  box.replaceChildren();
  if (point.thumbnail) {
    const image = new Image(128, 128);
    image.src = point.thumbnail;
    image.alt = "";
    box.append(image);
  }
  const more = element("button", "button", "More like this");
  more.type = "button";
  more.addEventListener("click", () => searchById(point, name));
  box.append(element("p", "", name), more);
}

function showTable(view) {
  const rows = map.points.map((point) => {
    const row = document.createElement("tr");
    const heading = element("th", "");
    heading.scope = "row";
    const button = element("button", "link", point.text || point.id);
    button.type = "button";
    button.addEventListener("click", () => showPoint(point));
    heading.append(button);
    const kind = point.modality === "image" ? "picture" : "text";
    const numbers = point[view].map((value) => element("td", "", value.toFixed(3)));
    row.append(heading, element("td", "words", kind), ...numbers);
    return row;
  });
  byId("map-body").replaceChildren(...rows);
}

byId("map-form").addEventListener("submit", drawMap);
byId("map-views").addEventListener("change", showView);

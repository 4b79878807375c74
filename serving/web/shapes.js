"use strict";

// Drawing with SVG: shapes, and from numbers to places.

function shape(tag, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

/** From the range of some numbers to [from, to]; equal numbers all go to the middle. */
function scaled(values, from, to) {
  const low = Math.min(...values);
  const span = Math.max(...values) - low;
  return (value) => (span ? from + ((value - low) / span) * (to - from) : (from + to) / 2);
}

"use strict";

// One page, no build step: talks to its own server alone. This is searching, and what all sections
// share; what is added to a search (parts, filters, pages) is in question.js, where it looks in
// collection.js, the other sections in playground.js, map.js and health.js.

const byId = (id) => document.getElementById(id);
const LIMIT = 24;
const TYPING_PAUSE_MS = 180;

/* ---- talking to the server ---- */

function ask(path, body, signal, method = "POST") {
  const headers = { "content-type": "application/json" };
  return answered(fetch(path, { method, body: JSON.stringify(body), headers, signal }));
}

function read(path) {
  return answered(fetch(path));
}

async function answered(asking) {
  const response = await asking;
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.detail || `the server answered ${response.status}`);
  return answer;
}

/** Runs one task at a time: a newer one cancels the older, whose answer is then ignored. */
function latest(task, status) {
  let controller = null;
  return async (...values) => {
    if (controller) controller.abort();
    const own = (controller = new AbortController());
    try {
      await task(own.signal, ...values);
    } catch (error) {
      if (error.name !== "AbortError") say(status, error.message, true);
    }
  };
}

function say(element, text, isError = false) {
  element.textContent = text;
  element.classList.toggle("error", isError);
}

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

/* ---- search ---- */

let bestHit = null;
let question = null;
let named = "";

const search = latest(async (signal, body, description) => {
  const list = byId("results");
  list.setAttribute("aria-busy", "true");
  try {
    question = body; // kept by question.js, which adds parts and filters to it
    named = description;
    const whole = asked(body);
    showResults(await ask("/v1/search", whole, signal), asNamed(description), whole);
  } finally {
    if (!signal.aborted) list.removeAttribute("aria-busy");
  }
}, byId("status"));

function searchByText(text) {
  const query = text.trim();
  showQueryImage(null);
  history.replaceState(null, "", addressOf(query));
  if (query) search({ text: query, limit: LIMIT }, `“${query}”`);
  else if (isArranged()) search({ limit: LIMIT }, "");
}

async function searchByImage(file) {
  byId("query").value = "";
  showQueryImage(URL.createObjectURL(file), "The picture you search with");
  search({ image: await dataUrl(file), limit: LIMIT }, "your picture");
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.replace(/^data:[^,]*,/, ""));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function searchById(hit, name) {
  byId("query").value = "";
  showQueryImage(hit.thumbnail, name);
  search({ id: hit.id, limit: LIMIT }, `the picture “${name}”`);
  byId("search").scrollIntoView();
}

function showQueryImage(source, description) {
  const box = byId("query-image");
  for (const old of box.children) URL.revokeObjectURL(old.src);
  box.replaceChildren();
  box.hidden = !source;
  if (!source) return;
  const image = new Image();
  image.src = source;
  image.alt = description;
  box.append(image);
}

function showResults(answer, description, body) {
  const count = answer.results.length;
  bestHit = answer.results.find((hit) => hit.thumbnail) || null;
  const list = byId("results");
  const focused = list.contains(document.activeElement);
  list.replaceChildren(...answer.results.map(hitElement));
  offerMore(body, answer.next);
  rememberKeys(answer.results);
  if (focused) list.focus({ preventScroll: true });
  const size = answer.items.toLocaleString("en");
  const time = `${Math.max(1, Math.round(answer.milliseconds))} ms`;
  say(
    byId("status"),
    count
      ? `The ${count} of ${size} pictures nearest to ${description}, in ${time}`
      : answer.items
        ? "Nothing fulfils the filters."
        : "Nothing is stored yet: add pictures with vlm index, or POST /v1/items.",
  );
}

function hitElement(hit) {
  const name = hit.text || hit.id;
  const button = element("button", "hit");
  button.type = "button";
  button.title = "More like this";
  if (hit.thumbnail) {
    const image = new Image(128, 128);
    image.src = hit.thumbnail;
    image.alt = "";
    button.append(image);
  } else {
    button.append(element("span", "no-picture"));
  }
  const style = String(hit.metadata.style || "").replaceAll("_", " ");
  const score = element("span", "score", hit.score.toFixed(3));
  if (style) score.append(element("span", "style", ` · ${style}`));
  // Heard as: NAME, similarity 0.839 · style. More like this.
  const [before, after] = [", similarity", ". More like this."].map((text) =>
    element("span", "visually-hidden", text),
  );
  button.append(element("span", "name", name), before, score, after);
  button.addEventListener("click", () => searchById(hit, name));
  const item = document.createElement("li");
  item.append(button, toolsOf(hit, name));
  return item;
}

/* ---- wiring ---- */

function afterPause(action) {
  let timer = 0;
  const cancel = () => clearTimeout(timer);
  const start = () => {
    cancel();
    timer = setTimeout(action, TYPING_PAUSE_MS);
  };
  return { start, cancel };
}

function takePictures(buttonId, inputId, use) {
  const input = byId(inputId);
  byId(buttonId).addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    if (input.files[0]) use(input.files[0]);
    input.value = "";
  });
}

/** A dropped or pasted picture goes to the section it was meant for. */
function takeTransfer(event, transfer) {
  const files = [...(transfer?.files || [])].filter((each) => each.type.startsWith("image/"));
  if (!files.length) return;
  event.preventDefault();
  const shot = event.target.closest?.(".shot");
  if (shot) addExamples(shot.dataset.label, files);
  else if (byId("classify").contains(event.target)) chooseForClassification(files[0]);
  else searchByImage(files[0]);
}

const typing = afterPause(() => searchByText(byId("query").value));

byId("query").addEventListener("input", typing.start);
byId("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  typing.cancel(); // Enter has asked already; a second answer would take the focus away
  searchByText(byId("query").value);
});
byId("examples").addEventListener("click", ({ target }) => {
  if (!target.classList.contains("chip")) return;
  byId("query").value = target.textContent;
  searchByText(target.textContent);
});
takePictures("search-pick", "search-file", searchByImage);

document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.matches("input, textarea, select")) return;
  event.preventDefault();
  byId("query").focus();
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  takeTransfer(event, event.dataTransfer);
});
document.addEventListener("paste", (event) => takeTransfer(event, event.clipboardData));

const model = read("/v1/model");
model
  .then(({ name, fingerprint, dim }) => {
    byId("about").textContent =
      `Model ${name}, fingerprint ${fingerprint.slice(0, 12)}, ${dim} dimensions. ` +
      "Everything on this page comes from this server.";
  })
  .catch(() => {});

// After the other scripts too.
document.addEventListener("DOMContentLoaded", () => {
  byId("query").value = new URLSearchParams(location.search).get("q") || "red apple";
  searchByText(byId("query").value);
});

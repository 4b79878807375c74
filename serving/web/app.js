"use strict";

// One page, no build step: talks to /v1/search, /v1/classify and /v1/model of its own server.

const byId = (id) => document.getElementById(id);
const LIMIT = 24;
const TYPING_PAUSE_MS = 180;

/* ---- talking to the server ------------------------------------------------------------------ */

async function ask(path, body, signal) {
  const upload = body instanceof FormData;
  const response = await fetch(path, {
    method: "POST",
    body: upload ? body : JSON.stringify(body),
    headers: upload ? {} : { "content-type": "application/json" },
    signal,
  });
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

/* ---- search ---------------------------------------------------------------------------------- */

function uploadOf(field, file, more = {}) {
  const form = new FormData();
  form.append(field, file);
  for (const [name, value] of Object.entries(more)) form.append(name, value);
  return form;
}

function showQueryImage(source, description) {
  const box = byId("query-image");
  box.replaceChildren();
  box.hidden = !source;
  if (!source) return;
  const image = new Image();
  image.src = source;
  image.alt = description;
  box.append(image);
}

function showResults(answer, description) {
  const list = byId("results");
  list.replaceChildren(...answer.results.map(hitElement));
  const count = answer.results.length;
  say(
    byId("status"),
    count
      ? `${count} nearest of ${answer.items.toLocaleString("en")} to ${description}, in ${Math.round(answer.milliseconds)} ms`
      : "Nothing is stored yet: add pictures with vlm index, or POST /v1/items.",
  );
}

function hitElement(hit) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.className = "hit";
  button.title = "More like this";
  const name = hit.text || hit.id;
  if (hit.thumbnail) {
    const image = new Image();
    image.src = hit.thumbnail;
    image.alt = "";
    image.width = image.height = 128;
    button.append(image);
  } else {
    const empty = document.createElement("span");
    empty.className = "no-picture";
    button.append(empty);
  }
  const label = document.createElement("span");
  label.className = "name";
  label.textContent = name;
  const score = document.createElement("span");
  score.className = "score";
  score.textContent = [hit.score.toFixed(3), hit.metadata.style].filter(Boolean).join(" · ");
  button.append(label, score);
  button.setAttribute("aria-label", `${name}, similarity ${hit.score.toFixed(2)}. More like this.`);
  button.addEventListener("click", () => searchById(hit, name));
  item.append(button);
  return item;
}

const search = latest(async (signal, body, description) => {
  say(byId("status"), "Searching…");
  showResults(await ask("/v1/search", body, signal), description);
}, byId("status"));

function searchByText(text) {
  showQueryImage(null);
  if (!text.trim()) {
    byId("results").replaceChildren();
    say(byId("status"), "");
    return;
  }
  search({ text: text.trim(), limit: LIMIT }, `“${text.trim()}”`);
}

function searchByImage(file) {
  byId("query").value = "";
  showQueryImage(URL.createObjectURL(file), "The picture you search with");
  search(uploadOf("image", file, { limit: LIMIT }), "your picture");
}

function searchById(hit, name) {
  byId("query").value = "";
  showQueryImage(hit.thumbnail, name);
  search({ id: hit.id, limit: LIMIT }, `the picture “${name}”`);
  byId("search").scrollIntoView();
}

/* ---- classification -------------------------------------------------------------------------- */

let classifyFile = null;

const classify = latest(async (signal) => {
  const labels = [...new Set(byId("labels").value.split("\n").map((l) => l.trim()).filter(Boolean))];
  if (!classifyFile) return say(byId("classify-status"), "Choose a picture to see probabilities.");
  if (!labels.length) return say(byId("classify-status"), "Type at least one label.", true);
  const form = uploadOf("images", classifyFile, { top_k: Math.min(labels.length, 1000) });
  for (const label of labels) form.append("labels", label);
  const answer = await ask("/v1/classify", form, signal);
  byId("bars").replaceChildren(...answer.results[0].predictions.map(barElement));
  say(byId("classify-status"), "Probabilities among your labels:");
}, byId("classify-status"));

function barElement(prediction) {
  const item = document.createElement("li");
  const label = document.createElement("span");
  label.className = "label";
  label.textContent = prediction.label;
  const track = document.createElement("span");
  track.className = "track";
  const fill = document.createElement("span");
  fill.className = "fill";
  fill.style.width = `${100 * prediction.probability}%`;
  track.append(fill);
  const value = document.createElement("span");
  value.className = "value";
  value.textContent = `${(100 * prediction.probability).toFixed(1)}%`;
  item.dataset.probability = prediction.probability;
  item.append(label, track, value);
  return item;
}

function chooseForClassification(file) {
  classifyFile = file;
  const preview = byId("classify-preview");
  preview.src = URL.createObjectURL(file);
  preview.alt = `The picture to classify: ${file.name}`;
  preview.hidden = false;
  byId("drop-hint").textContent = file.name;
  classify();
}

/* ---- wiring ---------------------------------------------------------------------------------- */

function afterPause(action) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, TYPING_PAUSE_MS);
  };
}

function firstImage(transfer) {
  return [...(transfer?.files || [])].find((file) => file.type.startsWith("image/"));
}

function takePictures(inputId, labelId, use) {
  const input = byId(inputId);
  input.addEventListener("change", () => {
    if (input.files[0]) use(input.files[0]);
    input.value = "";
  });
  byId(labelId).addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      input.click();
    }
  });
}

byId("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  searchByText(byId("query").value);
});
byId("query").addEventListener("input", afterPause(() => searchByText(byId("query").value)));
for (const button of document.querySelectorAll(".example")) {
  button.addEventListener("click", () => {
    byId("query").value = button.textContent;
    searchByText(button.textContent);
  });
}
takePictures("search-file", "search-file-label", searchByImage);
takePictures("classify-file", "classify-file-label", chooseForClassification);
byId("labels").addEventListener("input", afterPause(classify));

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
  const file = firstImage(event.dataTransfer);
  if (!file) return;
  if (byId("classify").contains(event.target)) chooseForClassification(file);
  else searchByImage(file);
});
document.addEventListener("paste", (event) => {
  const file = firstImage(event.clipboardData);
  if (file) searchByImage(file);
});

fetch("/v1/model")
  .then((response) => response.json())
  .then((model) => {
    byId("about").textContent =
      `Model ${model.name}, fingerprint ${model.fingerprint.slice(0, 12)}, ${model.dim} dimensions. Everything on this page comes from this server.`;
  })
  .catch(() => {});

byId("query").value = "red apple";
searchByText("red apple");

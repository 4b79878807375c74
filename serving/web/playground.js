"use strict";

// Classification: labels of one's own or a stored set, how they are asked about, and the probabilities
// of one picture among them, again after every change. Examples of a label are in examples.js.

let stored = null; // the label set that was chosen
let picture = null; // data URL of what is classified

/* ---- what is asked ---- */

function ownLabels() {
  const lines = byId("labels").value.split("\n").map((line) => line.trim());
  return [...new Set(lines.filter(Boolean))];
}

function templates() {
  const chosen = byId("template").value;
  return [chosen === "own" ? byId("own-template").value : chosen];
}

/** Classes as the server takes them: a label alone, or with its examples. */
function ownClasses() {
  const weight = Number(byId("image-weight").value);
  return ownLabels().map((label) => {
    const images = examples.get(label) || [];
    return images.length ? { label, images, image_weight: weight } : label;
  });
}

const classify = latest(async (signal) => {
  const status = byId("classify-status");
  const labels = ownLabels();
  if (!picture) return say(status, "Choose a picture to see probabilities.");
  if (!labels.length) return say(status, "Type at least one label.", true);
  if (!stored && byId("template").value === "own" && !templates()[0].includes("{}")) {
    return say(status, "The wording has no {} where the label goes.", true);
  }
  const body = { images: [picture], top_k: labels.length };
  Object.assign(
    body,
    stored
      ? { label_set: stored.name }
      : { classes: ownClasses(), templates: templates(), mode: byId("mode").value },
  );
  const answer = await ask("/v1/classify", body, signal);
  showBars(answer.results[0].predictions);
  const none = answer.results[0].none_of_these ? " It is probably none of these." : "";
  const sure = answer.calibrated ? ", calibrated" : "";
  say(status, `Probabilities among ${stored ? `“${stored.name}”` : "your labels"}${sure}:${none}`);
}, byId("classify-status"));

const reclassify = afterPause(classify);

/* ---- bars ---- */

/** Bars keep their element as long as their label stays, so that their change is seen. */
function showBars(predictions) {
  const list = byId("bars");
  const old = new Map([...list.children].map((item) => [item.dataset.label, item]));
  list.replaceChildren(
    ...predictions.map(({ label, probability }) => {
      const item = old.get(label) || barElement(label);
      const percent = 100 * probability;
      item.dataset.probability = probability;
      item.querySelector(".fill").style.width = `${percent}%`;
      item.querySelector(".value").textContent =
        percent > 0 && percent < 0.1 ? "< 0.1%" : `${percent.toFixed(1)}%`;
      return item;
    }),
  );
}

function barElement(label) {
  const item = document.createElement("li");
  item.dataset.label = label;
  const track = element("span", "track");
  track.append(element("span", "fill"));
  item.append(element("span", "label", label), track, element("span", "value"));
  return item;
}

/* ---- the picture ---- */

async function chooseForClassification(file) {
  const preview = byId("classify-preview");
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(file);
  preview.alt = `The picture to classify: ${file.name}`;
  preview.hidden = false;
  byId("drop-hint").textContent = file.name;
  picture = await dataUrl(file);
  classify();
}

async function classifyFirstResult() {
  if (!bestHit) return say(byId("classify-status"), "Search for something first.", true);
  const { thumbnail, text, id } = bestHit;
  const content = await (await fetch(thumbnail)).blob();
  chooseForClassification(new File([content], text || id, { type: content.type }));
}

/* ---- stored sets ---- */

async function listLabelSets(chosen = "") {
  const { label_sets: names } = await read("/v1/label-sets");
  const options = names.map((name) => new Option(`the set “${name}”`, name));
  byId("label-set").replaceChildren(new Option("your own labels", ""), ...options);
  byId("label-set").value = chosen;
}

async function chooseLabelSet() {
  const name = byId("label-set").value;
  const status = byId("classify-status");
  stored = null;
  try {
    if (name) stored = await read(`/v1/label-sets/${encodeURIComponent(name)}`);
  } catch (error) {
    byId("label-set").value = "";
    say(status, error.message, true);
  }
  byId("labels").readOnly = stored !== null;
  for (const id of ["asking", "few-shot", "save-form"]) byId(id).hidden = stored !== null;
  if (stored) byId("labels").value = stored.classes.map(({ label }) => label).join("\n");
  showShots();
  if (picture) classify();
  else if (stored) say(status, `${aboutSet()} Choose a picture to see probabilities.`);
}

function aboutSet() {
  const count = stored.classes.length;
  const shots = stored.classes.reduce((sum, each) => sum + each.num_images, 0);
  return `${count} ${count === 1 ? "label" : "labels"}, ${shots} ${shots === 1 ? "example" : "examples"}.`;
}

async function keepLabelSet(event) {
  event.preventDefault();
  const name = byId("save-name").value.trim();
  const status = byId("save-status");
  const body = { classes: ownClasses(), templates: templates(), mode: byId("mode").value };
  try {
    await ask(`/v1/label-sets/${encodeURIComponent(name)}`, body, undefined, "PUT");
    await listLabelSets();
    say(status, `Kept as “${name}”: choose it above, or ask /v1/classify for it by its name.`);
  } catch (error) {
    say(status, error.message, true);
  }
}

/* ---- wiring ---- */

takePictures("classify-pick", "classify-file", chooseForClassification);
byId("classify-first").addEventListener("click", classifyFirstResult);
byId("label-set").addEventListener("change", chooseLabelSet);
byId("save-form").addEventListener("submit", keepLabelSet);
byId("labels").addEventListener("input", () => {
  showShots();
  reclassify.start();
});
byId("template").addEventListener("change", () => {
  byId("own-template-box").hidden = byId("template").value !== "own";
  classify();
});
byId("mode").addEventListener("change", classify);
byId("own-template").addEventListener("input", reclassify.start);
model
  .then(({ logit_bias: bias }) => {
    const option = byId("mode").querySelector("[value=independent]");
    option.disabled = bias === null;
    if (bias === null) option.textContent += " (not with this model)";
  })
  .catch(() => {});
listLabelSets().catch(() => {});
showShots();
classify();

"use strict";

// Examples of labels (few-shot): pictures that are dropped, pasted or chosen for one, and how much
// they count against its words.

const EXAMPLE_SIDE = 512; // on the shorter side: the server keeps no more of an example
const EXAMPLE_PIXELS = 4e6;
const examples = new Map(); // by label the data URLs of its pictures, also of labels not there now

async function addExamples(label, files) {
  const urls = await Promise.all(files.map(smallDataUrl));
  examples.set(label, [...(examples.get(label) || []), ...urls]);
  showShots();
  reclassify.start();
}

/** What no browser can draw goes to the server as it is, which says what is wrong with it. */
async function smallDataUrl(file) {
  const bitmap = await createImageBitmap(file).catch(() => null);
  const { width, height } = bitmap || { width: 1, height: 1 };
  const scale = Math.min(
    EXAMPLE_SIDE / Math.min(width, height),
    Math.sqrt(EXAMPLE_PIXELS / (width * height)),
  );
  if (scale >= 1) return `data:${file.type || "image/png"};base64,${await dataUrl(file)}`;
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(scale * width));
  canvas.height = Math.max(1, Math.round(scale * height));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/png");
}

function showShots() {
  byId("shots").replaceChildren(...ownLabels().map(shotElement));
}

function shotElement(label) {
  const item = element("li", "shot");
  item.dataset.label = label;
  item.append(element("span", "label", label));
  const images = examples.get(label) || [];
  images.forEach((source, number) => {
    const button = element("button", "example");
    button.type = "button";
    button.title = "Remove";
    button.setAttribute("aria-label", `Remove example ${number + 1} of ${label}`);
    const image = new Image(48, 48);
    image.src = source;
    image.alt = "";
    button.append(image);
    button.addEventListener("click", () => removeExample(label, number));
    item.append(button);
  });
  const add = element("button", "chip add", "+ examples");
  add.type = "button";
  add.setAttribute("aria-label", `Add examples of ${label}`);
  add.addEventListener("click", () => {
    byId("shot-file").dataset.label = label;
    byId("shot-file").click();
  });
  item.append(add);
  return item;
}

function removeExample(label, number) {
  examples.get(label).splice(number, 1);
  showShots();
  const row = [...byId("shots").children].find((item) => item.dataset.label === label);
  row?.querySelector(".add").focus(); // not lost with the button that was pressed
  reclassify.start();
}

function showWeight() {
  const weight = Number(byId("image-weight").value);
  const known = { 0: "words alone", 0.5: "half and half", 1: "examples alone" };
  byId("image-weight-shown").textContent = known[weight] || `${Math.round(100 * weight)}%`;
}

byId("image-weight").addEventListener("input", () => {
  showWeight();
  reclassify.start();
});
byId("shot-file").addEventListener("change", ({ target }) => {
  addExamples(target.dataset.label, [...target.files]);
  target.value = "";
});

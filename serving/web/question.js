"use strict";

// What is added to a search: further parts (more of this, less of that), filters, further pages;
// and what is told about one item.

const parts = [];
const filters = [];

/* ---- the whole question ---- */

function isArranged() {
  return parts.length > 0;
}

/** The body of a search with what was added on the page. */
function asked({ text, image, id, ...body }) {
  const first = text ? { text } : image ? { image } : id ? { id } : null;
  const filter = Object.fromEntries(filters.map(({ key, condition }) => [key, condition]));
  const whole = { ...body, collection, filter };
  if (!parts.length) return { ...first, ...whole };
  return { ...whole, parts: [...(first ? [first] : []), ...parts.map(({ part }) => part)] };
}

function asNamed(description) {
  const signed = parts.map(({ name, part }) => `${part.weight < 0 ? "−" : "+"} “${name}”`);
  const whole = [description, ...signed].filter(Boolean).join(" ");
  return whole.replace(/^\+ /, "");
}

function askAgain() {
  showChips();
  const { text, image, id } = question || {};
  if (text || image || id) search(question, named);
  else if (parts.length) search({ limit: LIMIT }, "");
  else say(byId("status"), "Describe what you look for, or use a picture.");
}

/** Items of one collection mean nothing in another: what names them is left out of the question. */
function leaveItems() {
  const kept = parts.filter(({ part }) => !part.id);
  parts.splice(0, parts.length, ...kept);
  if (question?.id) {
    question = null;
    named = "";
    showQueryImage(null);
    byId("results").replaceChildren();
    offerMore(null, null);
  }
}

/* ---- parts ---- */

function addPart(part, name) {
  parts.push({ part, name });
  askAgain();
}

function addWords(weight) {
  const text = byId("query").value.trim();
  if (!text) return say(byId("status"), "Type the words first.", true);
  byId("query").value = "";
  if (question && question.text) question = { limit: LIMIT };
  named = question && (question.image || question.id) ? named : "";
  addPart({ text, weight }, text);
}

function toolsOf(hit, name) {
  const box = element("span", "tools");
  const tool = (sign, label, action) => {
    const button = element("button", "tool", sign);
    button.type = "button";
    button.title = label;
    button.setAttribute("aria-label", `${label}: ${name}`);
    button.addEventListener("click", action);
    box.append(button);
  };
  tool("+", "Add to the search", () => addPart({ id: hit.id, weight: 1 }, name));
  tool("−", "Less of this", () => addPart({ id: hit.id, weight: -0.7 }, name));
  tool("⤢", "Look closer", () => showItem(hit, name));
  return box;
}

/* ---- filters ---- */

const CONDITIONS = {
  is: (value) => value,
  contains: (value) => ({ contains: String(value) }),
  gte: (value) => ({ gte: Number(value) }),
  lte: (value) => ({ lte: Number(value) }),
};

/** Numbers and truth values of JSON as such; everything else is text. */
function typed(text) {
  if (text === "true" || text === "false") return text === "true";
  return text.trim() !== "" && Number.isFinite(Number(text)) ? Number(text) : text;
}

function addFilter(event) {
  event.preventDefault();
  const key = byId("filter-key").value.trim();
  const operator = byId("filter-operator").value;
  const text = byId("filter-value").value;
  const isBound = operator === "gte" || operator === "lte";
  if (!key || !text) return say(byId("status"), "A filter needs a name and a value.", true);
  if (isBound && typeof typed(text) !== "number") {
    return say(byId("status"), "At least and at most need a number.", true);
  }
  const sign = byId("filter-operator").selectedOptions[0].textContent;
  const old = filters.findIndex((each) => each.key === key);
  if (old >= 0) filters.splice(old, 1);
  filters.push({ key, condition: CONDITIONS[operator](typed(text)), name: `${key} ${sign} ${text}` });
  byId("filter-value").value = "";
  askAgain();
}

function rememberKeys(results) {
  const known = new Set(results.flatMap((hit) => Object.keys(hit.metadata)));
  byId("filter-keys").replaceChildren(
    ...[...known].sort().map((key) => Object.assign(document.createElement("option"), { value: key })),
  );
}

function showChips() {
  const chip = (list, each, text) => {
    const button = element("button", "chip on", `${text} ×`);
    button.type = "button";
    button.setAttribute("aria-label", `Remove ${text}`);
    button.addEventListener("click", () => {
      list.splice(list.indexOf(each), 1);
      askAgain();
      byId("query").focus();
    });
    return button;
  };
  const signed = parts.map((each) =>
    chip(parts, each, `${each.part.weight < 0 ? "−" : "+"} ${each.name}`),
  );
  const chips = [...signed, ...filters.map((each) => chip(filters, each, each.name))];
  byId("added").replaceChildren(...chips);
  byId("added").hidden = !chips.length;
}

/* ---- further pages ---- */

let following = null;

function offerMore(body, next) {
  following = next ? { ...body, after: next } : null;
  byId("more").hidden = !following;
}

async function showMore() {
  const body = following;
  try {
    const answer = await ask("/v1/search", body);
    if (body !== following) return;
    const added = answer.results.map(hitElement);
    byId("results").append(...added);
    offerMore(body, answer.next);
    added[0]?.querySelector("button").focus();
  } catch (error) {
    say(byId("status"), error.message, true);
  }
}

/* ---- one item ---- */

function showItem(hit, name) {
  byId("item-name").textContent = name;
  const picture = byId("item-picture");
  picture.hidden = !hit.thumbnail;
  if (hit.thumbnail) picture.src = hit.thumbnail;
  const facts = { id: hit.id, similarity: hit.score, ...hit.metadata };
  byId("item-facts").replaceChildren(...Object.entries(facts).flatMap(factElements));
  byId("item").showModal();
}

function factElements([key, value]) {
  const text = typeof value === "string" ? value : JSON.stringify(value);
  return [element("dt", "", key), element("dd", "", text)];
}

byId("add-words").addEventListener("click", () => addWords(1));
byId("without-words").addEventListener("click", () => addWords(-0.7));
byId("filter-form").addEventListener("submit", addFilter);
byId("more").addEventListener("click", showMore);
byId("item-close").addEventListener("click", () => byId("item").close());

"use strict";

// Which collection is searched, drawn and judged: that of the address, and of the chooser, which is
// there where there are several.

const FIRST_COLLECTION = "default";
let collection = new URLSearchParams(location.search).get("collection") || FIRST_COLLECTION;

/** The address of this page with these words, to be kept or sent. */
function addressOf(query) {
  const known = { q: query, collection: collection === FIRST_COLLECTION ? "" : collection };
  const given = Object.entries(known).filter(([, value]) => value);
  const pairs = given.map(([key, value]) => `${key}=${encodeURIComponent(value)}`);
  return pairs.length ? `?${pairs.join("&")}` : "/";
}

/** What the server knows of the collection; null if another one was chosen meanwhile. */
async function readCollection(rest = "") {
  const asked = collection;
  const found = await read(`/v1/collections/${encodeURIComponent(asked)}${rest}`);
  return asked === collection ? found : null;
}

async function offerCollections() {
  const { collections, aliases } = await read("/v1/collections");
  const names = [...new Set([...collections, ...Object.keys(aliases), collection])].sort();
  const option = (name) => {
    const shown = aliases[name] ? `${name} (now ${aliases[name]})` : name;
    return new Option(shown, name, false, name === collection);
  };
  byId("collection-name").replaceChildren(...names.map(option));
  byId("collection-chooser").hidden = names.length < 2;
}

function chooseCollection(name) {
  collection = name;
  leaveItems();
  forgetMap();
  showHealth().catch((error) => say(byId("health-note"), error.message, true));
  history.replaceState(null, "", addressOf(byId("query").value.trim()));
  askAgain();
}

byId("collection-name").addEventListener("change", ({ target }) => chooseCollection(target.value));
offerCollections().catch(() => {}); // a search tells what is wrong

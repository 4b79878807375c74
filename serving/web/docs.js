"use strict";

// The API, browsable: written from /openapi.json, with a form to try each operation.

const EXAMPLES = {
  "/v1/search": { text: "red apple", limit: 3 },
  "/v1/embeddings": { input: ["a red apple"] },
  "/v1/items": { items: [{ id: "note-1", text: "a red apple", metadata: { kind: "note" } }] },
  "/v1/classify": { images: ["data:image/png;base64,…"], labels: ["red apple", "tomato"] },
};

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function resolved(document_, schema) {
  const name = schema?.$ref?.split("/").pop();
  return name ? document_.components.schemas[name] : schema || {};
}

function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.const) return JSON.stringify(schema.const);
  if (schema.type === "array") return `list of ${typeOf(schema.items || {})}`;
  return schema.format === "binary" ? "file" : schema.type || "any";
}

function fieldsTable(document_, schema) {
  const { properties = {}, required = [] } = resolved(document_, schema);
  const rows = Object.entries(properties).map(([name, field]) => {
    const range = ["minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems"]
      .filter((key) => key in field)
      .map((key) => `${key} ${field[key]}`);
    const initial = field.default === undefined || field.default === null ? [] :
      [`default ${JSON.stringify(field.default)}`];
    const notes = [required.includes(name) ? "required" : "", ...initial, ...range];
    return element("tr", "",
      element("td", "", element("code", "", name)),
      element("td", "", typeOf(field)),
      element("td", "", [field.description, notes.filter(Boolean).join(", ")]
        .filter(Boolean).join(" — ")));
  });
  const head = element("tr", "", ...["Field", "Type", "Meaning"].map((t) => element("th", "", t)));
  return element("table", "", element("thead", "", head), element("tbody", "", ...rows));
}

function tryForm(method, path) {
  const hasBody = method === "POST";
  const address = element("textarea", "code", path);
  address.rows = 1;
  address.setAttribute("aria-label", "Path");
  const body = element("textarea", "code", JSON.stringify(EXAMPLES[path] || {}, null, 2));
  body.rows = 6;
  body.setAttribute("aria-label", "JSON body");
  const send = element("button", "button", "Send");
  send.type = "button";
  const output = element("pre", "");
  output.hidden = true;
  output.tabIndex = 0; // long answers are scrolled by keyboard too
  output.setAttribute("role", "region");
  output.setAttribute("aria-label", `Answer of ${method} ${path}`);
  output.setAttribute("aria-live", "polite");
  send.addEventListener("click", async () => {
    const headers = hasBody ? { "content-type": "application/json" } : {};
    const options = { method, headers, body: hasBody ? body.value : undefined };
    output.hidden = false;
    try {
      const response = await fetch(address.value, options);
      const text = await response.text();
      output.textContent = `${response.status} ${response.statusText}\n\n${pretty(text)}`;
    } catch (error) {
      output.textContent = error.message;
    }
  });
  return element("div", "", element("h2", "", "Try it"), address, ...(hasBody ? [body] : []),
    element("p", "", send), output);
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function operationElement(document_, path, method, operation) {
  const inside = element("div", "", element("p", "", operation.description || ""));
  for (const [type, { schema }] of Object.entries(operation.requestBody?.content || {})) {
    inside.append(element("h2", "", `Body: ${type}`), fieldsTable(document_, schema));
  }
  for (const [status, { description, content }] of Object.entries(operation.responses)) {
    const schema = content?.["application/json"]?.schema;
    if (!status.startsWith("2") || !schema) continue;
    inside.append(element("h2", "", `Answer ${status}: ${description}`));
    inside.append(fieldsTable(document_, schema));
  }
  inside.append(tryForm(method, path));
  const does = (operation.description || operation.summary).split(/\.(?:\s|$)/)[0];
  const summary = element("summary", "", element("span", "method", method),
    element("code", "", path), element("span", "does", does));
  return element("details", "operation", summary, inside);
}

async function main() {
  const document_ = await (await fetch("/openapi.json")).json();
  const about = document.getElementById("about");
  about.textContent =
    `${document_.info.description} Version ${document_.info.version}. ` +
    "Failures are application/problem+json (RFC 9457) with a detail that names the field.";
  const list = document.getElementById("operations");
  for (const [path, operations] of Object.entries(document_.paths)) {
    for (const [method, operation] of Object.entries(operations)) {
      list.append(operationElement(document_, path, method.toUpperCase(), operation));
    }
  }
}

main();

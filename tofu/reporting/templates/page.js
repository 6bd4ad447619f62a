// The page's own part, one script with table.js, generations.js, figures.js and keys.js: what all of them need.
// Nothing that a model or a folder's name says becomes markup: textContent, or escaped().
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const texts = JSON.parse(byId("texts-of").textContent); // which run has which blocks
const runs = data.runs;
const parsed = new Promise((done) => {
  if (document.readyState === "loading") addEventListener("DOMContentLoaded", done, { once: true });
  else done();
});

function make(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}
const counted = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
// A name's parts: a long one is wrapped after "_" and "/", so that its end, which tells it from others, is seen
const parts = (name) => String(name).split(/(?<=[_/])/).flatMap((part, i) => (i ? [make("wbr"), part] : [part]));
const escaped = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

// A block of the page: base64 of gzip of JSON. Unpacked once.
const unpacked = new Map();
function unpack(id) {
  if (!unpacked.has(id)) unpacked.set(id, read(id));
  return unpacked.get(id);
}
async function read(id) {
  await parsed;
  if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old: it has no DecompressionStream");
  const signs = atob(byId(id).textContent);
  const bytes = new Uint8Array(signs.length);
  for (let i = 0; i < signs.length; i++) bytes[i] = signs.charCodeAt(i); // Uint8Array.from takes many times as long
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

const SORT = [["evaluated", "desc"], ["run", "asc"]]; // where runs were evaluated on their way: their ends first

// What a link keeps: search, order, columns, filters, the open run and row. Names, not numbers: a later report may
// have other columns.
const link = (() => {
  const found = new URLSearchParams(location.hash.slice(1));
  const json = (name, other) => { try { return JSON.parse(found.get(name)) ?? other; } catch { return other; } };
  return {
    search: found.get("search") ?? "", sort: json("sort", SORT), columns: json("columns", null), filters: json("filters", {}),
    length: json("length", 25), start: json("start", 0), run: found.get("run"), row: json("row", null),
  };
})();
function keep(changes) {
  Object.assign(link, changes);
  const found = new URLSearchParams();
  const put = (name, value, usual) => {
    const text = typeof value === "string" ? value : JSON.stringify(value);
    if (value !== null && text !== usual) found.set(name, text);
  };
  put("search", link.search, "");
  put("sort", link.sort, JSON.stringify(SORT));
  put("columns", link.columns, "");
  put("filters", link.filters, "{}");
  put("length", link.length, "25");
  put("start", link.start, "0");
  put("run", link.run, "");
  put("row", link.run === null ? null : link.row, "");
  const text = found.toString();
  history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
}

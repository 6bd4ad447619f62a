// The page's own part: what DataTables and Plotly show, and the browser of generations.
// Nothing that a model or a folder's name says becomes markup: textContent, or escaped().
"use strict";
(() => {
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const texts = JSON.parse(byId("texts-of").textContent); // which run has which blocks
const runs = data.runs;
const MOST = 2000; // rows in the list of the browser at a time
const parsed = new Promise((done) => {
  if (document.readyState === "loading") addEventListener("DOMContentLoaded", done, { once: true });
  else done();
});

function make(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}
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
  const bytes = Uint8Array.from(atob(byId(id).textContent), (sign) => sign.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

// What a link keeps: search, order, columns, filters, the open run and row. Names, not numbers: a later report may
// have other columns.
const link = (() => {
  const found = new URLSearchParams(location.hash.slice(1));
  const json = (name, other) => { try { return JSON.parse(found.get(name)) ?? other; } catch { return other; } };
  return {
    search: found.get("search") ?? "", sort: json("sort", []), columns: json("columns", null), filters: json("filters", {}),
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
  put("sort", link.sort, "[]");
  put("columns", link.columns, "");
  put("filters", link.filters, "{}");
  put("length", link.length, "25");
  put("start", link.start, "0");
  put("run", link.run, "");
  put("row", link.run === null ? null : link.row, "");
  const text = found.toString();
  history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
}

// ---- the table ----
function rounded(value, fixed) {
  if (value === null || value === undefined) return "-";
  if (value && Math.abs(value) < 5e-4 && !fixed) return value.toExponential(1);
  const text = Math.abs(value) < 100 ? value.toFixed(3) : String(Number(value.toPrecision(4)));
  return Number(text) === 0 ? text.replace("-", "") : text;
}
const brief = (value) => (typeof value === "number" && value && Math.abs(value) < 1e-3 ? value.toExponential() : String(value));

function valueOf(run, column) {
  if (column.kind === "metric") return run.numbers[column.name]?.[0] ?? null;
  if (column.kind === "key") return run.keys[column.name];
  if (column.kind === "run") return run.name;
  if (column.name === "state") return run.collapsed.length ? "† collapsed" : "";
  if (column.name === "evaluated") return run.checkpoint ? "checkpoint" : "final";
  return run[column.name];
}
function cellOf(run, column) {
  const value = valueOf(run, column);
  if (column.kind === "run") {
    return make("button", { type: "button", className: "open", textContent: run.name, title: `${run.name}: its generations` });
  }
  if (column.kind === "metric" && column.name in run.numbers) {
    const [, file, note] = run.numbers[column.name];
    const title = [value === null ? "" : String(value), note, decodeURIComponent(data.files[file])].filter(Boolean).join("\n");
    return make("a", { href: data.files[file], title, textContent: rounded(value, column.name.startsWith("log10")) });
  }
  if (column.kind === "metric") return "-";
  if (column.name === "state") return make("span", { textContent: value, title: run.collapsed.join("; ") });
  return escaped(value === null ? "" : brief(value));
}
const isNumeric = (column) => column.kind === "metric" || runs.every((run) => {
  const value = valueOf(run, column);
  return value === null || value === "" || typeof value === "number";
});
function columnOf(column) {
  const numeric = column.kind !== "run" && column.kind !== "text" && isNumeric(column);
  const filter = column.few && !numeric ? [{ extend: "dropdown", text: `Values of ${column.name}`, icon: "search", content: ["searchList"] }] : [];
  return {
    name: column.name, title: escaped(column.title ?? column.name),
    type: numeric ? "num" : "string", className: numeric ? "dt-right" : "dt-left",
    data: (run, type) => {
      if (type === "display") return cellOf(run, column);
      const value = valueOf(run, column);
      return type === "filter" ? escaped(value ?? "") : value;
    },
    columnControl: [{ target: 0, content: filter }, { target: 1, content: [{ extend: "search", titleAttr: `Filter ${column.name}` }] }],
  };
}
// The table has the chosen columns alone: with all of them, a hundred and more, it would be slow. A search finds what
// is in the others too: EVERYTHING is a column that is never seen.
const EVERYTHING = "(everything)";
const usual = data.columns.filter((column) => column.shown).map((column) => column.name);
let columns = []; // those of the table
let table = null;

// DataTables' own form of what the link keeps, and back
function loaded() {
  const names = columns.map((column) => column.name);
  const plain = { search: "", smart: true, regex: false, caseInsensitive: true };
  return {
    time: Date.now(), start: link.start, length: link.length,
    order: link.sort.filter(([name]) => names.includes(name)).map(([name, way]) => [names.indexOf(name), way]),
    search: { ...plain, search: link.search },
    columns: [...names, EVERYTHING].map((name) => ({ name, visible: name !== EVERYTHING, search: plain })),
    columnControl: Object.fromEntries(names.map((name, i) => [i, link.filters[name] ?? {}])),
  };
}
function saved(state) {
  const filters = {};
  for (const [i, one] of Object.entries(state.columnControl ?? {})) {
    const found = {};
    if (one.searchInput && (one.searchInput.value || /empty/i.test(one.searchInput.logic))) found.searchInput = one.searchInput;
    if (one.searchList?.length) found.searchList = one.searchList;
    if (Object.keys(found).length) filters[columns[i].name] = found;
  }
  keep({
    search: state.search.search, sort: state.order.filter(([, way]) => way), filters,
    length: state.length, start: state.start,
  });
}
function build() {
  if (table) table.destroy();
  const chosen = new Set(link.columns ?? usual);
  columns = data.columns.filter((column) => column.kind === "run" || chosen.has(column.name));
  const everything = (run) => [...data.columns.map((column) => valueOf(run, column) ?? ""), ...run.collapsed, ...run.said].join(" ");
  const last = { name: EVERYTHING, title: "", visible: false, orderable: false, type: "string", columnControl: [],
    data: (run, type) => (type === "filter" ? escaped(everything(run)) : "") };
  const titles = [...columns.map((column) => column.title ?? column.name), ""];
  byId("table").replaceChildren(make("thead", {}, make("tr", {}, ...titles.map((textContent) => make("th", { scope: "col", textContent })))));
  table = jQuery("#table").DataTable({
    data: runs, columns: [...columns.map(columnOf), last], order: [], autoWidth: false, deferRender: true,
    lengthMenu: [25, 50, 100, { label: "all", value: -1 }],
    stateSave: true, stateDuration: -1, stateLoadCallback: loaded, stateSaveCallback: (_, state) => saved(state),
    createdRow: (row, run) => row.classList.toggle("collapsed", run.collapsed.length > 0),
    layout: {
      topStart: { buttons: [
        { text: "Columns", action: () => byId("columns").showModal() },
        { text: "Copy link", action: copyLink },
        { text: "Reset", action: () => { history.replaceState(null, "", location.pathname + location.search); location.reload(); } },
      ] },
      topEnd: { search: { placeholder: "Search ( / )" } },
      bottomStart: ["info", "pageLength"], bottomEnd: "paging",
    },
    language: {
      search: "", lengthMenu: "_MENU_ runs a page", info: "_START_ to _END_ of _TOTAL_ runs", infoEmpty: "no run",
      infoFiltered: "(of _MAX_)", zeroRecords: "No run matches: clear the search and the filters",
    },
  });
  document.querySelector(".dt-search input").setAttribute("aria-label", "Search all runs");
}
jQuery.fn.dataTable.ext.errMode = "throw";
build();

// ---- the choice of columns ----
function boxesOf(title, names) {
  const shown = new Set(link.columns ?? usual);
  const boxes = names.map((name) => make("input", { type: "checkbox", value: name, checked: shown.has(name) }));
  const all = (checked) => make("button", {
    type: "button", textContent: checked ? "all" : "none", onclick: () => boxes.forEach((box) => { box.checked = checked; }),
  });
  return make("fieldset", {}, make("legend", {}, title, " ", all(true), " ", all(false)),
    ...boxes.map((box) => make("label", {}, box, ` ${box.value}`)));
}
function showBoxes() {
  const left = new Set(data.columns.slice(1).map((column) => column.name));
  const take = (names) => names.filter((name) => left.delete(name));
  const settings = take(data.columns.filter((column) => column.kind !== "metric").map((column) => column.name));
  const sets = Object.entries(data.sets).map(([title, names]) => [title, take(names)]);
  byId("boxes").replaceChildren(...[["Settings", settings], ...sets, ["Other metrics", [...left]]]
    .filter(([, names]) => names.length).map(([title, names]) => boxesOf(title, names)));
}
byId("usual").addEventListener("click", () => {
  for (const box of byId("boxes").querySelectorAll("input")) box.checked = usual.includes(box.value);
});
byId("columns-close").addEventListener("click", () => byId("columns").close());
byId("columns").addEventListener("close", () => {
  const chosen = new Set([...byId("boxes").querySelectorAll("input:checked")].map((box) => box.value));
  const names = data.columns.map((column) => column.name).filter((name) => name === "run" || chosen.has(name));
  if (JSON.stringify(names) === JSON.stringify(columns.map((column) => column.name))) return;
  keep({ columns: JSON.stringify(names) === JSON.stringify(usual) ? null : names });
  build();
});
showBoxes();

async function copyLink(event, api, button) {
  const label = button[0].querySelector("span") ?? button[0];
  try { await navigator.clipboard.writeText(location.href); label.textContent = "Copied"; } catch { label.textContent = "Copy it from the address bar"; }
  setTimeout(() => { label.textContent = "Copy link"; }, 2000);
}
byId("table").addEventListener("click", (event) => {
  const button = event.target.closest("button.open");
  if (button) openRun(runs.indexOf(table.row(button.closest("tr")).data()));
});
addEventListener("hashchange", () => location.reload()); // the reader pasted another link

// ---- the browser of generations ----
const dialog = byId("browser");
const ROLES = { truth: "Truth", before: "Before (starting model)", after: "After (this run)", retain: "Retain model" };
const opened = new Map(); // run -> its rows and texts
let current = -1; // the run that is shown
let hits = []; // [run, row] as listed
let chosen = -1; // of hits
let turn = 0; // of openings: a slow one does not come over a later one

for (const [role, name] of Object.entries(ROLES)) byId("against").append(make("option", { value: role, textContent: name }));

async function load(i) {
  const known = texts.of[runs[i].name];
  const set = texts.sets[known.set];
  const ids = { question: set.question, truth: set.truth, before: known.before, after: known.after, retain: known.retain };
  const found = { rows: set.rows };
  await Promise.all(Object.entries(ids).map(async ([role, id]) => { if (id) found[role] = await unpack(id); }));
  return found;
}
async function openRun(i, wanted = null) {
  const mine = ++turn;
  const run = runs[i];
  let why = texts.of[run.name]?.why ?? null;
  if (!why && !opened.has(i)) {
    try { opened.set(i, await load(i)); } catch (error) { why = error.message; }
  }
  if (mine !== turn) return;
  const row = wanted ?? (chosen >= 0 ? rowOf(hits[chosen]) : null);
  head(i);
  byId("why").hidden = !why;
  byId("why").textContent = why ? `Nothing to show: ${why}.` : "";
  for (const part of dialog.querySelectorAll(".tools, .panes")) part.hidden = !opened.size;
  if (!dialog.open) { dialog.showModal(); byId("rows").focus(); }
  list(row);
}
function head(i) {
  const run = runs[i];
  current = i;
  byId("browser-title").textContent = run.name + (run.collapsed.length ? " † collapsed" : "");
  const keys = data.keys.map((name) => `${name} ${brief(run.keys[name])}`);
  if (run.step !== null) keys.push(`step ${run.step}`);
  byId("settings").replaceChildren(keys.join(", "), ...Object.entries(run.files).flatMap(([name, file]) => [
    " · ", make("a", { href: data.files[file], textContent: name }),
  ]));
  showOpened();
  keep({ run: run.name });
}
const rowOf = ([run, row]) => opened.get(run).rows[row];
function showOpened() {
  byId("opened").replaceChildren(...[...opened.keys()].map((i) => {
    const button = make("button", { type: "button", textContent: runs[i].name, title: `show ${runs[i].name}` });
    button.setAttribute("aria-pressed", i === current);
    button.addEventListener("click", () => openRun(i));
    return button;
  }));
}
// The rows that the search and the set allow: of the run that is shown, or, while a reader searches, of all opened ones
function list(row = null) {
  const wanted = byId("find").value.trim().toLowerCase();
  const known = [...new Set([...opened.values()].flatMap((one) => one.rows.map(([name]) => name)))];
  const set = known.includes(byId("set").value) ? byId("set").value : "";
  byId("set").replaceChildren(...["", ...known].map((name) => make("option", { value: name, textContent: name || "all" })));
  byId("set").value = set;
  hits = [];
  for (const i of wanted ? opened.keys() : opened.has(current) ? [current] : []) {
    const one = opened.get(i);
    one.rows.forEach(([name], k) => {
      if (set && name !== set) return;
      const all = ["question", ...Object.keys(ROLES)].map((role) => one[role]?.[k] ?? "");
      if (!wanted || all.some((text) => text.toLowerCase().includes(wanted))) hits.push([i, k]);
    });
  }
  const shown = hits.slice(0, MOST);
  byId("count").textContent = `${hits.length} rows` + (wanted ? ` in ${opened.size} opened runs` : "")
    + (hits.length > MOST ? `, the first ${MOST} are listed` : "");
  let heading = null;
  byId("rows").replaceChildren(...shown.flatMap(([i, k], n) => {
    const one = opened.get(i);
    const line = make("li", { id: `row-${n}` }, make("b", { textContent: one.rows[k].join(" ") }), ` ${one.question[k]}`);
    line.setAttribute("role", "option");
    if (!wanted || heading === i) return [line];
    heading = i;
    const name = make("li", { className: "of", textContent: runs[i].name });
    name.setAttribute("role", "presentation");
    return [name, line];
  }));
  hits = shown;
  chosen = -1;
  const same = row ? hits.findIndex((hit) => hit[0] === current && rowOf(hit).join() === row.join()) : -1;
  choose(Math.max(same, hits.length ? 0 : -1));
}
function choose(n) {
  byId(`row-${chosen}`)?.removeAttribute("aria-selected");
  chosen = n;
  const line = byId(`row-${n}`);
  if (!line) {
    byId("rows").removeAttribute("aria-activedescendant");
    byId("texts").replaceChildren(opened.has(current) ? "No row matches." : "");
    return;
  }
  line.setAttribute("aria-selected", "true");
  byId("rows").setAttribute("aria-activedescendant", line.id);
  line.scrollIntoView({ block: "nearest" });
  if (hits[n][0] !== current) head(hits[n][0]); // a hit in another opened run
  showTexts();
  keep({ row: rowOf(hits[n]) });
}
function showTexts() {
  const [i, k] = hits[chosen];
  const shown = opened.get(i);
  const known = texts.of[runs[i].name];
  const [set, key] = shown.rows[k];
  const against = byId("against").value;
  const reference = shown[against]?.[k] ?? null;
  const cards = Object.entries(ROLES).map(([role, name]) => {
    const source = role === "after" ? runs[i].name : known[`${role}_of`] ?? "";
    return card(role, name, source, shown[role]?.[k] ?? null, role === against ? null : reference);
  });
  byId("texts").replaceChildren(
    make("h3", { textContent: `${set} ${key}` }),
    make("p", { className: "question", textContent: shown.question[k], title: known.tags.filter(Boolean).length ? `in the prompt's tags: ${known.tags.join(" … ")}` : "" }),
    make("div", { className: "cards" }, ...cards),
  );
}
function card(role, name, source, text, reference) {
  const body = make("p", { className: "text" });
  if (text === null) body.append(make("i", { textContent: source || role === "truth" ? "It has none of this row." : "No log of it is known." }));
  else if (!text) body.append(make("i", { textContent: "(empty)" }));
  else body.append(...marked(reference, text).map(([differs, part]) => (differs ? make("mark", { textContent: part }) : part)));
  const title = make("h4", { textContent: name });
  if (source) title.append(make("small", { textContent: source, title: source }));
  return make("section", { className: `card ${role}` }, title, body);
}
// A text's parts, [whether its words are not in the reference, part]: the longest common subsequence of words
const segmenter = Intl.Segmenter ? new Intl.Segmenter(undefined, { granularity: "word" }) : null;
function wordsOf(text) {
  if (segmenter) return [...segmenter.segment(text)].map((one) => [one.segment, one.isWordLike]);
  return (text.match(/[\p{L}\p{N}]+|[^\p{L}\p{N}]+/gu) ?? []).map((one) => [one, /[\p{L}\p{N}]/u.test(one)]);
}
function marked(reference, text) {
  if (reference === null) return [[false, text]];
  const words = (parts) => parts.filter((one) => one[1]).map((one) => one[0].toLowerCase());
  const parts = wordsOf(text);
  const [a, b] = [words(wordsOf(reference)), words(parts)];
  if (a.length * b.length > 4e6) return [[false, text]];
  const width = b.length + 1;
  const longest = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      longest[i * width + j] = a[i] === b[j] ? longest[(i + 1) * width + j + 1] + 1
        : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    }
  }
  const common = new Set();
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) { common.add(j); i++; j++; }
    else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i++;
    else j++;
  }
  const found = [];
  let word = 0;
  for (const [part, isWord] of parts) {
    const differs = isWord && !common.has(word);
    if (isWord) word++;
    if (found.length && found.at(-1)[0] === differs) found.at(-1)[1] += part;
    else found.push([differs, part]);
  }
  const joined = [];
  found.forEach(([differs, part], n) => { // a blank between two marked words is marked with them
    const between = !differs && n > 0 && n + 1 < found.length && !part.trim();
    if (joined.length && joined.at(-1)[0] === (differs || between)) joined.at(-1)[1] += part;
    else joined.push([differs || between, part]);
  });
  return joined;
}
function nextRun(step) {
  const order = table.rows({ search: "applied", order: "applied" }).indexes().toArray().filter((i) => i === current || !texts.of[runs[i].name]?.why);
  if (!order.length) return;
  openRun(order[(order.indexOf(current) + step + order.length) % order.length]);
}
const nextRow = (step) => { if (hits.length) choose(Math.min(hits.length - 1, Math.max(0, chosen + step))); };
byId("rows").addEventListener("click", (event) => {
  const line = event.target.closest("[role=option]");
  if (line) choose(Number(line.id.slice("row-".length)));
});
let pause;
byId("find").addEventListener("input", () => { clearTimeout(pause); pause = setTimeout(() => list(chosen >= 0 ? rowOf(hits[chosen]) : null), 80); });
byId("set").addEventListener("change", () => list(chosen >= 0 ? rowOf(hits[chosen]) : null));
byId("against").addEventListener("change", () => { if (chosen >= 0) showTexts(); });
byId("previous").addEventListener("click", () => nextRun(-1));
byId("next").addEventListener("click", () => nextRun(1));
byId("close").addEventListener("click", () => { turn++; dialog.close(); });
byId("keys-close").addEventListener("click", () => byId("keys").close());
byId("help").addEventListener("click", () => byId("keys").showModal());
byId("theme").addEventListener("click", () => switchTheme());
dialog.addEventListener("cancel", () => { turn++; });
dialog.addEventListener("close", () => { if (!dialog.open) keep({ run: null, row: null }); }); // it comes late: another may be open

// ---- keys ----
function nextButton(step) {
  const buttons = [...document.querySelectorAll("#table button.open")];
  const at = buttons.indexOf(document.activeElement?.closest("tr")?.querySelector("button.open"));
  buttons[at < 0 ? 0 : Math.min(buttons.length - 1, Math.max(0, at + step))]?.focus();
}
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("keys").open || byId("columns").open) return;
  const inside = dialog.open;
  const typing = event.target.matches("input, select, textarea");
  const arrows = inside ? !typing || event.target === byId("find") : event.target.matches("button.open");
  const step = { ArrowDown: arrows && 1, ArrowUp: arrows && -1, j: !typing && 1, k: !typing && -1 }[event.key];
  if (step) (inside ? nextRow : nextButton)(step);
  else if (typing) return;
  else if (event.key === "/") (inside ? byId("find") : document.querySelector(".dt-search input")).focus();
  else if (event.key === "?") byId("keys").showModal();
  else if (inside && (event.key === "n" || event.key === "p")) nextRun(event.key === "n" ? 1 : -1);
  else return;
  event.preventDefault();
});

// ---- the figures ----
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
let library = null;
function plotly() { // its script is put in once a figure comes into view; the policy knows its digest
  library ??= unpack("plotly").then((code) => { document.head.append(make("script", { textContent: code })); return window.Plotly; });
  return library;
}
const drawn = new Set(); // functions that draw a figure anew, in the colours of the theme
function inTheme(value) { // black is the retain model's colour: it is the text's, so that it can be seen
  if (Array.isArray(value) || value === null || typeof value !== "object") return value === "#000000" ? colour("--ink") : value;
  return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, inTheme(one)]));
}
function about(i) {
  if (i < 0) return "";
  const settings = data.keys.map((name) => `${name} ${brief(runs[i].keys[name])}`).join(", ");
  const step = runs[i].step === null ? "" : `, step ${runs[i].step}`;
  const collapsed = runs[i].collapsed.length ? "<br>† collapsed" : "";
  return `<b>${escaped(runs[i].name)}</b><br>${escaped(settings + step)}${collapsed}`;
}
function traceOf(trace, layout) {
  const axis = (name) => layout[name]?.title?.text;
  const x = trace.type === "bar" ? "%{x}" : `${axis("xaxis") ?? "x"}: %{x:.4~g}<br>${trace.choice ? escaped(trace.choice) : axis("yaxis") ?? ""}`;
  return {
    ...inTheme(trace), name: escaped(trace.name), text: (trace.customdata ?? []).map(about), textposition: "none",
    hovertemplate: `%{text}<br>${x}: %{y:.4~g}<extra></extra>`,
  };
}
function layoutOf(figure, choice, width) {
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true };
  const given = figure.layout;
  const y = choice ? { title: { text: escaped(choice) } } : {};
  const shapes = (given.shapes ?? []).map((one) => ({ ...one, line: { ...one.line, color: colour("--soft") } }));
  return {
    ...given, shapes, font: { color: colour("--ink"), family: "system-ui, sans-serif", size: 12 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 56, r: 12, t: 8, b: 48 }, hovermode: "closest",
    hoverlabel: { align: "left", bgcolor: colour("--paper"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
    modebar: { orientation: "v", bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--accent") },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", height: width < 480 ? 420 : 400,
    xaxis: { ...axis, ...given.xaxis }, yaxis: { ...axis, ...given.yaxis, ...y },
  };
}
const SETUP = { responsive: true, displayModeBar: matchMedia("(pointer: coarse)").matches ? false : "hover", displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], toImageButtonOptions: { format: "svg" } };
function figureOf(figure) {
  const place = make("div", { className: "plot" });
  place.dataset.name = figure.name;
  const select = make("select", {}, ...(figure.choices ?? []).map((name) => make("option", { value: name, textContent: name })));
  const caption = make("figcaption", { textContent: figure.title });
  if (figure.choices) caption.append(make("label", {}, "Metric ", select));
  const draw = async () => {
    const library = await plotly();
    const choice = figure.choices ? select.value : null;
    const data = figure.data.filter((trace) => !choice || trace.choice === choice).map((trace) => traceOf(trace, figure.layout));
    await library.react(place, data, layoutOf(figure, choice, place.clientWidth), SETUP);
    if (place.dataset.drawn) return;
    place.dataset.drawn = "true";
    place.on("plotly_click", (event) => { const i = event.points[0].customdata; if (i >= 0) openRun(i); });
    drawn.add(draw);
  };
  select.addEventListener("change", draw);
  const watch = new IntersectionObserver((seen) => {
    if (!seen.some((one) => one.isIntersecting)) return;
    watch.disconnect();
    draw().catch((error) => { place.textContent = `The figure can't be drawn: ${error.message}`; });
  }, { rootMargin: "200px" });
  watch.observe(place);
  return make("figure", {}, caption, place);
}
function showFigures(problem) {
  drawn.clear();
  const of = data.figures.filter((figure) => figure.problem === problem);
  const missing = of.filter((figure) => figure.why).map((figure) => make("li", { textContent: `${figure.title}: not drawn, ${figure.why}` }));
  byId("plots").replaceChildren(...of.filter((figure) => !figure.why).map(figureOf), make("ul", { className: "missing" }, ...missing));
}
const problems = [...new Set(data.figures.map((figure) => figure.problem))];
const select = byId("problem").querySelector("select");
select.append(...problems.map((name) => make("option", { value: name, textContent: name })));
select.addEventListener("change", () => showFigures(select.value));
byId("problem").hidden = problems.length < 2;
showFigures(problems[0]);
addEventListener("theme", () => drawn.forEach((draw) => draw()));

if (link.run !== null) {
  const i = runs.findIndex((run) => run.name === link.run);
  if (i >= 0) openRun(i, link.row);
}
document.documentElement.dataset.ready = "true";
performance.mark("ready");
})();

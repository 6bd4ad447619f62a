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
    return make("button", { type: "button", className: "open", title: `${run.name}: its generations` }, ...parts(run.name));
  }
  if (column.kind === "metric" && column.name in run.numbers) {
    const [, file, note] = run.numbers[column.name];
    const title = [value === null ? "" : String(value), note, decodeURIComponent(data.files[file])].filter(Boolean).join("\n");
    return make("a", { href: data.files[file], title, textContent: rounded(value, column.name.startsWith("log10")) });
  }
  if (column.kind === "metric") return "-";
  return escaped(value === null ? "" : brief(value));
}
const isNumeric = (column) => column.kind === "metric" || runs.every((run) => {
  const value = valueOf(run, column);
  return value === null || value === "" || typeof value === "number";
});
function columnOf(column) {
  const numeric = column.kind !== "run" && column.kind !== "text" && isNumeric(column);
  const filter = column.few ? [{ extend: "dropdown", text: `Values of ${column.name}`, icon: "search", content: ["searchList"] }] : [];
  return {
    name: column.name, title: escaped(column.title ?? column.name),
    type: numeric ? "num" : "string", className: numeric ? "dt-right" : "dt-left",
    data: (run, type) => {
      if (type === "display") return cellOf(run, column);
      const value = valueOf(run, column);
      return type === "filter" ? escaped(value ?? "") : value;
    },
    createdCell: (cell, _, run) => { // not in cellOf: a list of values shows only what is text there
      if (column.name === "state") cell.title = run.collapsed.join("; ");
      if (column.kind === "key" && !numeric) cell.replaceChildren(make("span", { className: "value" }, ...parts(cell.textContent)));
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

// A link to a part of the page goes there by hand: the browser would put the part in the place of what the link keeps.
function goTo(part) {
  part.tabIndex = -1; // the next Tab goes on from there
  part.focus({ preventScroll: true });
  part.scrollIntoView();
}
addEventListener("click", (event) => {
  const part = !event.ctrlKey && !event.metaKey && !event.shiftKey && byId(event.target.closest('a[href^="#"]')?.hash.slice(1));
  if (!part) return;
  event.preventDefault();
  goTo(part);
});
addEventListener("hashchange", () => {
  const part = byId(location.hash.slice(1));
  if (!part) location.reload(); // the reader pasted another link
  else { keep({}); goTo(part); }
});
